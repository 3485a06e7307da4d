//! The next token from logits, greedy or top-p (`sampling.cu`).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::{Gpu, Launch, Result, Span, require};

/// How each row is sampled, all `[rows]` on the device.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// 0: the largest logit, lowest index first.
    pub temperature: Span<f32>,
    /// Mass of the nucleus, in (0, 1].
    pub top_p: Span<f32>,
    /// The random point, in [0, 1).
    pub uniform: Span<f32>,
}

/// The kernel's `SampleArgs`.
#[repr(C)]
struct Args {
    logits: u64,
    temperature: u64,
    top_p: u64,
    uniform: u64,
    out: u64,
    vocab: u32,
    ld: u32,
}

/// Samples `rows` of `logits` (pitch `ld`) to `out`; -1 where a logit is NaN.
pub fn sample(
    gpu: &Gpu,
    stream: &CudaStream,
    logits: Span<f32>,
    rows: usize,
    vocab: usize,
    ld: usize,
    choice: Choice,
    out: Span<i32>,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "sample";
    let fits = vocab > 0
        && ld >= vocab
        && (rows == 0 || logits.len() >= (rows - 1) * ld + vocab)
        && [choice.temperature, choice.top_p, choice.uniform]
            .iter()
            .all(|c| c.len() >= rows)
        && out.len() >= rows;
    require(KERNEL, fits, || {
        format!(
            "{} logits, {choice:?} for {rows} x {vocab} at {ld}",
            logits.len()
        )
    })?;
    let args = Args {
        logits: logits.address(),
        temperature: choice.temperature.address(),
        top_p: choice.top_p.address(),
        uniform: choice.uniform.address(),
        out: out.address(),
        vocab: vocab as u32,
        ld: ld as u32,
    };
    // SAFETY: sample(SampleArgs).
    unsafe {
        Launch::new(rows as u32, 1024, overlap).run(
            gpu,
            stream,
            "sampling",
            KERNEL,
            arguments![args],
        )
    }
}
