//! Attention over steps of 32 context tokens with a running softmax.
//!
//! An *item* is one head of one query token. Items of a task share their keys and values: every step's are brought to
//! float32 once for all of them. Steps start at multiples of 32 tokens whatever the batch, an item's sums run over its
//! own visible tokens only, and so its result does not depend on the items beside it.

mod work;

use std::cell::RefCell;

use crate::backend::Result;
use crate::cpu::cache::{BLOCK_TOKENS, Cache, Page};
use crate::cpu::pool::Pool;
use crate::cpu::simd::Isa;
use crate::cpu::views::{Rows, Seqs};

use work::{Attend, Work};

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
