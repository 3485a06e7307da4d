//! Norms, activations, quantising, rotary embedding and cache writes (`pointwise.cu`).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::{Gpu, Launch, Result, Span, require};
pub use crate::backend::ScaleFormat;

const PROGRAM: &str = "pointwise";

/// Where quantised rows go: E4M3 `[rows][cols]`, scales `[cols / 128][ld]` with `ld` at least the rows.
#[derive(Clone, Copy, Debug)]
pub struct Quantised {
    /// E4M3 values.
    pub data: Span<u8>,
    /// Scales, rows innermost.
    pub scales: Span<f32>,
    /// Distance of two scales of a row.
    pub ld: usize,
    /// Rounding of the scales.
    pub scale: ScaleFormat,
}

/// Where a row operation writes: BF16, quantised, or both.
#[derive(Clone, Copy, Debug, Default)]
pub struct Output {
    /// BF16 `[rows][cols]`.
    pub plain: Option<Span<u16>>,
    /// Quantised.
    pub quantised: Option<Quantised>,
}

impl Output {
    fn check(self, kernel: &'static str, rows: usize, cols: usize) -> Result<()> {
        let plain = self.plain.is_none_or(|p| p.len() >= rows * cols);
        let quantised = self.quantised.is_none_or(|q| {
            cols.is_multiple_of(128)
                && q.ld >= rows
                && q.data.len() >= rows * cols
                && q.scales.len() >= cols / 128 * q.ld
        });
        require(kernel, plain && quantised, || {
            format!("{self:?} for {rows} x {cols}")
        })
    }

    fn plain_address(self) -> u64 {
        self.plain.map_or(0, Span::address)
    }

    fn quantised_parts(self) -> (u64, u64, u32, u32) {
        self.quantised.map_or((0, 0, 0, 0), |q| {
            (
                q.data.address(),
                q.scales.address(),
                q.ld as u32,
                u32::from(q.scale == ScaleFormat::Ue8m0),
            )
        })
    }
}

/// The kernel's `NormArgs`.
#[repr(C)]
struct NormArgs {
    residual: u64,
    delta: u64,
    weight: u64,
    out: u64,
    quantised: u64,
    scales: u64,
    cols: u32,
    ld: u32,
    ld_scales: u32,
    power_of_two: u32,
    eps: f32,
}

/// `residual += delta` (where given), then RMSNorm of `cols` columns of each row (row pitch `ld`) times `weight`.
pub fn add_norm(
    gpu: &Gpu,
    stream: &CudaStream,
    residual: Span<u16>,
    ld: usize,
    delta: Option<Span<u16>>,
    weight: Span<f32>,
    eps: f32,
    rows: usize,
    cols: usize,
    out: Output,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "add_norm";
    require(
        KERNEL,
        cols.is_multiple_of(8) && cols <= 8192 && ld.is_multiple_of(8) && ld >= cols,
        || format!("{cols} columns at pitch {ld}: multiples of 8, at most 8192"),
    )?;
    let fits = (rows == 0 || residual.len() >= (rows - 1) * ld + cols)
        && weight.len() >= cols
        && delta.is_none_or(|d| d.len() >= rows * cols);
    require(KERNEL, fits, || {
        format!(
            "{} values, {} weights for {rows} x {cols}",
            residual.len(),
            weight.len()
        )
    })?;
    out.check(KERNEL, rows, cols)?;
    let (quantised, scales, ld_scales, power_of_two) = out.quantised_parts();
    let args = NormArgs {
        residual: residual.address(),
        delta: delta.map_or(0, Span::address),
        weight: weight.address(),
        out: out.plain_address(),
        quantised,
        scales,
        cols: cols as u32,
        ld: ld as u32,
        ld_scales,
        power_of_two,
        eps,
    };
    let threads = (cols / 8).next_multiple_of(32) as u32;
    // SAFETY: add_norm(NormArgs).
    unsafe {
        Launch::new(rows as u32, threads, overlap).run(
            gpu,
            stream,
            PROGRAM,
            KERNEL,
            arguments![args],
        )
    }
}

