//! `x W^T`: the one product behind linear layers, experts and per-head weights.
//!
//! Sum of one output: of 32 inputs at a time the products of the even and of the odd ones are added up apart, in order,
//! then both sums to that of the block of 128 inputs, and the block's, times its scales, to the total. A single row
//! (`single`) is multiplied straight with the packed weights; several rows share a block of weights dequantised once;
//! `tiles` has the processor do the chunks. All give the same bits.

mod single;

use half::bf16;

use super::packed::{CHUNK, Form, PANEL, Packed};
use super::rows::vectors;
use crate::cpu::pool::Pool;
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use crate::fp8;

/// Rows that are computed against one dequantised block: with it they fill the first-level cache. A multiple of both
/// tiles' rows.
const ROWS: usize = 48;

/// Multiply-adds that are worth a task of their own, about 2 us.
const TASK: usize = 1 << 16;

/// One row of a product.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Row<T> {
    /// Inputs: for `products` padded with zeros to the weights' padded columns.
    pub(in crate::cpu) x: *const T,
    /// One scale per 128 inputs, or null for none.
    pub(in crate::cpu) scales: *const f32,
    /// Where the outputs go.
    pub(in crate::cpu) out: *mut f32,
}

impl<T> Row<T> {
    /// Scale of the inputs of a block of 128.
    ///
    /// # Safety
    /// The row has that block.
    #[inline(always)]
    pub(super) unsafe fn scale(&self, block: usize) -> f32 {
        if self.scales.is_null() {
            1.0
        } else {
            // SAFETY: the caller's.
            unsafe { *self.scales.add(block) }
        }
    }
}

// SAFETY: a row is plain addresses; the products' contracts cover what is behind them.
unsafe impl<T> Send for Row<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Row<T> {}

/// Rows that are multiplied by the same weights.
pub(in crate::cpu) struct Part<'a> {
    pub(in crate::cpu) weight: &'a Packed,
    pub(in crate::cpu) rows: std::ops::Range<usize>,
}

/// Computes all parts of `rows`.
///
/// # Safety
/// Every row's inputs, scales and outputs are good for its part's weights, and nothing else touches the outputs.
pub(in crate::cpu) unsafe fn products(
    pool: &mut Pool,
    isa: Isa,
    rows: &[Row<f32>],
    parts: &[Part<'_>],
) {
    let mut tasks = Vec::new();
    let mut work = 0;
    for part in parts {
        let (weight, panels) = (part.weight, part.weight.panels());
        for start in part.rows.clone().step_by(2 * ROWS) {
            let rows = &rows[start..part.rows.end.min(start + 2 * ROWS)];
            let panel_work = rows.len() * weight.cols * PANEL;
            work += panel_work * panels;
            let mut step = TASK / panel_work.max(1);
            if rows.len() == 1 {
                step = step.max(1).next_multiple_of(single::ABREAST);
            }
            let step = step.clamp(1, panels.max(1));
            tasks.extend((0..panels).step_by(step).map(|first| Product {
                weight,
                panels: first..panels.min(first + step),
                rows,
            }));
        }
    }
    pool.run(tasks.len(), work < 2 * TASK, &|i| {
        // SAFETY: the caller's; tasks differ in rows or panels, so their outputs are disjoint.
        unsafe { isa.run(tasks[i].clone()) };
    });
}

#[derive(Clone)]
struct Product<'a> {
    weight: &'a Packed,
    panels: std::ops::Range<usize>,
    rows: &'a [Row<f32>],
}

impl Kernel for Product<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's; `form` says what the packed bytes are.
        unsafe {
            match self.weight.form {
                Form::F32 => self.panels::<S, f32>(),
                Form::Bf16 => self.panels::<S, bf16>(),
                Form::Fp8 => self.panels::<S, u8>(),
            }
        }
    }
}

