//! A task of attention: its items against all of a context, step by step.

use super::{Context, ITEMS, Item, TOKENS};
use crate::cpu::cache::{BLOCK_TOKENS, Page};
use crate::cpu::simd::{Kernel, LANES, Simd};

/// Items that share a context.
#[derive(Clone, Copy)]
pub(super) struct Attend<'a> {
    pub(super) context: &'a Context<'a>,
    pub(super) items: &'a [Item],
    pub(super) key: usize,
    pub(super) value: usize,
    pub(super) scale: f32,
}

/// A task with its room in the scratch; widths are padded with zeros to whole vectors.
pub(super) struct Work<'a> {
    task: Attend<'a>,
    /// `[TOKENS][key]`
    keys: *mut f32,
    /// `[TOKENS][value_stride]`
    values: *mut f32,
    key: usize,
    value_stride: usize,
    value: usize,
    /// `[items][key]`
    queries: *mut f32,
    /// `[items][value]`: sums of weighted values.
    sums: *mut f32,
    /// `[items][TOKENS]`: a step's scores, then its softmax weights.
    scores: *mut f32,
}

/// What the running softmax keeps of an item.
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
    /// Factor on the sums so far, from this step's new maximum.
    rescale: f32,
}

impl<'a> Work<'a> {
    pub(super) fn new(task: Attend<'a>, scratch: &'a mut Vec<f32>) -> Self {
        let (key, value) = (
            task.key.next_multiple_of(LANES),
            task.value.next_multiple_of(LANES),
        );
        let latent = matches!(task.context, Context::Latent(_));
        let n = task.items.len();
        let sizes = [
            TOKENS * key,
            if latent { 0 } else { TOKENS * value },
            n * key,
            n * value,
            n * TOKENS,
        ];
        let all = sizes.iter().sum();
        if scratch.len() < all {
            scratch.resize(all, 0.0);
        }
        if key != task.key || value != task.value {
            // The lanes of padding must be zero, not some other task's.
            scratch[..all].fill(0.0);
        }
        let mut rest = &mut scratch[..];
        let [keys, values, queries, sums, scores] = sizes.map(|size| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(size);
            rest = tail;
            part.as_mut_ptr()
        });
        // A latent entry is key and value in one.
        let (values, value_stride) = if latent { (keys, key) } else { (values, value) };
        Self {
            task,
            keys,
            values,
            key,
            value_stride,
            value,
            queries,
            sums,
            scores,
        }
    }
}

impl Kernel for Work<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's; the scratch has its sizes.
        unsafe { self.items::<S>() };
    }
}

