//! Greedy and top-p sampling.

use kernels::cases::{Error, Random};
use kernels::cuda::sampling::{self, Choice};

use super::{Case, Found};
use crate::harness::{Harness, Result};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for vocab in [129_280, 1017, 5] {
        cases.push(Case::new(format!("sample vocab {vocab}"), move |h| {
            sample(h, vocab)
        }));
    }
    cases
}

/// Rows: greedy, greedy with ties, a NaN, ties, a nucleus of everything, the point 0, all equal, nearly equal, BF16 values,
/// all but three impossible; then random temperatures, nuclei and points.
fn sample(h: &Harness, vocab: usize) -> Result<Found> {
    const ROWS: usize = 40;
    let ld = vocab + 3;
    let mut random = Random(4);
    let mut logits: Vec<f32> = (0..ROWS * ld)
        .map(|_| ((random.unit() + random.unit() - 1.0) * 12.0) as f32)
        .collect();
    for i in [1, vocab / 2, vocab - 1] {
        logits[ld + i] = 50.0;
    }
    logits[2 * ld + vocab / 3] = f32::NAN;
    for i in 0..vocab {
        logits[3 * ld + i] = (logits[3 * ld + i] * 2.0).round() / 2.0; // nuclei with ties at their edge
    }
    logits[6 * ld..][..vocab].fill(-3.5);
    for logit in &mut logits[7 * ld..][..vocab] {
        *logit = 20.0 + *logit / 1e4;
    }
    for logit in &mut logits[8 * ld..][..vocab] {
        *logit = half::bf16::from_f32(*logit / 12.0).to_f32();
    }
    for logit in logits[9 * ld..][..vocab].iter_mut().skip(3) {
        *logit = f32::NEG_INFINITY;
    }
    let temperature: Vec<f32> = (0..ROWS)
        .map(|r| {
            if r < 2 {
                0.0
            } else {
                0.3 + 1.2 * random.unit() as f32
            }
        })
        .collect();
    let top_p: Vec<f32> = (0..ROWS)
        .map(|r| {
            if r == 4 {
                1.0
            } else {
                0.05 + 0.9 * random.unit() as f32
            }
        })
        .collect();
    let uniform: Vec<f32> = (0..ROWS)
        .map(|r| {
            if r == 5 {
                0.0
            } else {
                random.unit().min(0.999_999) as f32
            }
        })
        .collect();

    let device_logits = h.upload(&logits)?;
    let (t, p, u) = (
        h.upload(&temperature)?,
        h.upload(&top_p)?,
        h.upload(&uniform)?,
    );
    let out = h.poisoned::<i32>(ROWS)?;
    let choice = Choice {
        temperature: h.span(&t),
        top_p: h.span(&p),
        uniform: h.span(&u),
    };
    let mut runs = Vec::new();
    for _ in 0..2 {
        sampling::sample(
            &h.gpu,
            &h.stream,
            h.span(&device_logits),
            ROWS,
            vocab,
            ld,
            choice,
            h.span(&out),
            false,
        )?;
        runs.push(h.download(&out)?);
    }
    let wrong = (0..ROWS)
        .filter(|&r| {
            !possible(
                &logits[r * ld..][..vocab],
                temperature[r],
                top_p[r],
                uniform[r],
                runs[0][r],
            )
        })
        .count();
    Ok(Found::new(
        &Error::default(),
        0.0,
        runs[0] == runs[1],
        wrong,
    ))
}

/// Whether `token` is what the row's numbers say, leaving float32's rounding of the masses room at the edges.
fn possible(logits: &[f32], temperature: f32, top_p: f32, uniform: f32, token: i32) -> bool {
    if logits.iter().any(|l| l.is_nan()) {
        return token == -1;
    }
    let Some(token) = usize::try_from(token).ok().filter(|&t| t < logits.len()) else {
        return false;
    };
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if temperature == 0.0 {
        return logits.iter().position(|&l| l == top) == Some(token);
    }
    let mass: Vec<f64> = logits
        .iter()
        .map(|&l| (f64::from(l - top) / f64::from(temperature)).exp())
        .collect();
    let total: f64 = mass.iter().sum();
    let slack = 1e-5 * total;
    // In the nucleus: what lies strictly above the token does not reach top_p.
    let above: f64 = logits
        .iter()
        .zip(&mass)
        .filter(|(l, _)| **l > logits[token])
        .map(|(_, m)| m)
        .sum();
    if above > f64::from(top_p) * total + slack {
        return false;
    }
    // Under the point: the smallest nucleus that reaches top_p, ties included, walked by index.
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let mut sum = 0.0;
    let mut edge = f32::NEG_INFINITY;
    for &i in &order {
        sum += mass[i];
        if sum >= f64::from(top_p) * total {
            edge = logits[i];
            break;
        }
    }
    let inside = |i: &usize| logits[*i] >= edge;
    let nucleus: f64 = (0..logits.len()).filter(inside).map(|i| mass[i]).sum();
    let before: f64 = (0..token).filter(inside).map(|i| mass[i]).sum();
    let point = f64::from(uniform) * nucleus;
    let room = slack + 1e-4 * nucleus;
    point >= before - room && point <= before + mass[token] + room
}
