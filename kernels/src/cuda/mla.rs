//! MLA decode over the paged latent cache: plan (`mla_plan.cu`), attention (`mla_decode.cu`), combine (`mla_combine.cu`).
//!
//! [`plan`] runs once per step; [`decode`] once per layer. Both read lengths and block tables on the device.

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::tensor_map::{Element, tensor_map};
use super::{Gpu, Launch, Result, Span, require};

/// Latent values that are key and value.
pub const LATENT: usize = 512;
/// Latent and rope values of a cached token.
pub const WIDTH: usize = 576;
/// Tokens of a cache block.
pub const BLOCK: usize = 64;
/// Most pieces one sequence can be cut into.
const MAX_PARTS: usize = 160;

/// Shape of a decode step.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Query tokens of each sequence (the last ones of its cached tokens), 1 to 4.
    pub queries: usize,
    /// Query heads on this device.
    pub heads: usize,
    /// Entries of a row of the block table.
    pub max_blocks: usize,
}

impl Shape {
    fn rows(self) -> usize {
        self.queries * self.heads
    }

    fn row_tiles(self) -> usize {
        self.rows().div_ceil(64)
    }

    /// Runs of blocks the work is cut into.
    fn parts(self, sms: u32) -> usize {
        (sms as usize / self.row_tiles()).clamp(1, MAX_PARTS)
    }

    /// Elements of [`Workspace::parts`].
    pub fn parts_len(self, sms: u32) -> usize {
        self.parts(sms) * 8
    }

    /// Elements of [`Workspace::pieces`].
    pub fn pieces_len(self) -> usize {
        self.batch + 1
    }

    /// Elements of [`Workspace::rows`].
    pub fn rows_len(self, sms: u32) -> usize {
        // Fewer than `parts` sequences are split, and a sequence has no more units than halves of rows.
        4 * (1 + self.parts(sms) * self.rows() * 2)
    }

    /// Rows of partial results, of which [`Workspace::partial`] has [`LATENT`] elements each and [`Workspace::sums`] 4.
    pub fn partial_rows(self, sms: u32) -> usize {
        (self.batch + self.parts(sms)) * self.row_tiles() * 64
    }
}

/// Device memory that the kernels use between them.
#[derive(Clone, Copy, Debug)]
pub struct Workspace {
    /// The plan's runs.
    pub parts: Span<i32>,
    /// The plan's pieces of each sequence.
    pub pieces: Span<i32>,
    /// The plan's rows that lie in several pieces.
    pub rows: Span<i32>,
    /// Partial outputs, FP16.
    pub partial: Span<u16>,
    /// Their log-sum-exps and magnitudes.
    pub sums: Span<f32>,
}

/// The paged cache, `[blocks][layers][64][576]` BF16, and where this step's sequences lie in it.
#[derive(Clone, Copy, Debug)]
pub struct Cache {
    /// The cache.
    pub data: Span<u16>,
    /// Blocks.
    pub blocks: usize,
    /// Layers of a block.
    pub layers: usize,
    /// The layer to read.
    pub layer: usize,
    /// `[batch]`: cached tokens of each sequence, this step's included.
    pub lengths: Span<i32>,
    /// `[batch][max_blocks]`.
    pub block_table: Span<i32>,
}

/// The kernel's `MlaArgs`.
#[repr(C)]
struct Args {
    lengths: u64,
    block_table: u64,
    parts: u64,
    pieces: u64,
    rows: u64,
    out: u64,
    partial: u64,
    sums: u64,
    batch: u32,
    queries: u32,
    heads: u32,
    max_blocks: u32,
    layer: u32,
    scale: f32,
}

/// Cuts the step's work into runs. `lengths` and `block_table` as in [`Cache`].
pub fn plan(
    gpu: &Gpu,
    stream: &CudaStream,
    shape: Shape,
    lengths: Span<i32>,
    block_table: Span<i32>,
    work: Workspace,
    overlap: bool,
) -> Result<()> {
    let parts = shape.parts(gpu.sms());
    require(
        "mla_plan",
        lengths.len() >= shape.batch && shape.batch > 0 && shape.batch <= 8192,
        || format!("{} lengths for {shape:?}", lengths.len()),
    )?;
    require(
        "mla_plan",
        block_table.len() >= shape.batch * shape.max_blocks,
        || {
            format!(
                "{} entries of the block table for {shape:?}",
                block_table.len()
            )
        },
    )?;
    check_workspace("mla_plan", gpu, shape, work)?;
    let (from, table) = (lengths.address(), block_table.address());
    let (max_blocks, batch) = (shape.max_blocks as u32, shape.batch as u32);
    let (count, rows) = (parts as u32, shape.rows() as u32);
    let (to, pieces) = (work.parts.address(), work.pieces.address());
    let combine = work.rows.address();
    let launch = Launch {
        shared_bytes: shape.batch * 4,
        ..Launch::new(1, 1024, overlap)
    };
    // SAFETY: mla_plan(const int*, const int*, u32, u32, u32, u32, Part*, int*, int*).
    unsafe {
        launch.run(
            gpu,
            stream,
            "mla_plan",
            "mla_plan",
            arguments![
                from, table, max_blocks, batch, count, rows, to, pieces, combine
            ],
        )
    }
}

