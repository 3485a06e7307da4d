//! Kernel sources and their compilation to sm_90a machine code, cached by content.

use std::ffi::{CStr, CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::ptr;

use cudarc::nvrtc::sys;

use super::{Error, Result};

/// One source file of `kernels/cuda`.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Name of the file without its ending; kernels are found by it.
    pub name: &'static str,
    /// CUDA C++.
    pub source: &'static str,
}

/// Declares the list of programs from file names.
macro_rules! programs {
    ($($name:literal),* $(,)?) => {
        &[$(Program { name: $name, source: include_str!(concat!("../../cuda/", $name, ".cu")) }),*]
    };
}

impl Program {
    /// Every program, in the order `device compile` reports them.
    pub const ALL: &'static [Self] = programs![
        "fp8_gemm",
        "fp8_prefill",
        "mla_combine",
        "mla_decode",
        "mla_plan",
        "mla_prefill",
        "pointwise",
        "probe",
        "routing",
        "sampling"
    ];

    /// The program of this name.
    pub fn find(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|p| p.name == name)
    }
}

const HEADERS: [(&CStr, &str); 4] = [
    (c"fp8.cuh", include_str!("../../cuda/fp8.cuh")),
    (c"mla.cuh", include_str!("../../cuda/mla.cuh")),
    (c"ptx.cuh", include_str!("../../cuda/ptx.cuh")),
    (c"wgmma.cuh", include_str!("../../cuda/wgmma.cuh")),
];

const OPTIONS: [&CStr; 4] = [
    c"--gpu-architecture=sm_90a",
    c"--std=c++20",
    c"-default-device",
    c"--diag-error=177", // an unused variable is a mistake, not a warning
];

/// Machine code of `program`, from `cache` when a file of this content's name is there.
///
/// # Errors
/// If NVRTC is missing or refuses the source. A cache that cannot be written is no error: the next start compiles again.
pub fn compile(program: Program, cache: Option<&Path>) -> Result<Vec<u8>> {
    let file =
        cache.map(|dir| dir.join(format!("{}-{:016x}.cubin", program.name, content(program))));
    if let Some(code) = file.as_ref().and_then(|file| std::fs::read(file).ok()) {
        return Ok(code);
    }
    let code = run_nvrtc(program)?;
    if let (Some(dir), Some(file)) = (cache, file) {
        // Written aside and renamed, so that another process never reads half a file.
        let partial = dir.join(format!("{}.{}.partial", program.name, std::process::id()));
        let _ = std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(&partial, &code))
            .and_then(|()| std::fs::rename(&partial, &file));
    }
    Ok(code)
}

fn content(program: Program) -> u64 {
    let mut hasher = DefaultHasher::new();
    (program.source, HEADERS, OPTIONS).hash(&mut hasher);
    hasher.finish()
}

fn run_nvrtc(program: Program) -> Result<Vec<u8>> {
    // SAFETY: only asks the dynamic loader whether the library is there.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver("libnvrtc"));
    }
    let source = text(program.source);
    let name = text(program.name);
    let headers = HEADERS.map(|(_, source)| text(source));
    let header_pointers = headers.each_ref().map(|h| h.as_ptr());
    let header_names = HEADERS.map(|(name, _)| name.as_ptr());
    let mut handle = ptr::null_mut();
    // SAFETY: all strings outlive the call; NVRTC copies them.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut handle,
            source.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            header_pointers.as_ptr(),
            header_names.as_ptr(),
        )
    };
    if created != sys::nvrtcResult::NVRTC_SUCCESS {
        return Err(failed(program, &format!("{created:?}")));
    }
    let options = OPTIONS.map(CStr::as_ptr);
    // SAFETY: `handle` is the program just made; the buffers below have the sizes NVRTC asked for.
    let (compiled, code, log) = unsafe {
        let compiled = sys::nvrtcCompileProgram(handle, options.len() as i32, options.as_ptr());
        let code = read(handle, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN);
        let log = read(handle, sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog);
        sys::nvrtcDestroyProgram(&raw mut handle);
        (compiled, code, log)
    };
    if compiled == sys::nvrtcResult::NVRTC_SUCCESS {
        Ok(code)
    } else {
        Err(failed(
            program,
            String::from_utf8_lossy(&log).trim_end_matches('\0'),
        ))
    }
}

/// Reads a result of NVRTC through its pair of size and content calls; empty when there is none.
unsafe fn read(
    handle: sys::nvrtcProgram,
    size: unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
    content: unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
) -> Vec<u8> {
    let mut bytes = 0;
    // SAFETY: the caller vouches for `handle`; `buffer` has the size asked for.
    unsafe {
        if size(handle, &raw mut bytes) != sys::nvrtcResult::NVRTC_SUCCESS {
            return Vec::new();
        }
        let mut buffer = vec![0u8; bytes];
        if content(handle, buffer.as_mut_ptr().cast()) != sys::nvrtcResult::NVRTC_SUCCESS {
            return Vec::new();
        }
        buffer
    }
}

fn text(s: &str) -> CString {
    CString::new(s).expect("kernel sources hold no zero bytes")
}

fn failed(program: Program, log: &str) -> Error {
    Error::Compile {
        file: program.name,
        log: log.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_in_the_list() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .filter_map(|e| {
                e.unwrap()
                    .file_name()
                    .into_string()
                    .unwrap()
                    .strip_suffix(".cu")
                    .map(str::to_owned)
            })
            .collect();
        files.sort();
        let mut listed: Vec<_> = Program::ALL.iter().map(|p| p.name).collect();
        listed.sort_unstable();
        assert_eq!(files, listed);
    }

    #[test]
    fn code_comes_from_the_cache_when_the_content_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let program = Program {
            name: "x",
            source: "not CUDA at all",
        };
        let file = dir
            .path()
            .join(format!("x-{:016x}.cubin", content(program)));
        std::fs::write(file, b"code").unwrap();
        assert_eq!(compile(program, Some(dir.path())).unwrap(), b"code");
    }
}
