//! Attention over steps of 32 context tokens with a running softmax.
//!
//! An *item* is one head of one query token. Items of a task share their keys and values: every step's are brought to
//! float32 once for all of them. Steps start at multiples of 32 tokens whatever the batch, an item's sums run over its
//! own visible tokens only, and so its result does not depend on the items beside it.

use std::cell::RefCell;

use crate::backend::Result;
use crate::cpu::cache::{BLOCK_TOKENS, Cache, Page};
use crate::cpu::pool::Pool;
use crate::cpu::simd::{Isa, Kernel, LANES, Simd};
use crate::cpu::views::{Rows, Seqs};

/// Most items of a task.
const ITEMS: usize = 64;

/// Context tokens of a step: their float32 keys fit the first-level cache beside the sums. Divides a cache block.
const TOKENS: usize = 32;

/// Multiply-adds below which a parallel region costs more than it saves.
const ALONE: usize = 1 << 17;

thread_local! {
    /// Room for a task's float32 keys, values, queries and sums.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One head of one query token.
#[derive(Clone, Copy)]
struct Item {
    /// The query, as wide as the keys.
    q: *const f32,
    /// Tokens it attends to, from the first on.
    visible: usize,
    /// Where the result goes, as wide as the values.
    out: *mut f32,
}

// SAFETY: an item is plain addresses; `attend`'s contract covers what is behind them.
unsafe impl Send for Item {}
// SAFETY: as above.
unsafe impl Sync for Item {}

/// Where keys and values come from.
#[derive(Clone)]
enum Context<'a> {
    /// Cache entries: the whole entry is the key, its first values (the latent) the value.
    Latent(Vec<Page<'a>>),
    /// One head of expanded rows `[key | value]`, from `first` on, and rope keys of all heads.
    Expanded {
        kv: Rows<'a>,
        rope: Rows<'a>,
        first: usize,
    },
}

/// Items with the same keys and values.
struct Group<'a> {
    context: Context<'a>,
    items: Vec<Item>,
}

/// Attention in the latent space over the paged cache.
pub(in crate::cpu) fn attend_absorbed(
    pool: &mut Pool,
    isa: Isa,
    q: Rows<'_>,
    cache: &Cache,
    layer: usize,
    seqs: Seqs<'_>,
    heads: usize,
    scale: f32,
    out: &mut [f32],
) -> Result<()> {
    let width = cache.width;
    let value = out.len() / q.count.max(1) / heads;
    let used = |s: usize| seqs.context(s).div_ceil(BLOCK_TOKENS);
    let blocks = (0..seqs.count).flat_map(|s| (0..used(s)).map(move |i| (seqs.block(s, i), layer)));
    let held = cache.read_pages(blocks)?;
    let out = out.as_mut_ptr();
    let mut next = 0;
    let groups: Vec<Group<'_>> = (0..seqs.count)
        .map(|s| {
            let pages = next..next + used(s);
            next = pages.end;
            let item = |t: usize, h: usize| Item {
                q: q.row(t)[h * width..][..width].as_ptr(),
                visible: seqs.visible(s, t),
                // SAFETY: row `t` is one of the `q.count` rows that `out` has.
                out: unsafe { out.add((t * heads + h) * value) },
            };
            Group {
                context: Context::Latent(pages.map(|i| held.page(i)).collect()),
                items: seqs
                    .queries(s)
                    .flat_map(|t| (0..heads).map(move |h| item(t, h)))
                    .collect(),
            }
        })
        .collect();
    // SAFETY: queries are `width` wide, pages hold every visible token, and each item has its own part of `out`.
    unsafe { attend(pool, isa, &groups, width, value, scale) };
    Ok(())
}