/// How packed weights of a type become float32.
trait Load: Sized {
    /// Two columns of 32 rows; `normal` as in [`Simd::fp8_rows`].
    unsafe fn two<S: Simd>(p: *const Self, normal: bool) -> [[S::V; 2]; 2];
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn two<S: Simd>(p: *const Self, _: bool) -> [[S::V; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            [
                [S::load(p), S::load(p.add(16))],
                [S::load(p.add(32)), S::load(p.add(48))],
            ]
        }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn two<S: Simd>(p: *const Self, _: bool) -> [[S::V; 2]; 2] {
        // SAFETY: the caller's.
        unsafe {
            let [a0, b0] = S::bf16_pair(p);
            let [a1, b1] = S::bf16_pair(p.add(PANEL));
            [[a0, a1], [b0, b1]]
        }
    }
}

impl Load for u8 {
    #[inline(always)]
    unsafe fn two<S: Simd>(p: *const Self, normal: bool) -> [[S::V; 2]; 2] {
        // SAFETY: the caller's.
        unsafe { S::fp8_rows(p, normal) }
    }
}

/// A block of dequantised weights, and the totals of up to `ROWS` rows of a panel.
#[repr(align(64))]
struct Scratch {
    weights: [f32; fp8::BLOCK * PANEL],
    totals: [f32; ROWS * PANEL],
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn panels<S: Simd, W: Load>(&self) {
        if let [row] = self.rows {
            // SAFETY: the caller's.
            return unsafe { self.single::<S, W>(row) };
        }
        let mut scratch = std::mem::MaybeUninit::<Scratch>::uninit();
        // SAFETY: both fields are written before they are read: totals are zeroed for the rows in use, weights by
        // `dequantise` for the chunks in use. The pointers stay within them.
        let (weights, totals) = unsafe {
            let scratch = scratch.as_mut_ptr();
            (
                (&raw mut (*scratch).weights).cast::<f32>(),
                (&raw mut (*scratch).totals).cast::<f32>(),
            )
        };
        for panel in self.panels.clone() {
            let outputs = self.weight.outputs(panel);
            for rows in self.rows.chunks(ROWS) {
                // SAFETY: as above; outputs are the caller's.
                unsafe {
                    for i in 0..rows.len() * PANEL / LANES {
                        S::store(totals.add(i * LANES), S::splat(0.0));
                    }
                    self.block_sums::<S, W>(panel, rows, weights, totals);
                    for (i, row) in rows.iter().enumerate() {
                        let (from, to) = (totals.add(i * PANEL), row.out.add(outputs.start));
                        for (first, n) in vectors(outputs.len()) {
                            S::store_first(to.add(first), n, S::load(from.add(first)));
                        }
                    }
                }
            }
        }
    }