impl Work<'_> {
    #[inline(always)]
    unsafe fn items<S: Simd>(&self) {
        let items = self.task.items;
        let mut running = [Running {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            rescale: 1.0,
        }; ITEMS];
        let visible = items.iter().map(|i| i.visible).max().unwrap_or(0);
        // SAFETY: the caller's: queries, outputs and contexts are good, the scratch has its sizes.
        unsafe {
            for (i, item) in items.iter().enumerate() {
                let to = self.queries.add(i * self.key);
                to.copy_from_nonoverlapping(item.q, self.task.key);
                self.sums.add(i * self.value).write_bytes(0, self.value);
            }
            for first in (0..visible).step_by(TOKENS) {
                self.fetch::<S>(first, (visible - first).min(TOKENS));
                let seen = |i: usize| items[i].visible.saturating_sub(first).min(TOKENS);
                let mut i = 0;
                while i < items.len() {
                    if S::WIDE && i + 4 <= items.len() {
                        let seen = [0, 1, 2, 3].map(|j| seen(i + j));
                        self.step::<S, 4>(i, seen, &mut running[i..i + 4]);
                        i += 4;
                    } else {
                        self.step::<S, 1>(i, [seen(i)], &mut running[i..=i]);
                        i += 1;
                    }
                }
            }
            for (i, item) in items.iter().enumerate() {
                let sums = self.sums.add(i * self.value);
                for j in 0..self.task.value {
                    *item.out.add(j) = *sums.add(j) / running[i].sum;
                }
            }
        }
    }

    /// Brings `count` tokens from `start` on to float32.
    #[inline(always)]
    unsafe fn fetch<S: Simd>(&self, start: usize, count: usize) {
        let key = self.task.key;
        // SAFETY: the caller's: the context has these tokens.
        unsafe {
            match self.task.context {
                Context::Latent(pages) => {
                    let first = start % BLOCK_TOKENS;
                    for s in 0..count {
                        let to = self.keys.add(s * self.key);
                        let entry = (first + s) * key..(first + s + 1) * key;
                        match pages[start / BLOCK_TOKENS] {
                            Page::F32(page) => {
                                to.copy_from_nonoverlapping(page[entry].as_ptr(), key);
                            }
                            Page::Bf16(page) => {
                                let (whole, rest) = page[entry].as_chunks::<LANES>();
                                for (i, chunk) in whole.iter().enumerate() {
                                    S::store(to.add(i * LANES), S::bf16(chunk.as_ptr()));
                                }
                                for (i, v) in rest.iter().enumerate() {
                                    *to.add(whole.len() * LANES + i) = v.to_f32();
                                }
                            }
                        }
                    }
                }
                Context::Expanded { kv, rope, first } => {
                    let (nope, value) = (key - rope.cols, self.task.value);
                    for s in 0..count {
                        let token = first + start + s;
                        let (kv, rope) = (kv.row(token), rope.row(token));
                        let to = self.keys.add(s * self.key);
                        to.copy_from_nonoverlapping(kv.as_ptr(), nope);
                        to.add(nope)
                            .copy_from_nonoverlapping(rope.as_ptr(), rope.len());
                        let to = self.values.add(s * self.value_stride);
                        to.copy_from_nonoverlapping(kv[nope..].as_ptr(), value);
                    }
                }
            }
        }
    }

    /// One step for items `i..i + N`, each of which sees `seen` tokens of it.
    #[inline(always)]
    unsafe fn step<S: Simd, const N: usize>(
        &self,
        i: usize,
        seen: [usize; N],
        running: &mut [Running],
    ) {
        let most = seen.into_iter().max().unwrap_or(0);
        // SAFETY: the caller's; `most` tokens are fetched, and rows of the scratch go up to `TOKENS`.
        unsafe {
            for s in (0..most).step_by(4) {
                self.scores::<S, N>(i, s);
            }
            for n in 0..N {
                running[n] = self.softmax::<S>(i + n, seen[n], running[n]);
            }
            let rescale: [f32; N] = std::array::from_fn(|n| running[n].rescale);
            let mut column = 0;
            while column < self.value {
                if column + 4 * LANES <= self.value {
                    self.weigh::<S, N, 4>(i, column, seen, rescale);
                    column += 4 * LANES;
                } else {
                    self.weigh::<S, N, 1>(i, column, seen, rescale);
                    column += LANES;
                }
            }
        }
    }

    /// Scores of `N` items with four tokens.
    #[inline(always)]
    unsafe fn scores<S: Simd, const N: usize>(&self, i: usize, s: usize) {
        // SAFETY: as for `step`.
        unsafe {
            let mut sums = [[S::splat(0.0); 4]; N];
            for k in (0..self.key).step_by(LANES) {
                let mut q = [S::splat(0.0); N];
                for n in 0..N {
                    q[n] = S::load(self.queries.add((i + n) * self.key + k));
                }
                for j in 0..4 {
                    let key = S::load(self.keys.add((s + j) * self.key + k));
                    for n in 0..N {
                        sums[n][j] = S::fma(q[n], key, sums[n][j]);
                    }
                }
            }
            for n in 0..N {
                let four = S::sum4(sums[n]).map(|score| score * self.task.scale);
                let to = self.scores.add((i + n) * TOKENS + s);
                to.copy_from_nonoverlapping(four.as_ptr(), 4);
            }
        }
    }

    /// Turns an item's scores into weights under the new maximum.
    #[inline(always)]
    unsafe fn softmax<S: Simd>(&self, i: usize, seen: usize, old: Running) -> Running {
        // SAFETY: as for `step`.
        unsafe {
            let scores = self.scores.add(i * TOKENS);
            for s in seen..TOKENS {
                *scores.add(s) = if seen == 0 { 0.0 } else { f32::NEG_INFINITY };
            }
            if seen == 0 {
                return Running {
                    rescale: 1.0,
                    ..old
                };
            }
            let mut weights = [S::load(scores), S::load(scores.add(LANES))];
            let most = S::max(weights[0], weights[1]);
            let mut lanes = [old.max; LANES];
            S::store(lanes.as_mut_ptr(), S::max(most, S::splat(old.max)));
            let max = lanes.into_iter().fold(old.max, f32::max);
            for j in 0..2 {
                weights[j] = S::exp(S::sub(weights[j], S::splat(max)));
                S::store(scores.add(j * LANES), weights[j]);
            }
            let sum = S::sum(S::add(weights[0], weights[1]));
            let rescale = S::exp(S::splat(old.max - max));
            S::store(lanes.as_mut_ptr(), rescale);
            Running {
                max,
                sum: old.sum * lanes[0] + sum,
                rescale: lanes[0],
            }
        }
    }

    /// Adds the weighted values of the tokens that items see to `C` vectors of `N` items' sums. What an item does not see
    /// has weight zero, but may be no number: it is left out.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const N: usize, const C: usize>(
        &self,
        i: usize,
        column: usize,
        seen: [usize; N],
        rescale: [f32; N],
    ) {
        let all = seen.into_iter().min().unwrap_or(0);
        // SAFETY: as for `step`.
        unsafe {
            let at = |n: usize, c: usize| self.sums.add((i + n) * self.value + column + c * LANES);
            let mut sums = [[S::splat(0.0); C]; N];
            for n in 0..N {
                for c in 0..C {
                    sums[n][c] = S::mul(S::load(at(n, c)), S::splat(rescale[n]));
                }
            }
            for s in 0..all {
                let row = self.values.add(s * self.value_stride + column);
                let mut values = [S::splat(0.0); C];
                for c in 0..C {
                    values[c] = S::load(row.add(c * LANES));
                }
                for n in 0..N {
                    let weight = S::splat(*self.scores.add((i + n) * TOKENS + s));
                    for c in 0..C {
                        sums[n][c] = S::fma(weight, values[c], sums[n][c]);
                    }
                }
            }
            for n in 0..N {
                for s in all..seen[n] {
                    let row = self.values.add(s * self.value_stride + column);
                    let weight = S::splat(*self.scores.add((i + n) * TOKENS + s));
                    for c in 0..C {
                        let values = S::load(row.add(c * LANES));
                        sums[n][c] = S::fma(weight, values, sums[n][c]);
                    }
                }
            }
            for n in 0..N {
                for c in 0..C {
                    S::store(at(n, c), sums[n][c]);
                }
            }
        }
    }
}
