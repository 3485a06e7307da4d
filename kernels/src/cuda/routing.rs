//! The gate's choice (experts a multiple of 32 up to 256, groups a power of two up to 32, top-k up to 32), the order of token
//! copies by slot, and moving rows there and back (`routing.cu`).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::{Gpu, Launch, Result, Span, require};
pub use crate::backend::GateShape;

const PROGRAM: &str = "routing";

/// The kernel's `GateArgs`.
#[repr(C)]
struct GateArgs {
    logits: u64,
    bias: u64,
    experts_out: u64,
    weights: u64,
    counts: u64,
    tokens: u32,
    experts: u32,
    groups: u32,
    top_groups: u32,
    top_k: u32,
    scale: f32,
    normalise: u32,
}

/// Chooses experts from `logits` `[tokens][experts]`: sigmoid scores; `bias` added for the selection only; dropped groups are
/// -inf; ties to the lowest index. Adds the choices to `counts` `[experts]`.
pub fn gate(
    gpu: &Gpu,
    stream: &CudaStream,
    shape: GateShape,
    logits: Span<f32>,
    bias: Span<f32>,
    tokens: usize,
    (chosen, weights): (Span<i32>, Span<f32>),
    counts: Span<i32>,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "gate";
    let GateShape {
        experts,
        groups,
        top_groups,
        top_k,
        ..
    } = shape;
    let possible = experts.is_multiple_of(32)
        && (32..=256).contains(&experts)
        && groups.is_power_of_two()
        && groups <= 32
        && (1..=groups).contains(&top_groups)
        && (1..=32).contains(&top_k)
        && top_k <= experts / groups * top_groups;
    require(KERNEL, possible, || format!("{shape:?}"))?;
    let fits = logits.len() >= tokens * experts
        && bias.len() >= experts
        && counts.len() >= experts
        && chosen.len() >= tokens * top_k
        && weights.len() >= tokens * top_k;
    require(KERNEL, fits, || {
        format!("{} logits for {tokens} tokens, {shape:?}", logits.len())
    })?;
    let args = GateArgs {
        logits: logits.address(),
        bias: bias.address(),
        experts_out: chosen.address(),
        weights: weights.address(),
        counts: counts.address(),
        tokens: tokens as u32,
        experts: experts as u32,
        groups: groups as u32,
        top_groups: top_groups as u32,
        top_k: top_k as u32,
        scale: shape.scale,
        normalise: u32::from(shape.normalise),
    };
    // A warp a token: one a block while there are multiprocessors for that.
    let warps = if tokens <= 2 * gpu.sms() as usize {
        1
    } else {
        4
    };
    // SAFETY: gate(GateArgs).
    unsafe {
        Launch::new(tokens.div_ceil(warps) as u32, 32 * warps as u32, overlap).run(
            gpu,
            stream,
            PROGRAM,
            KERNEL,
            arguments![args],
        )
    }
}

/// Token copies in the order of the slots that compute them.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// `[slots + 1]`: rows of slot i are `offsets[i]..offsets[i + 1]`.
    pub offsets: Span<i32>,
    /// `[copies]`: the copy behind each row.
    pub copy_of_row: Span<i32>,
    /// `[copies]`: the row of each copy.
    pub row_of_copy: Span<i32>,
}

/// The kernel's `DispatchArgs`.
#[repr(C)]
struct DispatchArgs {
    experts: u64,
    slot_of_expert: u64,
    offsets: u64,
    copy_of_row: u64,
    row_of_copy: u64,
    copies: u32,
    top_k: u32,
    table_width: u32,
    slots: u32,
}

/// Sorts the copies of `chosen` `[tokens][top_k]` by slot, in their own order inside a slot. `table` `[experts][table_width]`:
/// number of slots of the expert, then the slots; token t takes number `t % slots`.
pub fn dispatch(
    gpu: &Gpu,
    stream: &CudaStream,
    chosen: Span<i32>,
    tokens: usize,
    top_k: usize,
    (table, table_width): (Span<i32>, usize),
    slots: usize,
    order: Order,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "dispatch";
    let copies = tokens * top_k;
    let fits = table_width >= 2
        && chosen.len() >= copies
        && order.offsets.len() > slots
        && order.copy_of_row.len() >= copies
        && order.row_of_copy.len() >= copies;
    require(KERNEL, fits, || {
        format!("{order:?} for {tokens} x {top_k} copies, {slots} slots")
    })?;
    let args = DispatchArgs {
        experts: chosen.address(),
        slot_of_expert: table.address(),
        offsets: order.offsets.address(),
        copy_of_row: order.copy_of_row.address(),
        row_of_copy: order.row_of_copy.address(),
        copies: copies as u32,
        top_k: top_k as u32,
        table_width: table_width as u32,
        slots: slots as u32,
    };
    // SAFETY: dispatch(DispatchArgs).
    unsafe {
        Launch::new(slots as u32, 256, overlap).run(gpu, stream, PROGRAM, KERNEL, arguments![args])
    }
}