/// Ordinary attention over expanded keys and values.
pub(in crate::cpu) fn attend_expanded(
    pool: &mut Pool,
    isa: Isa,
    q: Rows<'_>,
    kv: Rows<'_>,
    rope: Rows<'_>,
    seqs: Seqs<'_>,
    start: &[i32],
    heads: usize,
    scale: f32,
    out: &mut [f32],
) {
    let value = out.len() / q.count.max(1) / heads;
    let (key, per_head) = (q.cols / heads, kv.cols / heads);
    let out = out.as_mut_ptr();
    let mut groups = Vec::with_capacity(seqs.count * heads);
    for s in 0..seqs.count {
        for h in 0..heads {
            let item = |t: usize| Item {
                q: q.row(t)[h * key..][..key].as_ptr(),
                visible: seqs.visible(s, t),
                // SAFETY: row `t` is one of the `q.count` rows that `out` has.
                out: unsafe { out.add((t * heads + h) * value) },
            };
            groups.push(Group {
                context: Context::Expanded {
                    kv: kv.part(h * per_head, per_head),
                    rope,
                    first: start[s] as usize,
                },
                items: seqs.queries(s).map(item).collect(),
            });
        }
    }
    // SAFETY: queries are `key` wide, `start` and lengths were checked against `kv` and `rope`, and each item has its
    // own part of `out`.
    unsafe { attend(pool, isa, &groups, key, value, scale) };
}

/// Attention of all groups' items: keys of `key` values, values of `value`.
///
/// # Safety
/// Queries and outputs are good for these widths, contexts for every item's visible tokens, and nothing else touches the
/// outputs.
unsafe fn attend(
    pool: &mut Pool,
    isa: Isa,
    groups: &[Group<'_>],
    key: usize,
    value: usize,
    scale: f32,
) {
    let items: usize = groups.iter().map(|g| g.items.len()).sum();
    let visible = groups.iter().flat_map(|g| &g.items).map(|i| i.visible);
    let alone = visible.sum::<usize>() * (key + value) < ALONE;
    let share = if alone || pool.threads() == 1 {
        ITEMS
    } else {
        items / (2 * pool.threads())
    };
    let share = share.next_multiple_of(4).clamp(4, ITEMS);
    let tasks: Vec<Attend<'_>> = groups
        .iter()
        .flat_map(|group| {
            group.items.chunks(share).map(|items| Attend {
                context: &group.context,
                items,
                key,
                value,
                scale,
            })
        })
        .collect();
    pool.run(tasks.len(), alone, &|i| {
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the caller's; every item is in one task.
            unsafe { isa.run(Work::new(tasks[i], scratch)) };
        });
    });
}

#[derive(Clone, Copy)]
struct Attend<'a> {
    context: &'a Context<'a>,
    items: &'a [Item],
    key: usize,
    value: usize,
    scale: f32,
}

/// A task with its room in the scratch; widths are padded with zeros to whole vectors.
struct Work<'a> {
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
    fn new(task: Attend<'a>, scratch: &'a mut Vec<f32>) -> Self {
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
                    self.weigh::<S, N, 4>(i, column, most, rescale);
                    column += 4 * LANES;
                } else {
                    self.weigh::<S, N, 1>(i, column, most, rescale);
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

    /// Adds `count` tokens' weighted values to `C` vectors of `N` items' sums.
    #[inline(always)]
    unsafe fn weigh<S: Simd, const N: usize, const C: usize>(
        &self,
        i: usize,
        column: usize,
        count: usize,
        rescale: [f32; N],
    ) {
        // SAFETY: as for `step`.
        unsafe {
            let at = |n: usize, c: usize| self.sums.add((i + n) * self.value + column + c * LANES);
            let mut sums = [[S::splat(0.0); C]; N];
            for n in 0..N {
                for c in 0..C {
                    sums[n][c] = S::mul(S::load(at(n, c)), S::splat(rescale[n]));
                }
            }
            for s in 0..count {
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
                for c in 0..C {
                    S::store(at(n, c), sums[n][c]);
                }
            }
        }
    }
}
