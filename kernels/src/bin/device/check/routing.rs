//! The gate, dispatch, permutation and combine.

use kernels::cuda::probe::Kind;
use kernels::cuda::routing::{self, GateShape, Order, Rows};

use super::{Case, Found};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16};

/// DeepSeek-V3's gate.
pub(crate) const V3: GateShape = GateShape {
    experts: 256,
    groups: 8,
    top_groups: 4,
    top_k: 8,
    scale: 2.5,
    normalise: true,
};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let small = GateShape {
        experts: 64,
        groups: 8,
        top_groups: 3,
        top_k: 4,
        scale: 1.0,
        normalise: false,
    };
    let flat = GateShape {
        experts: 32,
        groups: 1,
        top_groups: 1,
        top_k: 32,
        scale: 2.5,
        normalise: true,
    };
    for (name, shape) in [
        ("v3", V3),
        ("64 experts", small),
        ("one group, all of 32", flat),
    ] {
        for (inputs, step, offset) in [
            ("random", 0.0, 0.0),
            ("ties", 0.5, 0.0),
            ("negative biases", 0.0, -3.0),
        ] {
            for tokens in [1, 128, 1000] {
                cases.push(Case::new(
                    format!("gate {name} {inputs} tokens {tokens}"),
                    move |h| gate(h, shape, tokens, step, offset),
                ));
            }
        }
    }
    cases.push(Case::new("gate NaN shows".into(), gate_nan));
    for (tokens, slots) in [(1, 256), (128, 288), (4096, 288), (33, 1)] {
        cases.push(Case::new(
            format!("dispatch permute combine tokens {tokens} slots {slots}"),
            move |h| moves(h, tokens, slots),
        ));
    }
    cases
}

fn gate(h: &Harness, shape: GateShape, tokens: usize, step: f64, offset: f64) -> Result<Found> {
    let mut random = Random(1);
    // Multiples of `step` make scores tie.
    let mut draw = |spread: f64| {
        let x = (random.unit() - 0.5) * spread;
        (if step > 0.0 {
            (x / step).round() * step
        } else {
            x
        }) as f32
    };
    let logits: Vec<f32> = (0..tokens * shape.experts).map(|_| draw(6.0)).collect();
    let bias: Vec<f32> = (0..shape.experts)
        .map(|_| (f64::from(draw(1.0)) + offset) as f32)
        .collect();
    let (found, weights, counts) = run_gate(h, shape, tokens, &logits, &bias)?;
    let again = run_gate(h, shape, tokens, &logits, &bias)?;
    let mut error = Error::default();
    let mut wrong = 0;
    let mut expected_counts = vec![0; shape.experts];
    for t in 0..tokens {
        let chosen = &found[t * shape.top_k..][..shape.top_k];
        let (expected, expected_weights) =
            choose(shape, &logits[t * shape.experts..][..shape.experts], &bias);
        wrong += chosen
            .iter()
            .zip(&expected)
            .filter(|(a, b)| **a as usize != **b)
            .count();
        for (w, e) in weights[t * shape.top_k..].iter().zip(expected_weights) {
            error.add(f64::from(*w), e);
        }
        for e in expected {
            expected_counts[e] += 1;
        }
    }
    wrong += usize::from(counts != expected_counts);
    Ok(Found::new(
        &error,
        1e-6,
        (found, weights, counts) == again,
        wrong,
    ))
}

type Gated = (Vec<i32>, Vec<f32>, Vec<i32>);

fn run_gate(
    h: &Harness,
    shape: GateShape,
    tokens: usize,
    logits: &[f32],
    bias: &[f32],
) -> Result<Gated> {
    let (logits, bias) = (h.upload(logits)?, h.upload(bias)?);
    let chosen = h.poisoned::<i32>(tokens * shape.top_k)?;
    let weights = h.poisoned::<f32>(tokens * shape.top_k)?;
    let counts = h.upload(&vec![0; shape.experts])?;
    let out = (h.span(&chosen), h.span(&weights));
    let (logits, bias) = (h.span(&logits), h.span(&bias));
    routing::gate(
        &h.gpu,
        &h.stream,
        shape,
        logits,
        bias,
        tokens,
        out,
        h.span(&counts),
        false,
    )?;
    Ok((
        h.download(&chosen)?,
        h.download(&weights)?,
        h.download(&counts)?,
    ))
}