/// The kernel's `ActArgs`.
#[repr(C)]
struct ActArgs {
    x: u64,
    out: u64,
    quantised: u64,
    scales: u64,
    counts: u64,
    rows: u32,
    cols: u32,
    ld_scales: u32,
    group_rows: u32,
    power_of_two: u32,
}

/// Rows that masked groups use: counts on the device, and the rows of a group.
pub type Masked = (Span<i32>, usize);

/// `silu(gate) * up` of rows `[gate | up]` of `2 * cols`; of masked groups only the rows in use.
pub fn swiglu(
    gpu: &Gpu,
    stream: &CudaStream,
    gate_up: Span<u16>,
    rows: usize,
    cols: usize,
    masked: Option<Masked>,
    out: Output,
    overlap: bool,
) -> Result<()> {
    activate(
        gpu, stream, "swiglu", 2, gate_up, rows, cols, masked, out, overlap,
    )
}

/// Quantises BF16 rows.
pub fn quantise(
    gpu: &Gpu,
    stream: &CudaStream,
    x: Span<u16>,
    rows: usize,
    cols: usize,
    out: Quantised,
    overlap: bool,
) -> Result<()> {
    let out = Output {
        plain: None,
        quantised: Some(out),
    };
    activate(
        gpu, stream, "quantise", 1, x, rows, cols, None, out, overlap,
    )
}

fn activate(
    gpu: &Gpu,
    stream: &CudaStream,
    kernel: &'static str,
    inputs: usize,
    x: Span<u16>,
    rows: usize,
    cols: usize,
    masked: Option<Masked>,
    out: Output,
    overlap: bool,
) -> Result<()> {
    require(
        kernel,
        cols.is_multiple_of(8) && x.len() >= rows * cols * inputs,
        || format!("{} values for {rows} x {inputs} x {cols}", x.len()),
    )?;
    if let Some((counts, group)) = masked {
        require(
            kernel,
            group > 0 && counts.len() >= rows.div_ceil(group),
            || {
                format!(
                    "{} counts for {rows} rows in groups of {group}",
                    counts.len()
                )
            },
        )?;
    }
    out.check(kernel, rows, cols)?;
    let (quantised, scales, ld_scales, power_of_two) = out.quantised_parts();
    let args = ActArgs {
        x: x.address(),
        out: out.plain_address(),
        quantised,
        scales,
        counts: masked.map_or(0, |(counts, _)| counts.address()),
        rows: rows as u32,
        cols: cols as u32,
        ld_scales,
        group_rows: masked.map_or(1, |(_, group)| group as u32),
        power_of_two,
    };
    let threads = (cols / 8).next_multiple_of(32).min(256);
    let launch = Launch {
        grid: [
            (cols / 8).div_ceil(threads) as u32,
            rows.min(32_768) as u32,
            1,
        ],
        ..Launch::new(1, threads as u32, overlap)
    };
    // SAFETY: kernel(ActArgs).
    unsafe { launch.run(gpu, stream, PROGRAM, kernel, arguments![args]) }
}

/// A block of columns inside each head of `[rows][heads][width]`.
#[derive(Clone, Copy, Debug)]
pub struct HeadColumns {
    /// The memory.
    pub data: Span<u16>,
    /// Columns of a head.
    pub width: usize,
    /// First of the block.
    pub first: usize,
}

/// The kernel's `RopeArgs`.
#[repr(C)]
struct RopeArgs {
    q: u64,
    to: u64,
    table: u64,
    positions: u64,
    rows: u32,
    heads: u32,
    from_width: u32,
    from_column: u32,
    to_width: u32,
    to_column: u32,
    rope: u32,
}

