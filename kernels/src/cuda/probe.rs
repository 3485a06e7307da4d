//! Launchers of `probe.cu`: contents, digests, the copy ruler and the clock, for testing and timing kernels.

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::{Gpu, Launch, Result, Span};

/// Random contents that [`fill`] makes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// BF16, about normal with the given deviation.
    Bf16Normal,
    /// E4M3, about normal with the given deviation.
    Fp8Normal,
    /// F32 between half and one and a half times the given value.
    F32Scale,
    /// F32, about normal with the given deviation.
    F32Normal,
}

/// Fills `len` elements at the start of `out`.
pub fn fill<T>(
    gpu: &Gpu,
    stream: &CudaStream,
    out: Span<T>,
    kind: Kind,
    scale: f32,
    seed: u64,
) -> Result<()> {
    let (address, len, kind) = (out.address(), out.len() as u64, kind as u32);
    // SAFETY: fill(u8*, u64, u32, float, u64).
    unsafe {
        Launch::new(gpu.sms() * 8, 256, false).run(
            gpu,
            stream,
            "probe",
            "fill",
            arguments![address, len, kind, scale, seed],
        )
    }
}

/// Adds a digest of `words` to `result[0]`.
pub fn digest(gpu: &Gpu, stream: &CudaStream, words: Span<u32>, result: Span<u64>) -> Result<()> {
    let (from, len, to) = (words.address(), words.len() as u64, result.address());
    // SAFETY: digest(const u32*, u64, u64*).
    unsafe {
        Launch::new(gpu.sms() * 8, 256, false).run(
            gpu,
            stream,
            "probe",
            "digest",
            arguments![from, len, to],
        )
    }
}

/// Copies `from` to `to` on the multiprocessors (16-byte words).
pub fn copy(gpu: &Gpu, stream: &CudaStream, from: Span<u8>, to: Span<u8>) -> Result<()> {
    let (source, target, len) = (
        from.address(),
        to.address(),
        (from.len().min(to.len()) / 16) as u64,
    );
    // SAFETY: copy(const uint4*, uint4*, u64).
    unsafe {
        Launch::new(gpu.sms() * 4, 512, false).run(
            gpu,
            stream,
            "probe",
            "copy",
            arguments![source, target, len],
        )
    }
}

/// Writes cycles and nanoseconds of a 20 us wait to `result[0..2]`.
pub fn clock_rate(gpu: &Gpu, stream: &CudaStream, result: Span<u64>) -> Result<()> {
    let to = result.address();
    // SAFETY: clock_rate(u64*).
    unsafe { Launch::new(1, 1, false).run(gpu, stream, "probe", "clock_rate", arguments![to]) }
}
