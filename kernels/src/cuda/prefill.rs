//! MLA prefill in the expanded form (`mla_prefill.cu`).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::tensor_map::{Element, tensor_map};
use super::{Gpu, Launch, Result, Span, require};

/// Columns of a head's query: its own 128 and 64 rotated ones.
pub const QUERY: usize = 192;
/// Columns of a head in the up-projected cache: 128 of the key, 128 of the value.
pub const KEY_VALUE: usize = 256;
/// Columns of the rope key.
pub const ROPE: usize = 64;
/// Columns of a head's output.
pub const VALUE: usize = 128;

/// Sequences of a step. Query `i` of sequence `s` is its context's token `context - queries + i` and sees up to itself.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Sequences.
    pub sequences: usize,
    /// Rows of queries over all sequences.
    pub rows: usize,
    /// Rows of context over all sequences.
    pub context: usize,
    /// Most queries of one sequence.
    pub max_query: usize,
    /// Query heads on this device.
    pub heads: usize,
}

/// Inputs, BF16.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[rows][heads][192]`.
    pub q: Span<u16>,
    /// `[context][heads][256]`: the up-projection's output.
    pub kv: Span<u16>,
    /// `[context][64]`: rotated rope keys.
    pub rope: Span<u16>,
    /// `[sequences + 1]`: first row of `q` of each sequence.
    pub query_start: Span<i32>,
    /// `[sequences + 1]`: first row of `kv` of each sequence.
    pub context_start: Span<i32>,
}

/// The kernel's `PrefillArgs`.
#[repr(C)]
struct Args {
    query_start: u64,
    context_start: u64,
    out: u64,
    lse: u64,
    heads: u32,
    scale: f32,
}

/// Attention to `out` `[rows][heads][128]` BF16 and, where asked for, the log-sum-exp of the scores `[rows][heads]`, by which
/// results over parts of a context are merged. `scale` multiplies the scores.
pub fn attend(
    gpu: &Gpu,
    stream: &CudaStream,
    shape: Shape,
    inputs: Inputs,
    scale: f32,
    out: Span<u16>,
    lse: Option<Span<f32>>,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "mla_prefill";
    let Shape {
        sequences,
        rows,
        context,
        max_query,
        heads,
    } = shape;
    let fits = inputs.q.len() >= rows * heads * QUERY
        && inputs.kv.len() >= context * heads * KEY_VALUE
        && inputs.rope.len() >= context * ROPE
        && inputs.query_start.len() > sequences
        && inputs.context_start.len() > sequences
        && out.len() >= rows * heads * VALUE
        && lse.is_none_or(|lse| lse.len() >= rows * heads);
    require(
        KERNEL,
        fits && sequences <= 65_535 && heads <= 65_535,
        || format!("{inputs:?}, output of {} for {shape:?}", out.len()),
    )?;
    if rows == 0 || context == 0 {
        return Ok(());
    }
    let map = |data: Span<u16>, cols: usize, rows: usize| {
        tensor_map(
            KERNEL,
            Element::Bf16,
            data.address(),
            &[cols as u64, rows as u64],
            &[2 * cols as u64],
            &[64, 128],
        )
    };
    let q_map = map(inputs.q, heads * QUERY, rows)?;
    let kv_map = map(inputs.kv, heads * KEY_VALUE, context)?;
    let rope_map = map(inputs.rope, ROPE, context)?;
    let args = Args {
        query_start: inputs.query_start.address(),
        context_start: inputs.context_start.address(),
        out: out.address(),
        lse: lse.map_or(0, Span::address),
        heads: heads as u32,
        scale: scale * std::f32::consts::LOG2_E,
    };
    let launch = Launch {
        grid: [
            max_query.div_ceil(128) as u32,
            heads as u32,
            sequences as u32,
        ],
        // Q, two K and two V tiles, nine barriers, a token.
        shared_bytes: (3 + 2 * 3 + 2 * 2) * 16_384 + 9 * 8 + 8,
        ..Launch::new(1, 384, overlap)
    };
    // SAFETY: mla_prefill(TensorMap, TensorMap, TensorMap, PrefillArgs).
    unsafe {
        launch.run(
            gpu,
            stream,
            KERNEL,
            KERNEL,
            arguments![q_map, kv_map, rope_map, args],
        )
    }
}
