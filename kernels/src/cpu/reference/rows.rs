//! Operations on single rows: norms, quantisation, activation, rotation, copies.

use crate::backend::ScaleFormat;
use crate::cpu::views::{Rows, Sink};
use crate::fp8;

/// `to[dst] = from[src]` for every pair, rows of `cols` values.
pub(in crate::cpu) fn copy_rows(
    from: &[f32],
    to: &mut [f32],
    cols: usize,
    pairs: impl Iterator<Item = (usize, usize)>,
) {
    for (src, dst) in pairs {
        to[dst * cols..][..cols].copy_from_slice(&from[src * cols..][..cols]);
    }
}

/// `out[t] = [a[t] | b[t]]`.
pub(in crate::cpu) fn concat(a: Rows<'_>, b: Rows<'_>, rows: usize, out: &mut [f32]) {
    let cols = a.cols + b.cols;
    for t in 0..rows {
        out[t * cols..][..a.cols].copy_from_slice(a.row(t));
        out[t * cols + a.cols..][..b.cols].copy_from_slice(b.row(t));
    }
}

/// RMSNorm: `x / sqrt(mean(x^2) + eps) * weight`: arXiv 1910.07467.
pub(in crate::cpu) fn norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares: f32 = x.iter().map(|v| v * v).sum();
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for i in 0..x.len() {
        out[i] = x[i] * scale * weight[i];
    }
}

/// RMSNorm of every row.
pub(in crate::cpu) fn norm(x: Rows<'_>, weight: &[f32], eps: f32, rows: usize, out: &Sink<'_>) {
    let mut row = vec![0.0; x.cols];
    for t in 0..rows {
        norm_row(x.row(t), weight, eps, &mut row);
        // SAFETY: one thread.
        unsafe { out.put(t, &row) };
    }
}

/// `residual += delta`, then its RMSNorm.
pub(in crate::cpu) fn add_norm(
    residual: &mut [f32],
    delta: Option<Rows<'_>>,
    weight: &[f32],
    eps: f32,
    rows: usize,
    out: &Sink<'_>,
) {
    let hidden = weight.len();
    if let Some(delta) = delta {
        for t in 0..rows {
            for (r, d) in residual[t * hidden..].iter_mut().zip(delta.row(t)) {
                *r += d;
            }
        }
    }
    norm(Rows::new(residual, hidden), weight, eps, rows, out);
}

/// Quantises a row, one scale per 128 values: `fp8(x / s)` with `s = max(|x|max, 1e-4) / 448` (report 3.3.2).
pub(in crate::cpu) fn quantise_row(
    row: &[f32],
    format: ScaleFormat,
    data: &mut [u8],
    scales: &mut [f32],
) {
    let blocks = row.chunks(fp8::BLOCK).zip(data.chunks_mut(fp8::BLOCK));
    for ((x, data), scale) in blocks.zip(scales) {
        let amax = x.iter().fold(0.0, |amax: f32, v| amax.max(v.abs()));
        *scale = match format {
            ScaleFormat::F32 => fp8::scale(amax),
            ScaleFormat::Ue8m0 => fp8::scale_ue8m0(amax),
        };
        for (q, v) in data.iter_mut().zip(x) {
            *q = fp8::encode(v / *scale);
        }
    }
}

/// Puts every row, quantised or not, where it belongs.
pub(in crate::cpu) fn quantise(x: Rows<'_>, rows: usize, out: &Sink<'_>) {
    for t in 0..rows {
        // SAFETY: one thread.
        unsafe { out.put(t, x.row(t)) };
    }
}

/// `silu(gate) * up` of rows `[gate | up]`, `silu(a) = a / (1 + exp(-a))`.
pub(in crate::cpu) fn swiglu(gate_up: Rows<'_>, rows: usize, out: &Sink<'_>) {
    let inter = gate_up.cols / 2;
    let mut row = vec![0.0; inter];
    for t in 0..rows {
        let (gate, up) = gate_up.row(t).split_at(inter);
        for i in 0..inter {
            row[i] = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
        }
        // SAFETY: one thread.
        unsafe { out.put(t, &row) };
    }
}

/// Multiplies neighbours (2i, 2i + 1), taken as a complex number, by `angles` (cos and sin of pair i at 2i, 2i + 1)
/// (`apply_rotary_emb` of DeepSeek-V3's `inference/model.py`: interleaved).
pub(in crate::cpu) fn rotate(x: &mut [f32], angles: &[f32]) {
    for (pair, angle) in x.chunks_exact_mut(2).zip(angles.chunks_exact(2)) {
        let (re, im) = (pair[0], pair[1]);
        pair[0] = re * angle[0] - im * angle[1];
        pair[1] = re * angle[1] + im * angle[0];
    }
}

/// Rotates the last `rope` values of every head of every row.
pub(in crate::cpu) fn rope(
    q: &mut [f32],
    heads: usize,
    nope: usize,
    rope: usize,
    table: &[f32],
    positions: &[i32],
) {
    let rows = q.chunks_exact_mut(heads * (nope + rope));
    for (row, position) in rows.zip(positions) {
        let angles = &table[*position as usize * rope..][..rope];
        for head in row.chunks_exact_mut(nope + rope) {
            rotate(&mut head[nope..], angles);
        }
    }
}

/// Index of the largest value of every row, the lowest on ties, -1 if there is a NaN.
pub(in crate::cpu) fn argmax(logits: Rows<'_>, out: &mut [i32]) {
    for (t, best) in out.iter_mut().enumerate() {
        let row = logits.row(t);
        *best = 0;
        for (i, v) in row.iter().enumerate() {
            if v.is_nan() {
                *best = -1;
                break;
            }
            if *v > row[*best as usize] {
                *best = i as i32;
            }
        }
    }
}