/// Attention of `q` `[batch][queries][heads][576]` BF16 to `out` `[batch][queries][heads][512]` BF16. `scale` multiplies the
/// scores. Rows of sequences of length 0 are left alone.
///
/// With `overlap` the plan, the lengths and cache blocks without tokens of this step are read while the kernel in front of
/// this one ends: they must be older than that one.
pub fn decode(
    gpu: &Gpu,
    stream: &CudaStream,
    shape: Shape,
    q: Span<u16>,
    cache: Cache,
    scale: f32,
    work: Workspace,
    out: Span<u16>,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "mla_decode";
    let rows = shape.batch * shape.rows();
    require(
        KERNEL,
        (1..=4).contains(&shape.queries) && shape.heads > 0 && shape.batch > 0,
        || format!("{shape:?}"),
    )?;
    require(
        KERNEL,
        q.len() >= rows * WIDTH && out.len() >= rows * LATENT,
        || format!("{} queries, {} outputs for {shape:?}", q.len(), out.len()),
    )?;
    require(
        KERNEL,
        cache.layer < cache.layers
            && cache.data.len() >= cache.blocks * cache.layers * BLOCK * WIDTH,
        || format!("{cache:?}"),
    )?;
    require(
        KERNEL,
        cache.lengths.len() >= shape.batch
            && cache.block_table.len() >= shape.batch * shape.max_blocks,
        || format!("{cache:?} for {shape:?}"),
    )?;
    check_workspace(KERNEL, gpu, shape, work)?;
    let pitch = (WIDTH * 2) as u64;
    let q_map = tensor_map(
        KERNEL,
        Element::Bf16,
        q.address(),
        &[WIDTH as u64, rows as u64],
        &[pitch],
        &[64, 64],
    )?;
    let page = pitch * BLOCK as u64;
    let kv_map = tensor_map(
        KERNEL,
        Element::Bf16,
        cache.data.address(),
        &[
            WIDTH as u64,
            BLOCK as u64,
            cache.layers as u64,
            cache.blocks as u64,
        ],
        &[pitch, page, page * cache.layers as u64],
        &[64, 64, 1, 1],
    )?;
    let args = Args {
        lengths: cache.lengths.address(),
        block_table: cache.block_table.address(),
        parts: work.parts.address(),
        pieces: work.pieces.address(),
        rows: work.rows.address(),
        out: out.address(),
        partial: work.partial.address(),
        sums: work.sums.address(),
        batch: shape.batch as u32,
        queries: shape.queries as u32,
        heads: shape.heads as u32,
        max_blocks: shape.max_blocks as u32,
        layer: cache.layer as u32,
        scale: scale * std::f32::consts::LOG2_E,
    };
    let launch = Launch {
        // Q, two K blocks, 24 barriers, four exchanges of 64 floats.
        shared_bytes: 3 * 9 * 8192 + 24 * 8 + 4 * 64 * 4,
        ..Launch::new(
            (shape.row_tiles() * shape.parts(gpu.sms())) as u32,
            384,
            overlap,
        )
    };
    // SAFETY: mla_decode(TensorMap, TensorMap, MlaArgs).
    unsafe {
        launch.run(
            gpu,
            stream,
            "mla_decode",
            KERNEL,
            arguments![q_map, kv_map, args],
        )
    }?;
    let blocks = (2 * rows).min(gpu.sms() as usize * 4) as u32;
    // SAFETY: mla_combine(MlaArgs).
    unsafe {
        Launch::new(blocks, 512, overlap).run(
            gpu,
            stream,
            "mla_combine",
            "mla_combine",
            arguments![args],
        )
    }
}

fn check_workspace(kernel: &'static str, gpu: &Gpu, shape: Shape, work: Workspace) -> Result<()> {
    let partial = shape.partial_rows(gpu.sms());
    let fits = work.parts.len() >= shape.parts_len(gpu.sms())
        && work.pieces.len() >= shape.pieces_len()
        && work.rows.len() >= shape.rows_len(gpu.sms())
        && work.sums.len() >= partial * 4
        && work.partial.len() >= partial * LATENT;
    require(kernel, fits, || {
        format!("{work:?} is too small for {shape:?}")
    })
}
