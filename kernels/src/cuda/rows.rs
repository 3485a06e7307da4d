//! Moving whole rows by index: embedding, the rows that need logits and back (`pointwise.cu`).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::{Gpu, Launch, Result, Span, require};

/// The kernel's `RowArgs`.
#[repr(C)]
struct RowArgs {
    from: u64,
    to: u64,
    index: u64,
    words: u32,
    limit: u32,
}

/// `to[i] = from[index[i]]` for rows of `row_bytes`, a multiple of 16: embedding, rows that need logits. An index outside `from`
/// leaves its row alone.
pub fn gather(
    gpu: &Gpu,
    stream: &CudaStream,
    from: Span<u8>,
    to: Span<u8>,
    index: Span<i32>,
    rows: usize,
    row_bytes: usize,
    overlap: bool,
) -> Result<()> {
    move_rows(
        gpu,
        stream,
        "gather_rows",
        (from, to),
        from.len(),
        to.len(),
        index,
        rows,
        row_bytes,
        overlap,
    )
}

/// `to[index[i]] = from[i]`, the inverse of [`gather`].
pub fn scatter(
    gpu: &Gpu,
    stream: &CudaStream,
    from: Span<u8>,
    to: Span<u8>,
    index: Span<i32>,
    rows: usize,
    row_bytes: usize,
    overlap: bool,
) -> Result<()> {
    move_rows(
        gpu,
        stream,
        "scatter_rows",
        (from, to),
        to.len(),
        from.len(),
        index,
        rows,
        row_bytes,
        overlap,
    )
}

fn move_rows(
    gpu: &Gpu,
    stream: &CudaStream,
    kernel: &'static str,
    (from, to): (Span<u8>, Span<u8>),
    indexed_bytes: usize,
    other_bytes: usize,
    index: Span<i32>,
    rows: usize,
    row_bytes: usize,
    overlap: bool,
) -> Result<()> {
    let fits = row_bytes > 0
        && row_bytes.is_multiple_of(16)
        && other_bytes >= rows * row_bytes
        && index.len() >= rows;
    require(kernel, fits, || {
        format!(
            "{other_bytes} bytes, {} indices for {rows} rows of {row_bytes}",
            index.len()
        )
    })?;
    let args = RowArgs {
        from: from.address(),
        to: to.address(),
        index: index.address(),
        words: (row_bytes / 16) as u32,
        limit: (indexed_bytes / row_bytes) as u32,
    };
    // SAFETY: kernel(RowArgs).
    unsafe {
        Launch::new(rows as u32, 256, overlap).run(
            gpu,
            stream,
            "pointwise",
            kernel,
            arguments![args],
        )
    }
}
