//! The cache and attention: arguments checked, then the reference or the fast path.

use crate::backend::{Columns, Result, Sequences};
use crate::cpu::cache::{BLOCK_TOKENS, Cache};
use crate::cpu::memory::Memory;
use crate::cpu::views::{Rows, Seqs, device, ensure, f32s, f32s_mut, i32s, within};
use crate::cpu::{Stream, fast, reference};
use crate::tensor::Tensor;

/// [`crate::Backend::cache_write`].
pub(in crate::cpu) fn cache_write(
    stream: &mut Stream,
    kv: &Columns<'_, Memory>,
    weight: &Tensor<Memory>,
    eps: f32,
    table: &Tensor<Memory>,
    seqs: &Sequences<Memory>,
    layer: usize,
    rows: usize,
    cache: &Cache,
) -> Result<()> {
    let op = "cache_write";
    let kv = Rows::columns(op, kv, rows)?;
    let rope = table.cols;
    ensure(
        kv.cols == cache.width
            && kv.cols == weight.cols + rope
            && rope.is_multiple_of(2)
            && layer < cache.layers,
        op,
        || {
            format!(
                "{} columns, weight of {}, table of {rope}, layer {layer} of a cache of {} x {}",
                kv.cols, weight.cols, cache.layers, cache.width
            )
        },
    )?;
    let slots = i32s(op, &seqs.slots, rows)?;
    let positions = i32s(op, &seqs.positions, rows)?;
    within(op, positions, table.rows)?;
    let end = cache.blocks * BLOCK_TOKENS;
    if let Some(slot) = slots
        .iter()
        .find(|slot| **slot >= 0 && **slot as usize >= end)
    {
        return device(op, format!("slot {slot} of {end}"));
    }
    let weight = f32s(op, weight, 1)?;
    let table = f32s(op, table, table.rows)?;
    let norm = |x: &[f32], out: &mut [f32]| match stream.isa {
        None => reference::norm_row(x, weight, eps, out),
        Some(isa) => fast::norm_row(isa, x, weight, eps, out),
    };
    reference::cache_write(
        kv,
        weight.len(),
        &norm,
        table,
        slots,
        positions,
        layer,
        cache,
    )
}

/// [`crate::Backend::attend_absorbed`].
pub(in crate::cpu) fn attend_absorbed(
    stream: &mut Stream,
    q: &Tensor<Memory>,
    cache: &Cache,
    layer: usize,
    seqs: &Sequences<Memory>,
    heads: usize,
    scale: f32,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "attend_absorbed";
    let latent = out.cols / heads.max(1);
    ensure(
        heads > 0
            && layer < cache.layers
            && q.cols == heads * cache.width
            && out.cols == heads * latent
            && latent <= cache.width,
        op,
        || {
            format!(
                "{} to {} columns, {heads} heads, layer {layer} of a cache of {} x {}",
                q.cols, out.cols, cache.layers, cache.width
            )
        },
    )?;
    let seqs = Seqs::of(op, seqs, rows, cache.blocks, BLOCK_TOKENS)?;
    let (q, out) = (Rows::of(op, q, rows)?, f32s_mut(op, out, rows)?);
    match stream.isa {
        None => reference::attend_absorbed(q, cache, layer, seqs, heads, scale, out),
        Some(isa) => fast::attend_absorbed(
            &mut stream.pool,
            isa,
            q,
            cache,
            layer,
            seqs,
            heads,
            scale,
            out,
        ),
    }
}

/// [`crate::Backend::cache_read`].
pub(in crate::cpu) fn cache_read(
    cache: &Cache,
    layer: usize,
    seqs: &Sequences<Memory>,
    context_start: &Tensor<Memory>,
    rows: usize,
    latent: &mut Tensor<Memory>,
    rope: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "cache_read";
    let widths = (latent.cols, rope.cols);
    ensure(
        widths.0 + widths.1 == cache.width && layer < cache.layers,
        op,
        || {
            format!(
                "columns {widths:?}, layer {layer} of {} x {}",
                cache.layers, cache.width
            )
        },
    )?;
    let seqs = Seqs::of(op, seqs, usize::MAX >> 1, cache.blocks, BLOCK_TOKENS)?;
    let start = starts(op, context_start, seqs, rows)?;
    let latent = (f32s_mut(op, latent, rows)?, widths.0);
    let rope = (f32s_mut(op, rope, rows)?, widths.1);
    reference::cache_read(cache, layer, seqs, start, latent, rope)
}

/// [`crate::Backend::attend_expanded`].
pub(in crate::cpu) fn attend_expanded(
    stream: &mut Stream,
    q: &Tensor<Memory>,
    kv: &Tensor<Memory>,
    rope: &Tensor<Memory>,
    seqs: &Sequences<Memory>,
    context_start: &Tensor<Memory>,
    heads: usize,
    scale: f32,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "attend_expanded";
    let value = out.cols / heads.max(1);
    let nope = (q.cols / heads.max(1)).saturating_sub(rope.cols);
    ensure(
        heads > 0
            && q.cols == heads * (nope + rope.cols)
            && kv.cols == heads * (nope + value)
            && out.cols == heads * value,
        op,
        || {
            format!(
                "q of {}, kv of {}, rope of {}, out of {}, {heads} heads",
                q.cols, kv.cols, rope.cols, out.cols
            )
        },
    )?;
    // The keys are at hand: the block table is not looked at.
    let seqs = Seqs::of(op, seqs, rows, usize::MAX, BLOCK_TOKENS)?;
    let start = starts(op, context_start, seqs, kv.rows.min(rope.rows))?;
    let q = Rows::of(op, q, rows)?;
    let (kv, rope) = (Rows::of(op, kv, kv.rows)?, Rows::of(op, rope, rope.rows)?);
    let out = f32s_mut(op, out, rows)?;
    match stream.isa {
        None => reference::attend_expanded(q, kv, rope, seqs, start, heads, scale, out),
        Some(isa) => {
            let pool = &mut stream.pool;
            fast::attend_expanded(pool, isa, q, kv, rope, seqs, start, heads, scale, out);
        }
    }
    Ok(())
}

/// Where each sequence's context begins, checked to end within `rows`.
fn starts<'a>(
    op: &'static str,
    context_start: &'a Tensor<Memory>,
    seqs: Seqs<'_>,
    rows: usize,
) -> Result<&'a [i32]> {
    let start = i32s(op, context_start, seqs.count)?;
    for (s, first) in start.iter().enumerate() {
        if *first < 0 || *first as usize + seqs.context(s) > rows {
            return device(
                op,
                format!("context {s}: {first} + {} of {rows}", seqs.context(s)),
            );
        }
    }
    Ok(start)
}
