//! Weights in the form of either path, and the products with them.

use std::ops::Range;

use super::fast::{self, CHUNK, Packed, Part, Row};
use super::views::{Acts, shape};
use super::weights::Matrix;
use super::{Cpu, Stream, reference};
use crate::backend::{HostMatrix, Precision, Result};
use crate::fp8;

/// Weights of one matrix.
#[derive(Debug)]
pub(super) enum Weights {
    /// For the reference.
    Plain(Matrix),
    /// For the fast path.
    Packed(Packed),
}

impl Weights {
    /// The rows of all parts, in the form of `precision`, for the path of `cpu`.
    pub(super) fn new(
        op: &'static str,
        parts: &[HostMatrix<'_>],
        precision: Precision,
        cpu: &Cpu,
    ) -> Result<Self> {
        let matrix = Matrix::new(op, parts, precision)?;
        match cpu.isa {
            None => Ok(Self::Plain(matrix)),
            Some(isa) => Ok(Self::Packed(Packed::new(&matrix, isa, &cpu.arena)?)),
        }
    }

    /// Whether tiles can multiply with them.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn tiles(&self) -> bool {
        matches!(self, Self::Packed(m) if m.tiles)
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Plain(m) => m.rows,
            Self::Packed(m) => m.rows,
        }
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Plain(m) => m.cols,
            Self::Packed(m) => m.cols,
        }
    }
}

/// Output rows that are products with the same weights.
pub(super) struct Group<'a> {
    pub(super) weight: &'a Weights,
    /// Rows of the output.
    pub(super) rows: Range<usize>,
    /// First column of the inputs.
    pub(super) x_first: usize,
    /// First column of the outputs.
    pub(super) out_first: usize,
}

/// `out[i] = x[x_row(i)] W^T` for the rows and columns of every group; rows of `out` are `stride` apart. Weights of all
/// groups have the same inputs.
///
/// # Errors
/// If the weights are another backend's.
///
/// # Safety
/// The groups' outputs are disjoint.
pub(super) unsafe fn multiply(
    op: &'static str,
    stream: &mut Stream,
    x: Acts<'_>,
    x_row: &dyn Fn(usize) -> usize,
    groups: &[Group<'_>],
    out: &mut [f32],
    stride: usize,
) -> Result<()> {
    // From here on outputs are reached through this pointer alone.
    let out = Outputs {
        start: out.as_mut_ptr(),
        len: out.len(),
        stride,
    };
    let Stream {
        pool, isa, inputs, ..
    } = stream;
    let Some(isa) = *isa else {
        return plain(op, x, x_row, groups, &out);
    };
    #[cfg_attr(
        not(all(target_arch = "x86_64", target_os = "linux")),
        expect(unused_mut, reason = "no tiles there")
    )]
    let mut groups: Vec<&Group<'_>> = groups.iter().collect();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        // A single row's product waits for memory; bringing weights to tiles would only delay it.
        let (many, single): (Vec<_>, Vec<_>) =
            (groups.iter()).partition(|g| g.weight.tiles() && g.rows.len() > 1);
        match x {
            _ if many.is_empty() => {}
            Acts::Quantised { data, scales, cols } => {
                let row = |group: &Group<'_>, i: usize| {
                    let (t, blocks) = (x_row(i), cols.div_ceil(fp8::BLOCK));
                    let scales = scales[t * blocks..][..blocks].as_ptr();
                    (data[t * cols..][..cols].as_ptr(), scales, out.row(group, i))
                };
                let (rows, parts) = collect(op, &many, row)?;
                // SAFETY: the weights are for tiles, `row` gives inputs and scales of their sizes; outputs are inside, and
                // disjoint by contract.
                unsafe { fast::tile_products(pool, &rows, &parts) };
                groups = single;
            }
            Acts::Plain(rows) if exact_in_bf16(rows) => {
                let row = |group: &Group<'_>, i: usize| {
                    let x = rows.row(x_row(i))[group.x_first..][..group.weight.cols()].as_ptr();
                    (x, std::ptr::null(), out.row(group, i))
                };
                let (rows, parts) = collect(op, &many, row)?;
                // SAFETY: as above.
                unsafe { fast::tile_products(pool, &rows, &parts) };
                groups = single;
            }
            Acts::Plain(_) => {}
        }
        if groups.is_empty() {
            return Ok(());
        }
    }
    let places = prepare(x, x_row, &groups, inputs);
    let mut places = places.iter();
    let row = |group: &Group<'_>, i: usize| {
        let (x, scales) = input(x, x_row(i), group, inputs, places.next());
        (x, scales, out.row(group, i))
    };
    let (rows, parts) = collect(op, &groups, row)?;
    // SAFETY: `input` gives inputs and scales of the weights' sizes; outputs are inside, and disjoint by contract.
    unsafe { fast::products(pool, isa, &rows, &parts) };
    Ok(())
}

/// Rows of outputs, `stride` apart.
struct Outputs {
    start: *mut f32,
    len: usize,
    stride: usize,
}

impl Outputs {
    /// First output of row `i` of a group.
    fn row(&self, group: &Group<'_>, i: usize) -> *mut f32 {
        let first = i * self.stride + group.out_first;
        assert!(first + group.weight.rows() <= self.len);
        // SAFETY: inside the outputs (assert above).
        unsafe { self.start.add(first) }
    }
}