/// Rotates `width` columns of each head by the row's position, neighbours (2i, 2i + 1) by the angle whose cosine and sine stand
/// there in `table` `[positions][width]`; in place when `to` is `from`.
pub fn rope(
    gpu: &Gpu,
    stream: &CudaStream,
    from: HeadColumns,
    to: HeadColumns,
    table: Span<f32>,
    positions: Span<i32>,
    rows: usize,
    heads: usize,
    width: usize,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "rope";
    let inside = |c: HeadColumns| {
        c.first + width <= c.width
            && (c.first | c.width).is_multiple_of(2)
            && c.data.len() >= rows * heads * c.width
    };
    require(
        KERNEL,
        inside(from) && inside(to) && width.is_multiple_of(2) && positions.len() >= rows,
        || format!("{from:?} to {to:?}, {width} columns of {rows} x {heads}"),
    )?;
    let args = RopeArgs {
        q: from.data.address(),
        to: to.data.address(),
        table: table.address(),
        positions: positions.address(),
        rows: rows as u32,
        heads: heads as u32,
        from_width: from.width as u32,
        from_column: from.first as u32,
        to_width: to.width as u32,
        to_column: to.first as u32,
        rope: width as u32,
    };
    let blocks = (rows * heads * width / 2)
        .div_ceil(256)
        .min(gpu.sms() as usize * 16);
    // SAFETY: rope(RopeArgs).
    unsafe {
        Launch::new(blocks as u32, 256, overlap).run(gpu, stream, PROGRAM, KERNEL, arguments![args])
    }
}

/// The kernel's `CacheArgs`.
#[repr(C)]
struct CacheArgs {
    kv: u64,
    weight: u64,
    table: u64,
    positions: u64,
    slots: u64,
    cache: u64,
    ld: u32,
    latent: u32,
    rope: u32,
    layers: u32,
    layer: u32,
    eps: f32,
}

/// What a cache entry is made from.
#[derive(Clone, Copy, Debug)]
pub struct CacheInputs {
    /// Rows of `latent` then `rope` values at pitch `ld`.
    pub kv: Span<u16>,
    /// Row pitch.
    pub ld: usize,
    /// Latent values.
    pub latent: usize,
    /// Rope values.
    pub rope: usize,
    /// The latent norm's weight.
    pub weight: Span<f32>,
    /// Cosines and sines, `[positions][rope]`.
    pub table: Span<f32>,
    /// `[rows]`.
    pub positions: Span<i32>,
    /// `[rows]`: `block * 64 + offset`, or -1.
    pub slots: Span<i32>,
}

/// Normalises latents, rotates rope keys, and writes both to `cache` `[blocks][layers][64][latent + rope]`.
pub fn cache_write(
    gpu: &Gpu,
    stream: &CudaStream,
    inputs: CacheInputs,
    eps: f32,
    rows: usize,
    cache: Span<u16>,
    layers: usize,
    layer: usize,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "cache_write";
    let width = inputs.latent + inputs.rope;
    let fits = (inputs.latent | inputs.rope | inputs.ld).is_multiple_of(8)
        && inputs.ld >= width
        && width <= 2048
        && (rows == 0 || inputs.kv.len() >= (rows - 1) * inputs.ld + width)
        && inputs.weight.len() >= inputs.latent
        && inputs.positions.len() >= rows
        && inputs.slots.len() >= rows
        && layer < layers
        && cache.len() >= layers * 64 * width;
    require(KERNEL, fits, || {
        format!("{inputs:?}, {rows} rows, layer {layer} of {layers}")
    })?;
    let args = CacheArgs {
        kv: inputs.kv.address(),
        weight: inputs.weight.address(),
        table: inputs.table.address(),
        positions: inputs.positions.address(),
        slots: inputs.slots.address(),
        cache: cache.address(),
        ld: inputs.ld as u32,
        latent: inputs.latent as u32,
        rope: inputs.rope as u32,
        layers: layers as u32,
        layer: layer as u32,
        eps,
    };
    let threads = (width / 8).next_multiple_of(32) as u32;
    // SAFETY: cache_write(CacheArgs).
    unsafe {
        Launch::new(rows as u32, threads, overlap).run(
            gpu,
            stream,
            PROGRAM,
            KERNEL,
            arguments![args],
        )
    }
}