/// The kernel's `PermuteArgs`.
#[repr(C)]
struct PermuteArgs {
    from: u64,
    scales: u64,
    copy_of_row: u64,
    to: u64,
    scales_to: u64,
    cols: u32,
    ld_from: u32,
    ld_to: u32,
    top_k: u32,
}

/// Quantised rows: E4M3 `[rows][cols]`, scales `[cols / 128][ld]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// E4M3 values.
    pub data: Span<u8>,
    /// Scales, rows innermost.
    pub scales: Span<f32>,
    /// Distance of two scales of a row.
    pub ld: usize,
}

/// Copies to row r of `to` the token `copy_of_row[r] / top_k` of `from`.
pub fn permute(
    gpu: &Gpu,
    stream: &CudaStream,
    from: Rows,
    copy_of_row: Span<i32>,
    copies: usize,
    top_k: usize,
    cols: usize,
    to: Rows,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "permute";
    let fits = cols.is_multiple_of(128)
        && top_k > 0
        && from.data.len() >= copies / top_k * cols
        && to.data.len() >= copies * cols
        && to.ld >= copies
        && to.scales.len() >= cols / 128 * to.ld
        && from.scales.len() >= cols / 128 * from.ld
        && copy_of_row.len() >= copies;
    require(KERNEL, fits, || {
        format!("{from:?} to {to:?}, {copies} copies of {cols}")
    })?;
    let args = PermuteArgs {
        from: from.data.address(),
        scales: from.scales.address(),
        copy_of_row: copy_of_row.address(),
        to: to.data.address(),
        scales_to: to.scales.address(),
        cols: cols as u32,
        ld_from: from.ld as u32,
        ld_to: to.ld as u32,
        top_k: top_k as u32,
    };
    // SAFETY: permute(PermuteArgs).
    unsafe {
        Launch::new(copies as u32, 256, overlap).run(gpu, stream, PROGRAM, KERNEL, arguments![args])
    }
}

/// The kernel's `CombineArgs`.
#[repr(C)]
struct CombineArgs {
    y: u64,
    weights: u64,
    row_of_copy: u64,
    shared: u64,
    out: u64,
    cols: u32,
    top_k: u32,
}

/// `out[t] = sum over k in order of weights[t][k] * y[row_of_copy[t][k]], + shared[t]`; all BF16, sums in float32.
pub fn combine(
    gpu: &Gpu,
    stream: &CudaStream,
    y: Span<u16>,
    weights: Span<f32>,
    row_of_copy: Span<i32>,
    shared: Option<Span<u16>>,
    tokens: usize,
    top_k: usize,
    cols: usize,
    out: Span<u16>,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "combine";
    let fits = cols.is_multiple_of(8)
        && y.len() >= tokens * top_k * cols
        && weights.len() >= tokens * top_k
        && row_of_copy.len() >= tokens * top_k
        && shared.is_none_or(|s| s.len() >= tokens * cols)
        && out.len() >= tokens * cols
        && tokens <= 65_535;
    require(KERNEL, fits, || {
        format!("{} values for {tokens} x {top_k} x {cols}", y.len())
    })?;
    let args = CombineArgs {
        y: y.address(),
        weights: weights.address(),
        row_of_copy: row_of_copy.address(),
        shared: shared.map_or(0, Span::address),
        out: out.address(),
        cols: cols as u32,
        top_k: top_k as u32,
    };
    let launch = Launch {
        grid: [(cols / 8).div_ceil(256) as u32, tokens as u32, 1],
        ..Launch::new(1, 256, overlap)
    };
    // SAFETY: combine(CombineArgs).
    unsafe { launch.run(gpu, stream, PROGRAM, KERNEL, arguments![args]) }
}
