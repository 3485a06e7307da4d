//! Multi-head latent attention over the paged cache, in both forms (DeepSeek-V3 report 2.1.1; the
//! absorbed form is `attn_impl = "absorb"` of its `inference/model.py`).

use super::rows::rotate;
use crate::backend::Result;
use crate::cpu::cache::{BLOCK_TOKENS, Cache, Page};
use crate::cpu::views::{Rows, Seqs};

/// Writes `[norm(latent) | RoPE(key)]` of every row with a slot to the cache.
pub(in crate::cpu) fn cache_write(
    kv: Rows<'_>,
    latent: usize,
    norm: &dyn Fn(&[f32], &mut [f32]),
    table: &[f32],
    slots: &[i32],
    positions: &[i32],
    layer: usize,
    cache: &Cache,
) -> Result<()> {
    let rope = kv.cols - latent;
    let mut entry = vec![0.0; kv.cols];
    for (t, slot) in slots.iter().enumerate() {
        let Ok(slot) = usize::try_from(*slot) else {
            continue;
        };
        let row = kv.row(t);
        norm(&row[..latent], &mut entry[..latent]);
        entry[latent..].copy_from_slice(&row[latent..]);
        rotate(
            &mut entry[latent..],
            &table[positions[t] as usize * rope..][..rope],
        );
        cache
            .write_page(slot / BLOCK_TOKENS, layer)?
            .store(slot % BLOCK_TOKENS, 0, &entry);
    }
    Ok(())
}

/// Copies the entries of all context tokens out of the cache, sequence `s` from row `start[s]` on.
pub(in crate::cpu) fn cache_read(
    cache: &Cache,
    layer: usize,
    seqs: Seqs<'_>,
    start: &[i32],
    latent: (&mut [f32], usize),
    rope: (&mut [f32], usize),
) -> Result<()> {
    let (latents, latent) = latent;
    let (ropes, rope) = rope;
    for s in 0..seqs.count {
        for block in 0..seqs.context(s).div_ceil(BLOCK_TOKENS) {
            let pages = cache.read_pages([(seqs.block(s, block), layer)])?;
            let page = pages.page(0);
            let first = block * BLOCK_TOKENS;
            for token in first..seqs.context(s).min(first + BLOCK_TOKENS) {
                let row = start[s] as usize + token;
                let at = (token - first) * cache.width;
                for i in 0..latent {
                    latents[row * latent + i] = page.get(at + i);
                }
                for i in 0..rope {
                    ropes[row * rope + i] = page.get(at + latent + i);
                }
            }
        }
    }
    Ok(())
}

/// `softmax(scores)` in place.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, s| max.max(*s));
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
    }
    let sum: f32 = scores.iter().sum();
    for score in scores {
        *score /= sum;
    }
}

/// Attention of every head's absorbed query to the cached entries: scores over the whole entry, values are its latent.
pub(in crate::cpu) fn attend_absorbed(
    q: Rows<'_>,
    cache: &Cache,
    layer: usize,
    seqs: Seqs<'_>,
    heads: usize,
    scale: f32,
    out: &mut [f32],
) -> Result<()> {
    let width = cache.width;
    let latent = out.len() / q.count.max(1) / heads;
    for s in 0..seqs.count {
        let used = seqs.context(s).div_ceil(BLOCK_TOKENS);
        let held = cache.read_pages((0..used).map(|i| (seqs.block(s, i), layer)))?;
        let pages: Vec<Page<'_>> = (0..used).map(|i| held.page(i)).collect();
        let entry = |token: usize, i: usize| {
            pages[token / BLOCK_TOKENS].get(token % BLOCK_TOKENS * width + i)
        };
        for t in seqs.queries(s) {
            for h in 0..heads {
                let q = &q.row(t)[h * width..][..width];
                let mut p: Vec<f32> = (0..seqs.visible(s, t))
                    .map(|token| (0..width).map(|i| q[i] * entry(token, i)).sum::<f32>() * scale)
                    .collect();
                softmax(&mut p);
                for i in 0..latent {
                    out[(t * heads + h) * latent + i] = p
                        .iter()
                        .enumerate()
                        .map(|(token, p)| p * entry(token, i))
                        .sum();
                }
            }
        }
    }
    Ok(())
}

/// Ordinary causal attention over expanded keys and values.
pub(in crate::cpu) fn attend_expanded(
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
    let nope = kv.cols / heads - value;
    for s in 0..seqs.count {
        for t in seqs.queries(s) {
            for h in 0..heads {
                let q = &q.row(t)[h * (nope + rope.cols)..][..nope + rope.cols];
                let head = |token: usize| {
                    &kv.row(start[s] as usize + token)[h * (nope + value)..][..nope + value]
                };
                let mut p: Vec<f32> = (0..seqs.visible(s, t))
                    .map(|token| {
                        let key = head(token)[..nope].iter();
                        let key = key.chain(rope.row(start[s] as usize + token));
                        q.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * scale
                    })
                    .collect();
                softmax(&mut p);
                for i in 0..value {
                    out[(t * heads + h) * value + i] = p
                        .iter()
                        .enumerate()
                        .map(|(token, p)| p * head(token)[nope + i])
                        .sum();
                }
            }
        }
    }
}