/// The rule itself. Scores are rounded to float32, as every implementation's are: ties are ties of those.
fn choose(shape: GateShape, logits: &[f32], bias: &[f32]) -> (Vec<usize>, Vec<f64>) {
    let scores: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
    let choice: Vec<f32> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let size = shape.experts / shape.groups;
    let best = |values: &[f32], count: usize| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        order.truncate(count);
        order
    };
    let groups: Vec<f32> = choice
        .chunks(size)
        .map(|group| best(group, 2).into_iter().map(|i| group[i]).sum())
        .collect();
    let kept = best(&groups, shape.top_groups);
    let masked: Vec<f32> = (0..shape.experts)
        .map(|e| {
            if kept.contains(&(e / size)) {
                choice[e]
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    let chosen = best(&masked, shape.top_k);
    let total: f64 = chosen.iter().map(|&e| f64::from(scores[e])).sum();
    let divide = if shape.normalise { total } else { 1.0 };
    let weights = chosen
        .iter()
        .map(|&e| f64::from(shape.scale) * f64::from(scores[e]) / divide)
        .collect();
    (chosen, weights)
}

fn gate_nan(h: &Harness) -> Result<Found> {
    let mut logits = vec![0.25f32; 2 * V3.experts];
    logits[V3.experts + 77] = f32::NAN;
    let (_, weights, _) = run_gate(h, V3, 2, &logits, &vec![0.0; V3.experts])?;
    let hidden = weights[V3.top_k..].iter().filter(|w| !w.is_nan()).count();
    let spread = weights[..V3.top_k].iter().filter(|w| w.is_nan()).count();
    Ok(Found::new(&Error::default(), 0.0, true, hidden + spread))
}

fn moves(h: &Harness, tokens: usize, slots: usize) -> Result<Found> {
    const TOP_K: usize = 8;
    let (experts, cols) = (slots.min(256), 7168);
    let copies = tokens * TOP_K;
    let mut random = Random(2);
    // The first experts have a second slot where there are slots to spare.
    let table: Vec<i32> = (0..experts)
        .flat_map(|e| {
            if e + experts < slots {
                [2, e as i32, (e + experts) as i32]
            } else {
                [1, e as i32, 0]
            }
        })
        .collect();
    let chosen: Vec<i32> = (0..copies).map(|_| random.below(experts) as i32).collect();
    let slot = |c: usize| {
        let entry = &table[chosen[c] as usize * 3..][..3];
        entry[1 + c / TOP_K % entry[0] as usize] as usize
    };
    let mut order: Vec<usize> = (0..copies).collect();
    order.sort_by_key(|&c| slot(c));

    let (device_chosen, device_table) = (h.upload(&chosen)?, h.upload(&table)?);
    let offsets = h.poisoned::<i32>(slots + 1)?;
    let (copy_of_row, row_of_copy) = (h.poisoned::<i32>(copies)?, h.poisoned::<i32>(copies)?);
    let spans = Order {
        offsets: h.span(&offsets),
        copy_of_row: h.span(&copy_of_row),
        row_of_copy: h.span(&row_of_copy),
    };
    let lookup = (h.span(&device_table), 3);
    routing::dispatch(
        &h.gpu,
        &h.stream,
        h.span(&device_chosen),
        tokens,
        TOP_K,
        lookup,
        slots,
        spans,
        false,
    )?;
    let (found_offsets, found) = (h.download(&offsets)?, h.download(&copy_of_row)?);
    let inverse = h.download(&row_of_copy)?;
    let mut wrong = found
        .iter()
        .zip(&order)
        .filter(|(a, b)| **a as usize != **b)
        .count();
    wrong += (0..copies)
        .filter(|&r| inverse[order[r]] as usize != r)
        .count();
    wrong += (0..=slots)
        .filter(|&s| found_offsets[s] as usize != order.iter().filter(|&&c| slot(c) < s).count())
        .count();

    let (ld, ld_to) = (tokens.next_multiple_of(4), copies.next_multiple_of(4));
    let from = h.random::<u8>(tokens * cols, Kind::Fp8Normal, 100.0, 1)?;
    let scales = h.random::<f32>(cols / 128 * ld, Kind::F32Scale, 0.01, 2)?;
    let (to, scales_to) = (
        h.poisoned::<u8>(copies * cols)?,
        h.poisoned::<f32>(cols / 128 * ld_to)?,
    );
    let rows_from = Rows {
        data: h.span(&from),
        scales: h.span(&scales),
        ld,
    };
    let rows_to = Rows {
        data: h.span(&to),
        scales: h.span(&scales_to),
        ld: ld_to,
    };
    routing::permute(
        &h.gpu,
        &h.stream,
        rows_from,
        h.span(&copy_of_row),
        copies,
        TOP_K,
        cols,
        rows_to,
        false,
    )?;
    let (from, to) = (h.download(&from)?, h.download(&to)?);
    let (scales, scales_to) = (h.download(&scales)?, h.download(&scales_to)?);
    for (r, &c) in order.iter().enumerate() {
        let t = c / TOP_K;
        wrong += usize::from(to[r * cols..][..cols] != from[t * cols..][..cols]);
        wrong += (0..cols / 128)
            .filter(|b| scales_to[b * ld_to + r] != scales[b * ld + t])
            .count();
    }

    let y = h.random::<u16>(copies * cols, Kind::Bf16Normal, 1.0, 3)?;
    let shared = h.random::<u16>(tokens * cols, Kind::Bf16Normal, 1.0, 4)?;
    let weights = h.random::<f32>(copies, Kind::F32Scale, 0.3, 5)?;
    let out = h.poisoned::<u16>(tokens * cols)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        routing::combine(
            &h.gpu,
            &h.stream,
            h.span(&y),
            h.span(&weights),
            h.span(&row_of_copy),
            Some(h.span(&shared)),
            tokens,
            TOP_K,
            cols,
            h.span(&out),
            false,
        )?;
        *digest = h.digest(&out)?;
    }
    let (y, shared, weights, out) = (
        h.download(&y)?,
        h.download(&shared)?,
        h.download(&weights)?,
        h.download(&out)?,
    );
    let mut error = Error::default();
    for _ in 0..20_000 {
        let (t, i) = (random.below(tokens), random.below(cols));
        let copies = (0..TOP_K).map(|k| t * TOP_K + k);
        let sum: f64 = copies
            .map(|c| f64::from(weights[c]) * bf16(y[inverse[c] as usize * cols + i]))
            .sum();
        error.add(bf16(out[t * cols + i]), sum + bf16(shared[t * cols + i]));
    }
    wrong += out.iter().filter(|&&v| v == 0xffff).count();
    Ok(Found::new(&error, 3e-3, digests[0] == digests[1], wrong))
}