/// Every group's rows (inputs, scales, outputs) and weights.
fn collect<'a, T>(
    op: &'static str,
    groups: &[&Group<'a>],
    mut row: impl FnMut(&Group<'a>, usize) -> (*const T, *const f32, *mut f32),
) -> Result<(Vec<Row<T>>, Vec<Part<'a>>)> {
    let mut rows = Vec::with_capacity(groups.iter().map(|g| g.rows.len()).sum());
    let mut parts = Vec::with_capacity(groups.len());
    for group in groups.iter().filter(|g| !g.rows.is_empty()) {
        let Weights::Packed(weight) = group.weight else {
            return shape(op, "weights of another backend");
        };
        let first = rows.len();
        rows.extend(group.rows.clone().map(|i| {
            let (x, scales, out) = row(group, i);
            Row { x, scales, out }
        }));
        let rows = first..rows.len();
        parts.push(Part { weight, rows });
    }
    Ok((rows, parts))
}

/// The reference's products.
fn plain(
    op: &'static str,
    x: Acts<'_>,
    x_row: &dyn Fn(usize) -> usize,
    groups: &[Group<'_>],
    out: &Outputs,
) -> Result<()> {
    for group in groups.iter().filter(|g| !g.rows.is_empty()) {
        let Weights::Plain(weight) = group.weight else {
            return shape(op, "weights of another backend");
        };
        let (first, last) = (group.rows.start, group.rows.end - 1);
        let len = (last - first) * out.stride + weight.rows;
        // SAFETY: `row` sees to it that first and last row are inside the outputs, and this is the only way to them here.
        let out_rows = unsafe {
            out.row(group, last);
            std::slice::from_raw_parts_mut(out.row(group, first), len)
        };
        let row = |i| x_row(first + i);
        reference::matmul(
            x,
            group.x_first,
            &row,
            weight,
            group.rows.len(),
            out_rows,
            out.stride,
        );
    }
    Ok(())
}

/// Whether all inputs are BF16 values that tiles multiply as float32 does: none so small that its products with weights
/// for tiles could be subnormal.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn exact_in_bf16(rows: super::views::Rows<'_>) -> bool {
    const SMALLEST: f32 = 1e-12;
    let exact = |x: f32| {
        x.to_bits().trailing_zeros() >= 16 && (x == 0.0 || x.abs() >= SMALLEST || x.is_nan())
    };
    // No early end inside a chunk, so that vectors do it.
    (0..rows.count).all(|t| {
        let mut chunks = rows.row(t).chunks(64);
        chunks.all(|chunk| chunk.iter().fold(true, |all, x| all & exact(*x)))
    })
}

/// Fills `inputs` where rows cannot be read in place, FP8 as float32 or padded with zeros to whole chunks, and says where
/// each of all groups' rows is.
fn prepare(
    x: Acts<'_>,
    x_row: &dyn Fn(usize) -> usize,
    groups: &[&Group<'_>],
    inputs: &mut Vec<f32>,
) -> Vec<usize> {
    let cols = groups.first().map_or(0, |g| g.weight.cols());
    let padded = cols.next_multiple_of(CHUNK);
    let rows = groups
        .iter()
        .flat_map(|g| g.rows.clone().map(|i| (*g, x_row(i))));
    inputs.clear();
    match x {
        Acts::Quantised { data, .. } => {
            // A row that several groups read is decoded once.
            let mut places = vec![None; data.len() / cols.max(1)];
            let mut place = |(_, t): (_, usize)| {
                *places[t].get_or_insert_with(|| {
                    let first = inputs.len();
                    let row = &data[t * cols..][..cols];
                    inputs.extend(row.iter().map(|byte| fp8::decode(*byte)));
                    inputs.resize(first + padded, 0.0);
                    first
                })
            };
            rows.map(&mut place).collect()
        }
        Acts::Plain(x) if padded != cols => {
            let place = |(group, t): (&Group<'_>, usize)| {
                let first = inputs.len();
                inputs.extend(&x.row(t)[group.x_first..][..cols]);
                inputs.resize(first + padded, 0.0);
                first
            };
            rows.map(place).collect()
        }
        Acts::Plain(_) => Vec::new(),
    }
}

/// Inputs and scales of row `t` of `x`; `place` is where `prepare` put it, if it did.
fn input(
    x: Acts<'_>,
    t: usize,
    group: &Group<'_>,
    inputs: &[f32],
    place: Option<&usize>,
) -> (*const f32, *const f32) {
    let cols = group.weight.cols();
    let row = match (place, x) {
        (Some(first), _) => &inputs[*first..][..cols.next_multiple_of(CHUNK)],
        (None, Acts::Plain(rows)) => &rows.row(t)[group.x_first..][..cols],
        (None, Acts::Quantised { .. }) => unreachable!("`prepare` decodes every row"),
    };
    let scales = match x {
        Acts::Quantised { scales, .. } => {
            let blocks = cols.div_ceil(fp8::BLOCK);
            scales[t * blocks..][..blocks].as_ptr()
        }
        Acts::Plain(_) => std::ptr::null(),
    };
    (row.as_ptr(), scales)
}
