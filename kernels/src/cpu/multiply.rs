//! Weights in the form of either path, and the products with them.

use std::ops::Range;

use super::fast::{CHUNK, Packed, Part, Row, products};
use super::simd::Isa;
use super::views::{Acts, shape};
use super::weights::Matrix;
use super::{Stream, reference};
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
    /// The rows of all parts, in the form of `precision`, for the fast path where `isa` says so.
    pub(super) fn new(
        op: &'static str,
        parts: &[HostMatrix<'_>],
        precision: Precision,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let matrix = Matrix::new(op, parts, precision)?;
        match isa {
            None => Ok(Self::Plain(matrix)),
            Some(isa) => Ok(Self::Packed(Packed::new(&matrix, isa)?)),
        }
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
    let Stream { pool, isa, inputs } = stream;
    if isa.is_some() {
        prepare(x, x_row, groups, inputs);
    }
    // From here on outputs are reached through this pointer alone.
    let (start, len) = (out.as_mut_ptr(), out.len());
    let mut rows = Vec::new();
    let mut parts = Vec::with_capacity(groups.len());
    for group in groups.iter().filter(|g| !g.rows.is_empty()) {
        let end = (group.rows.end - 1) * stride + group.out_first + group.weight.rows();
        assert!(end <= len);
        match (group.weight, *isa) {
            (Weights::Packed(weight), Some(_)) => {
                let first = rows.len();
                for i in group.rows.clone() {
                    let (x, scales) = input(x, x_row(i), group, inputs, rows.len());
                    // SAFETY: inside the output (assert above).
                    let out = unsafe { start.add(i * stride + group.out_first) };
                    rows.push(Row { x, scales, out });
                }
                let rows = first..rows.len();
                parts.push(Part { weight, rows });
            }
            (Weights::Plain(weight), None) => {
                let at = group.rows.start * stride + group.out_first;
                // SAFETY: inside the output (assert above), and the only way to it here.
                let out = unsafe { std::slice::from_raw_parts_mut(start.add(at), end - at) };
                let row = |i| x_row(group.rows.start + i);
                reference::matmul(
                    x,
                    group.x_first,
                    &row,
                    weight,
                    group.rows.len(),
                    out,
                    stride,
                );
            }
            _ => return shape(op, "weights of another backend"),
        }
    }
    if let Some(isa) = *isa {
        // SAFETY: `input` gives inputs and scales of the weights' sizes; outputs are inside, and disjoint by contract.
        unsafe { products(pool, isa, &rows, &parts) };
    }
    Ok(())
}

/// Fills `inputs` where rows cannot be read in place: FP8 as float32, or padded with zeros to whole chunks.
fn prepare(
    x: Acts<'_>,
    x_row: &dyn Fn(usize) -> usize,
    groups: &[Group<'_>],
    inputs: &mut Vec<f32>,
) {
    let cols = groups.first().map_or(0, |g| g.weight.cols());
    let padded = cols.next_multiple_of(CHUNK);
    inputs.clear();
    match x {
        Acts::Quantised { data, .. } => {
            for row in data.chunks_exact(cols.max(1)) {
                inputs.extend(row.iter().map(|byte| fp8::decode(*byte)));
                inputs.resize(inputs.len() + padded - cols, 0.0);
            }
        }
        Acts::Plain(rows) if padded != cols => {
            for group in groups {
                for i in group.rows.clone() {
                    inputs.extend(&rows.row(x_row(i))[group.x_first..][..cols]);
                    inputs.resize(inputs.len() + padded - cols, 0.0);
                }
            }
        }
        Acts::Plain(_) => {}
    }
}

/// Inputs and scales of row `t` of `x`, which is the `n`th row of all groups.
fn input(
    x: Acts<'_>,
    t: usize,
    group: &Group<'_>,
    inputs: &[f32],
    n: usize,
) -> (*const f32, *const f32) {
    let cols = group.weight.cols();
    let padded = cols.next_multiple_of(CHUNK);
    match x {
        Acts::Quantised { scales, .. } => {
            let blocks = cols.div_ceil(fp8::BLOCK);
            (
                inputs[t * padded..][..padded].as_ptr(),
                scales[t * blocks..][..blocks].as_ptr(),
            )
        }
        Acts::Plain(_) if padded != cols => {
            (inputs[n * padded..][..padded].as_ptr(), std::ptr::null())
        }
        Acts::Plain(rows) => (
            rows.row(t)[group.x_first..][..cols].as_ptr(),
            std::ptr::null(),
        ),
    }
}
