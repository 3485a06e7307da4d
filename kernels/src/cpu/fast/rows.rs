//! Operations on single rows, in vectors and, where there are many rows, on all threads.

use std::ops::Range;

use crate::backend::ScaleFormat;
use crate::cpu::pool::{Pool, Split};
use crate::cpu::reference;
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use crate::cpu::views::{Rows, Sink};
use crate::fp8;

/// Values below which a parallel region costs more than it saves.
const ALONE: usize = 1 << 14;

/// Rows of a task.
const STEP: usize = 8;

/// Runs `task` for every row, `cost` values each.
pub(super) fn each_row(pool: &mut Pool, rows: usize, cost: usize, task: &(dyn Fn(usize) + Sync)) {
    some_rows(pool, rows, cost, &|some| some.for_each(task));
}

/// Runs `task` for all rows, a few at a time, `cost` values each row.
pub(super) fn some_rows(
    pool: &mut Pool,
    rows: usize,
    cost: usize,
    task: &(dyn Fn(Range<usize>) + Sync),
) {
    pool.run(rows.div_ceil(STEP), rows * cost < ALONE, &|i| {
        task(i * STEP..rows.min((i + 1) * STEP));
    });
}

/// The vectors of a row of `len` values: where each begins, and how many values it has.
#[inline(always)]
pub(super) fn vectors(len: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len)
        .step_by(LANES)
        .map(move |i| (i, LANES.min(len - i)))
}

/// RMSNorm of a row.
struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.x.len();
        assert!(self.weight.len() == len && self.out.len() == len);
        let (x, weight) = (self.x.as_ptr(), self.weight.as_ptr());
        let out = self.out.as_mut_ptr();
        // SAFETY: three slices of `len` values.
        unsafe {
            let mut squares = S::splat(0.0);
            for (i, n) in vectors(len) {
                let x = S::load_first(x.add(i), n);
                squares = S::fma(x, x, squares);
            }
            let scale = S::splat(1.0 / (S::sum(squares) / len as f32 + self.eps).sqrt());
            for (i, n) in vectors(len) {
                let x = S::mul(S::load_first(x.add(i), n), scale);
                let y = S::mul(x, S::load_first(weight.add(i), n));
                S::store_first(out.add(i), n, y);
            }
        }
    }
}

/// RMSNorm of a row.
pub(in crate::cpu) fn norm_row(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the kernel checks its slices.
    unsafe {
        isa.run(Norm {
            x,
            weight,
            eps,
            out,
        });
    };
}

/// RMSNorm of every row.
pub(in crate::cpu) fn norm(
    pool: &mut Pool,
    isa: Isa,
    x: Rows<'_>,
    weight: &[f32],
    eps: f32,
    rows: usize,
    out: &Sink<'_>,
) {
    each_row(pool, rows, x.cols, &|t| {
        // SAFETY: one task has row `t`.
        unsafe { out.fill(t, |to| norm_row(isa, x.row(t), weight, eps, to)) };
    });
}

/// `residual += delta`, then its RMSNorm.
pub(in crate::cpu) fn add_norm(
    pool: &mut Pool,
    isa: Isa,
    residual: &mut [f32],
    delta: Option<Rows<'_>>,
    weight: &[f32],
    eps: f32,
    rows: usize,
    out: &Sink<'_>,
) {
    let hidden = weight.len();
    let residual = Split::new(residual);
    each_row(pool, rows, hidden, &|t| {
        // SAFETY: one task has row `t`.
        let row = unsafe { residual.part(t * hidden, hidden) };
        if let Some(delta) = delta {
            for (r, d) in row.iter_mut().zip(delta.row(t)) {
                *r += d;
            }
        }
        // SAFETY: one task has row `t`.
        unsafe { out.fill(t, |to| norm_row(isa, row, weight, eps, to)) };
    });
}

/// `silu(gate) * up` of a row.
struct Swiglu<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Swiglu<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.out.len();
        assert!(self.gate.len() == len && self.up.len() == len);
        let (gate, up) = (self.gate.as_ptr(), self.up.as_ptr());
        let out = self.out.as_mut_ptr();
        // SAFETY: three slices of `len` values.
        unsafe {
            for (i, n) in vectors(len) {
                let gate = S::load_first(gate.add(i), n);
                let up = S::load_first(up.add(i), n);
                let exp = S::exp(S::sub(S::splat(0.0), gate));
                let silu = S::div(gate, S::add(S::splat(1.0), exp));
                S::store_first(out.add(i), n, S::mul(silu, up));
            }
        }
    }
}

/// `silu(gate) * up` of every row `[gate | up]`.
pub(in crate::cpu) fn swiglu(
    pool: &mut Pool,
    isa: Isa,
    gate_up: Rows<'_>,
    rows: usize,
    out: &Sink<'_>,
) {
    let inter = gate_up.cols / 2;
    each_row(pool, rows, 4 * inter, &|t| {
        let (gate, up) = gate_up.row(t).split_at(inter);
        // SAFETY: one task has row `t`; the kernel checks its slices.
        unsafe { out.fill(t, |out| isa.run(Swiglu { gate, up, out })) };
    });
}