    /// Adds every block's products of `rows` with a panel to `totals`.
    #[inline(always)]
    unsafe fn block_sums<S: Simd, W: Load>(
        &self,
        panel: usize,
        rows: &[Row<f32>],
        scratch: *mut f32,
        totals: *mut f32,
    ) {
        let padded = self.weight.padded();
        let packed = self.weight.panel(panel).as_ptr().cast::<W>();
        for block in 0..padded.div_ceil(fp8::BLOCK) {
            let first = block * fp8::BLOCK;
            let chunks = (padded - first).min(fp8::BLOCK) / CHUNK;
            let scale = self.weight.scale(panel, block);
            // SAFETY: the panel holds `padded` columns of 32, rows `padded` inputs and a scale per block.
            unsafe {
                let packed = packed.add(first * PANEL);
                let at = |i: usize| -> (*const f32, f32) {
                    let row = rows[i];
                    (row.x.add(first), row.scale(block) * scale)
                };
                let normal = self.weight.normal(panel, block);
                let weights = dequantise::<S, W>(packed, normal, chunks, scratch);
                let mut i = 0;
                while i < rows.len() {
                    let totals = totals.add(i * PANEL);
                    match rows.len() - i {
                        1 => tile::<S, 1>([at(i)], weights, chunks, totals),
                        2 => tile::<S, 2>([0, 1].map(|j| at(i + j)), weights, chunks, totals),
                        3.. if !S::WIDE => {
                            tile::<S, 3>([0, 1, 2].map(|j| at(i + j)), weights, chunks, totals);
                        }
                        3 => {
                            tile::<S, 3>([0, 1, 2].map(|j| at(i + j)), weights, chunks, totals);
                        }
                        4 => tile::<S, 4>([0, 1, 2, 3].map(|j| at(i + j)), weights, chunks, totals),
                        5 => tile::<S, 5>(
                            [0, 1, 2, 3, 4].map(|j| at(i + j)),
                            weights,
                            chunks,
                            totals,
                        ),
                        _ => tile::<S, 6>(
                            [0, 1, 2, 3, 4, 5].map(|j| at(i + j)),
                            weights,
                            chunks,
                            totals,
                        ),
                    }
                    i += if S::WIDE { 6 } else { 3 };
                }
            }
        }
    }
}

/// Float32 weights of a block: where they are, or in `scratch`.
#[inline(always)]
unsafe fn dequantise<S: Simd, W: Load>(
    packed: *const W,
    normal: u64,
    chunks: usize,
    scratch: *mut f32,
) -> *const f32 {
    if size_of::<W>() == size_of::<f32>() {
        return packed.cast();
    }
    for two in 0..chunks * CHUNK / 2 {
        // SAFETY: `chunks` of packed weights and of room in the scratch.
        unsafe {
            let weights = W::two::<S>(packed.add(two * 2 * PANEL), normal >> two & 1 == 1);
            for (i, v) in weights.as_flattened().iter().enumerate() {
                S::store(scratch.add(two * 2 * PANEL + i * 16), *v);
            }
        }
    }
    scratch
}

/// Adds the products of `M` rows with `chunks` chunks of a panel to their totals.
#[inline(always)]
unsafe fn tile<S: Simd, const M: usize>(
    rows: [(*const f32, f32); M],
    weights: *const f32,
    chunks: usize,
    totals: *mut f32,
) {
    let x = rows.map(|(x, _)| x);
    // SAFETY: the caller's: weights, inputs and totals are as long as `chunks` and `M` say.
    unsafe {
        let mut sums = [[S::splat(0.0); 2]; M];
        let mut chunk = 0;
        // Eight sums or more at once hide the latency of the multiply-add; what the registers hold bounds them.
        if M == 1 && S::WIDE {
            while chunk + 2 <= chunks {
                step::<S, M, 2>(x, weights, chunk, &mut sums);
                chunk += 2;
            }
        }
        while chunk < chunks {
            if M == 1 || M <= 4 && S::WIDE {
                step::<S, M, 1>(x, weights, chunk, &mut sums);
            } else {
                turns::<S, M>(x, weights, chunk, &mut sums);
            }
            chunk += 1;
        }
        for m in 0..M {
            let scale = S::splat(rows[m].1);
            for half in 0..2 {
                let total = totals.add(m * PANEL + half * 16);
                S::store(total, S::fma(sums[m][half], scale, S::load(total)));
            }
        }
    }
}

/// `C` chunks of `M` rows, all sums side by side.
#[inline(always)]
unsafe fn step<S: Simd, const M: usize, const C: usize>(
    x: [*const f32; M],
    weights: *const f32,
    chunk: usize,
    sums: &mut [[S::V; 2]; M],
) {
    // SAFETY: the caller's, as for `tile`.
    unsafe {
        let mut partial = [[[[S::splat(0.0); 2]; 2]; C]; M];
        for k in (0..CHUNK).step_by(2) {
            for c in 0..C {
                let col = (chunk + c) * CHUNK + k;
                let two = f32::two::<S>(weights.add(col * PANEL), true);
                for odd in 0..2 {
                    for m in 0..M {
                        let x = S::splat(*x[m].add(col + odd));
                        let p = &mut partial[m][c][odd];
                        p[0] = S::fma(x, two[odd][0], p[0]);
                        p[1] = S::fma(x, two[odd][1], p[1]);
                    }
                }
            }
        }
        for c in 0..C {
            for m in 0..M {
                for half in 0..2 {
                    let both = S::add(partial[m][c][0][half], partial[m][c][1][half]);
                    sums[m][half] = S::add(sums[m][half], both);
                }
            }
        }
    }
}

/// One chunk of `M` rows, first the even inputs, then the odd ones.
#[inline(always)]
unsafe fn turns<S: Simd, const M: usize>(
    x: [*const f32; M],
    weights: *const f32,
    chunk: usize,
    sums: &mut [[S::V; 2]; M],
) {
    // SAFETY: the caller's, as for `tile`.
    unsafe {
        let mut even = [[S::splat(0.0); 2]; M];
        for odd in 0..2 {
            let mut partial = [[S::splat(0.0); 2]; M];
            for k in (0..CHUNK).step_by(2) {
                let col = chunk * CHUNK + k;
                let weights = f32::two::<S>(weights.add(col * PANEL), true)[odd];
                for m in 0..M {
                    let x = S::splat(*x[m].add(col + odd));
                    partial[m][0] = S::fma(x, weights[0], partial[m][0]);
                    partial[m][1] = S::fma(x, weights[1], partial[m][1]);
                }
            }
            for m in 0..M {
                for half in 0..2 {
                    if odd == 0 {
                        even[m][half] = partial[m][half];
                    } else {
                        let both = S::add(even[m][half], partial[m][half]);
                        sums[m][half] = S::add(sums[m][half], both);
                    }
                }
            }
        }
    }
}
