//! MLA decode.

use super::Case;
use crate::check::mla::Step;
use crate::harness::{Harness, Result, Timing};

/// Heads, queries, batch, tokens, FlashMLA's microseconds (the better of two runs, combine included).
const SHAPES: [(usize, usize, usize, usize, f64); 14] = [
    (128, 1, 32, 4096, 68.1),
    (128, 1, 64, 4096, 126.0),
    (128, 1, 128, 4096, 254.8),
    (128, 1, 64, 8192, 253.2),
    (128, 2, 64, 4096, 250.8),
    (128, 1, 4, 8192, 39.0),
    (128, 1, 1, 32768, 42.9),
    (64, 1, 64, 8192, 166.9),
    (32, 1, 32, 4096, 49.1),
    (32, 1, 64, 4096, 85.1),
    (32, 1, 128, 4096, 150.2),
    (32, 2, 64, 4096, 93.8),
    (32, 1, 1, 32768, 45.0),
    (16, 1, 128, 4096, 153.9),
];

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, queries, batch, tokens, peer) in SHAPES {
        cases.push(Case {
            name: format!("mla decode heads {heads} queries {queries} batch {batch} x {tokens}"),
            peer: Some((peer, "FlashMLA")),
            bytes: (batch * (tokens * 576 * 2 + queries * heads * (576 + 512) * 2)) as f64,
            flops: (2 * batch * tokens * queries * heads * (576 + 512)) as f64,
            run: Box::new(move |h| time(h, heads, queries, batch, tokens)),
        });
    }
    cases
}

fn time(h: &Harness, heads: usize, queries: usize, batch: usize, tokens: usize) -> Result<Timing> {
    // Layers of one cache as the rotating buffers: 512 MB of it at least.
    let layers = ((512usize << 20) / (batch * tokens * 576 * 2)).clamp(2, 16);
    let step = Step::random(h, heads, queries, batch, tokens, layers)?;
    step.plan(h)?;
    h.time(12.0, 7, |i| step.decode(h, i % layers, true))
}