/// Puts every row where it belongs.
pub(in crate::cpu) fn quantise(pool: &mut Pool, x: Rows<'_>, rows: usize, out: &Sink<'_>) {
    each_row(pool, rows, x.cols, &|t| {
        // SAFETY: one task has row `t`.
        unsafe { out.put(t, x.row(t)) };
    });
}

/// Quantisation of one block of at most 128 values.
struct Quantise<'a> {
    x: &'a [f32],
    format: ScaleFormat,
    out: &'a mut [u8],
}

impl Kernel for Quantise<'_> {
    type Out = f32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let len = self.x.len();
        assert!(self.out.len() == len);
        let (x, out) = (self.x.as_ptr(), self.out.as_mut_ptr());
        // SAFETY: two slices of `len` values.
        unsafe {
            let mut most = S::splat(0.0);
            for (i, n) in vectors(len) {
                let x = S::load_first(x.add(i), n);
                most = S::max(S::abs(x), most);
            }
            let mut lanes = [0.0; LANES];
            S::store(lanes.as_mut_ptr(), most);
            let amax = lanes.into_iter().fold(0.0, f32::max);
            let scale = match self.format {
                ScaleFormat::F32 => fp8::scale(amax),
                ScaleFormat::Ue8m0 => fp8::scale_ue8m0(amax),
            };
            for (i, n) in vectors(len) {
                let v = S::div(S::load_first(x.add(i), n), S::splat(scale));
                let mut bytes = [0; LANES];
                S::store_fp8(bytes.as_mut_ptr(), v);
                out.add(i).copy_from_nonoverlapping(bytes.as_ptr(), n);
            }
            scale
        }
    }
}

/// Quantises a row as [`reference::quantise_row`] does, to the same bytes.
pub(in crate::cpu) fn quantise_row(
    isa: Isa,
    row: &[f32],
    format: ScaleFormat,
    data: &mut [u8],
    scales: &mut [f32],
) {
    let blocks = row.chunks(fp8::BLOCK).zip(data.chunks_mut(fp8::BLOCK));
    for ((x, out), scale) in blocks.zip(scales) {
        // SAFETY: the kernel checks its slices.
        *scale = unsafe { isa.run(Quantise { x, format, out }) };
    }
}

/// Weighted sum of some rows of `y`.
struct Combine<'a> {
    y: Rows<'a>,
    weights: &'a [f32],
    rows: &'a [i32],
    shared: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.out.len();
        assert!(self.y.cols == len && self.shared.is_none_or(|s| s.len() == len));
        let out = self.out.as_mut_ptr();
        // SAFETY: `y`'s rows, `shared` and `out` have `len` values.
        unsafe {
            for (i, n) in vectors(len) {
                let mut sum = S::splat(0.0);
                for (weight, row) in self.weights.iter().zip(self.rows) {
                    let y = S::load_first(self.y.row(*row as usize).as_ptr().add(i), n);
                    sum = S::fma(S::splat(*weight), y, sum);
                }
                if let Some(shared) = self.shared {
                    sum = S::add(sum, S::load_first(shared.as_ptr().add(i), n));
                }
                S::store_first(out.add(i), n, sum);
            }
        }
    }
}

/// `out[t] = sum over k in order (weights[t, k] * y[row of copy (t, k)]) + shared[t]`.
pub(in crate::cpu) fn combine(
    pool: &mut Pool,
    isa: Isa,
    y: Rows<'_>,
    weights: &[f32],
    row_of_copy: &[i32],
    top_k: usize,
    shared: Option<Rows<'_>>,
    out: &mut [f32],
) {
    let (rows, cols) = (out.len() / y.cols.max(1), y.cols);
    let out = Split::new(out);
    each_row(pool, rows, cols * top_k / 4, &|t| {
        let copies = t * top_k..(t + 1) * top_k;
        // SAFETY: one task has row `t`; the kernel checks its slices.
        unsafe {
            isa.run(Combine {
                y,
                weights: &weights[copies.clone()],
                rows: &row_of_copy[copies],
                shared: shared.map(|s| s.row(t)),
                out: out.part(t * cols, cols),
            });
        }
    });
}

/// Rotates every row's heads.
pub(in crate::cpu) fn rope(
    pool: &mut Pool,
    q: &mut [f32],
    heads: usize,
    nope: usize,
    rope: usize,
    table: &[f32],
    positions: &[i32],
) {
    let cols = heads * (nope + rope);
    let q = Split::new(q);
    each_row(pool, positions.len(), heads * rope, &|t| {
        // SAFETY: one task has row `t`.
        let row = unsafe { q.part(t * cols, cols) };
        reference::rope(row, heads, nope, rope, table, &positions[t..=t]);
    });
}
