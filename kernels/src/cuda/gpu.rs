//! An open device and its compiled kernels.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::{Error, Program, Result, compile};

/// Most dynamic shared memory a block of sm_90 can have.
pub(super) const SHARED_LIMIT: usize = 232_448;

/// A device. Kernels are compiled and loaded when first asked for: call [`Gpu::load_all`] before capturing graphs.
#[derive(Debug)]
pub struct Gpu {
    context: Arc<CudaContext>,
    cache: Option<PathBuf>,
    sms: u32,
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<&'static str, Handle<sys::CUmodule>>,
    functions: HashMap<&'static str, Handle<sys::CUfunction>>,
}

/// A driver handle that may be used from any thread.
#[derive(Clone, Copy, Debug)]
struct Handle<T>(T);

// SAFETY: modules and functions are handles of the driver, which is thread safe.
unsafe impl<T> Send for Handle<T> {}

impl Gpu {
    /// Opens device `ordinal`; compiled kernels are kept in `cache`.
    ///
    /// # Errors
    /// [`Error::NoDriver`] on a machine without a GPU.
    pub fn open(ordinal: usize, cache: Option<PathBuf>) -> Result<Self> {
        // SAFETY: only asks the dynamic loader whether the library is there.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDriver("libcuda"));
        }
        let context = CudaContext::new(ordinal).map_err(driver("opening the device"))?;
        // SAFETY: nothing has been allocated in this context yet. Ordering is the callers' business (graphs, streams);
        // cudarc's per-slice events would break captures.
        unsafe { context.disable_event_tracking() };
        let sms = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(driver("asking for multiprocessors"))?;
        Ok(Self {
            context,
            cache,
            sms: sms as u32,
            loaded: Mutex::default(),
        })
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Number of multiprocessors.
    pub fn sms(&self) -> u32 {
        self.sms
    }

    /// Compiles (or reads from the cache) and loads every program.
    pub fn load_all(&self) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        for program in Program::ALL {
            self.module(&mut loaded, program.name)?;
        }
        Ok(())
    }

    /// Kernel `name` of program `program`, allowed all the shared memory a block can have.
    pub(super) fn function(
        &self,
        program: &'static str,
        name: &'static str,
    ) -> Result<sys::CUfunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(function) = loaded.functions.get(name) {
            return Ok(function.0);
        }
        let module = self.module(&mut loaded, program)?;
        let c_name = CString::new(name).expect("kernel names hold no zero bytes");
        let what = || format!("loading kernel {name}");
        // SAFETY: the module stays loaded as long as the process: handles are never unloaded.
        let function =
            unsafe { result::module::get_function(module, c_name) }.map_err(|source| {
                Error::Driver {
                    what: what(),
                    source,
                }
            })?;
        // SAFETY: a valid function of this context.
        unsafe {
            sys::cuFuncSetAttribute(
                function,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                SHARED_LIMIT as i32 - static_shared(function),
            )
        }
        .result()
        .map_err(|source| Error::Driver {
            what: what(),
            source,
        })?;
        loaded.functions.insert(name, Handle(function));
        Ok(function)
    }

    fn module(&self, loaded: &mut Loaded, program: &'static str) -> Result<sys::CUmodule> {
        if let Some(module) = loaded.modules.get(program) {
            return Ok(module.0);
        }
        let source = Program::find(program).expect("launchers name programs of the list");
        let code = compile(source, self.cache.as_deref())?;
        self.context
            .bind_to_thread()
            .map_err(driver("binding the context"))?;
        // SAFETY: `code` is an ELF image from NVRTC; the driver copies it.
        let module =
            unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(|source| {
                Error::Driver {
                    what: format!("loading program {program}"),
                    source,
                }
            })?;
        loaded.modules.insert(program, Handle(module));
        Ok(module)
    }
}

fn static_shared(function: sys::CUfunction) -> i32 {
    // SAFETY: a valid function; on failure assume the most that a kernel here declares.
    unsafe {
        result::function::get_function_attribute(
            function,
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
        )
    }
    .unwrap_or(48 * 1024)
}

/// Wraps a driver error with what was being done.
pub(super) fn driver(what: &'static str) -> impl FnOnce(DriverError) -> Error {
    move |source| Error::Driver {
        what: what.to_owned(),
        source,
    }
}
