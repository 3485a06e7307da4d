//! The gate, the sorting of token copies by expert, and the weighted sum of what the experts gave
//! (DeepSeek-V3 report 2.1.2; `Gate` of its `inference/model.py`).

use crate::backend::{GateShape, Result};
use crate::cpu::views::{Rows, device};

/// Scores `sigmoid(x W^T)`, choices and weights of every row; one more in `counts` for each choice.
pub(in crate::cpu) fn gate(
    x: Rows<'_>,
    weight: &[f32],
    bias: &[f32],
    shape: &GateShape,
    experts: &mut [i32],
    weights: &mut [f32],
    counts: &mut [i32],
) {
    let mut scores = vec![0.0; shape.experts];
    let rows = experts
        .chunks_exact_mut(shape.top_k)
        .zip(weights.chunks_exact_mut(shape.top_k));
    for (t, (experts, weights)) in rows.enumerate() {
        for (e, score) in scores.iter_mut().enumerate() {
            let w = &weight[e * x.cols..][..x.cols];
            let z: f32 = x.row(t).iter().zip(w).map(|(x, w)| x * w).sum();
            *score = 1.0 / (1.0 + (-z).exp());
        }
        choose(&scores, bias, shape, experts, weights);
        for e in experts {
            counts[*e as usize] += 1;
        }
    }
}

/// Picks `top_k` experts of the best groups by `score + bias` and weighs them by their scores alone.
pub(in crate::cpu) fn choose(
    scores: &[f32],
    bias: &[f32],
    shape: &GateShape,
    experts: &mut [i32],
    weights: &mut [f32],
) {
    // A NaN counts as best: it is chosen, and so it shows in the weights.
    let mut choice: Vec<f32> = scores
        .iter()
        .zip(bias)
        .map(|(s, b)| {
            if (s + b).is_nan() {
                f32::INFINITY
            } else {
                s + b
            }
        })
        .collect();
    let size = shape.experts / shape.groups;
    let mut group_scores: Vec<f32> = choice
        .chunks_exact(size)
        .map(|group| {
            let mut group = group.to_vec();
            let best = take_best(&mut group).1;
            let sum = if size > 1 {
                best + take_best(&mut group).1
            } else {
                best
            };
            if sum.is_nan() { f32::INFINITY } else { sum }
        })
        .collect();
    let mut kept = vec![false; shape.groups];
    for _ in 0..shape.top_groups {
        kept[take_best(&mut group_scores).0] = true;
    }
    for (group, kept) in choice.chunks_exact_mut(size).zip(kept) {
        if !kept {
            // Below every value, -inf included: these cannot be found any more.
            group.fill(f32::NAN);
        }
    }
    for (expert, weight) in experts.iter_mut().zip(weights.iter_mut()) {
        let best = take_best(&mut choice).0;
        *expert = best as i32;
        *weight = scores[best];
    }
    let sum: f32 = if shape.normalise {
        weights.iter().sum::<f32>() + 1e-20
    } else {
        1.0
    };
    for weight in weights {
        *weight = *weight / sum * shape.scale;
    }
}

/// Index and value of the largest entry, the lowest index on ties; the entry will not be found again.
fn take_best(values: &mut [f32]) -> (usize, f32) {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        // Entries already taken are NaN.
        if *v > values[best] || values[best].is_nan() {
            best = i;
        }
    }
    (best, std::mem::replace(&mut values[best], f32::NAN))
}

/// Sorts copies `t * K + k` by slot, in order of copy within a slot. `slots_of` is `[experts, width]`: how many slots
/// an expert has, then which; token `t` takes number `t % how many`.
pub(in crate::cpu) fn dispatch(
    experts: &[i32],
    top_k: usize,
    slots_of: &[i32],
    width: usize,
    offsets: &mut [i32],
    copy_of_row: &mut [i32],
    row_of_copy: &mut [i32],
) -> Result<()> {
    let slots = offsets.len() - 1;
    let slot = |copy: usize| {
        let expert = experts[copy];
        let choices = usize::try_from(expert)
            .ok()
            .and_then(|e| slots_of.chunks_exact(width).nth(e));
        let slot = choices.and_then(|choices| {
            let number = usize::try_from(choices[0]).ok().filter(|n| *n > 0)?;
            usize::try_from(*choices.get(1 + copy / top_k % number)?).ok()
        });
        match slot {
            Some(slot) if slot < slots => Ok(slot),
            _ => device(
                "dispatch",
                format!("expert {expert} has no slot among {slots}"),
            ),
        }
    };
    offsets.fill(0);
    for copy in 0..experts.len() {
        offsets[slot(copy)? + 1] += 1;
    }
    for i in 0..slots {
        offsets[i + 1] += offsets[i];
    }
    let mut next = offsets.to_vec();
    for copy in 0..experts.len() {
        let next = &mut next[slot(copy)?];
        row_of_copy[copy] = *next;
        copy_of_row[*next as usize] = copy as i32;
        *next += 1;
    }
    Ok(())
}

/// `out[t] = sum over k in order (weights[t, k] * y[row of copy (t, k)]) + shared[t]`.
pub(in crate::cpu) fn combine(
    y: Rows<'_>,
    weights: &[f32],
    row_of_copy: &[i32],
    top_k: usize,
    shared: Option<Rows<'_>>,
    out: &mut [f32],
) {
    for (t, out) in out.chunks_exact_mut(y.cols).enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            let mut sum = 0.0;
            for copy in t * top_k..(t + 1) * top_k {
                sum += weights[copy] * y.row(row_of_copy[copy] as usize)[i];
            }
            *out = sum + shared.map_or(0.0, |shared| shared.row(t)[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An example worked by hand: 8 experts, 4 groups of 2, 2 kept, top 3.
    const SHAPE: GateShape = GateShape {
        experts: 8,
        groups: 4,
        top_groups: 2,
        top_k: 3,
        scale: 2.5,
        normalise: true,
    };
    const LOGITS: [f32; 8] = [0.5, -1.0, 2.0, -2.0, 0.0, 0.3, 1.5, -0.5];
    const BIAS: [f32; 8] = [0.05, -0.10, -0.60, 0.20, 0.40, 0.30, -0.20, 0.0];

    /// The gate on one token whose product with the weights is `logits`.
    fn route(logits: &[f32], bias: &[f32], shape: &GateShape) -> (Vec<i32>, Vec<f32>, Vec<i32>) {
        let mut out = (
            vec![-7; shape.top_k],
            vec![f32::NAN; shape.top_k],
            vec![1; shape.experts],
        );
        let x = Rows::new(&[1.0], 1);
        gate(x, logits, bias, shape, &mut out.0, &mut out.1, &mut out.2);
        out
    }

    #[test]
    fn the_gate_gives_the_worked_example() {
        let (experts, weights, counts) = route(&LOGITS, &BIAS, &SHAPE);
        assert_eq!(experts, [4, 5, 6]);
        for (got, want) in weights.iter().zip([0.660_671, 0.759_035, 1.080_295]) {
            assert!((got - want).abs() < 2e-6, "{got} {want}");
        }
        assert_eq!(counts, [1, 1, 1, 1, 2, 2, 2, 1]);
    }

    #[test]
    fn dropped_groups_stay_dropped_under_negative_biases() {
        let lower: Vec<f32> = BIAS.iter().map(|b| b - 1.2).collect();
        assert_eq!(
            route(&LOGITS, &lower, &SHAPE),
            route(&LOGITS, &BIAS, &SHAPE)
        );
    }

    #[test]
    fn ties_go_to_the_lowest_index() {
        let (experts, weights, _) = route(&[0.0; 8], &[0.0; 8], &SHAPE);
        assert_eq!(experts, [0, 1, 2]);
        assert!(weights.iter().all(|w| (w - 2.5 / 3.0).abs() < 1e-6));
    }

    #[test]
    fn a_nan_score_shows_in_the_weights() {
        let mut logits = LOGITS;
        logits[1] = f32::NAN;
        let (experts, weights, _) = route(&logits, &BIAS, &SHAPE);
        assert!(experts.contains(&1));
        assert!(weights.iter().all(|w| w.is_nan()));
    }

    #[test]
    fn an_expert_without_a_slot_is_an_error() {
        let (mut offsets, mut rows, mut copies) = ([0; 3], [0; 1], [0; 1]);
        for (expert, slots_of) in [
            (2, [1, 0, 1, 1]),
            (-1, [1, 0, 1, 1]),
            (0, [0, 0, 1, 1]),
            (1, [1, 0, 1, 2]),
        ] {
            let done = dispatch(
                &[expert],
                1,
                &slots_of,
                2,
                &mut offsets,
                &mut rows,
                &mut copies,
            );
            assert!(done.is_err(), "{expert} {slots_of:?}");
        }
    }

    proptest! {
        #[test]
        fn dispatch_is_a_permutation_sorted_by_slot_and_then_by_copy(
            choices in prop::collection::vec(prop::sample::subsequence((0..6).collect::<Vec<i32>>(), 3), 0..40),
            replicas in prop::collection::vec(1..=3usize, 6),
        ) {
            // Expert e has `replicas[e]` slots, handed out in order.
            let mut slots_of = vec![0; 6 * 4];
            let mut slots = 0;
            for (e, n) in replicas.iter().enumerate() {
                slots_of[e * 4] = *n as i32;
                for i in 0..*n {
                    slots_of[e * 4 + 1 + i] = slots;
                    slots += 1;
                }
            }
            let experts = choices.concat();
            let n = experts.len();
            let mut offsets = vec![-1; slots as usize + 1];
            let (mut copy_of_row, mut row_of_copy) = (vec![-1; n], vec![-1; n]);
            dispatch(&experts, 3, &slots_of, 4, &mut offsets, &mut copy_of_row, &mut row_of_copy).unwrap();
            prop_assert_eq!(offsets[0], 0);
            prop_assert_eq!(offsets[slots as usize], n as i32);
            for (row, copy) in copy_of_row.iter().enumerate() {
                prop_assert_eq!(row_of_copy[*copy as usize], row as i32);
            }
            for slot in 0..slots as usize {
                let rows = offsets[slot] as usize..offsets[slot + 1] as usize;
                prop_assert!(copy_of_row[rows.clone()].is_sorted());
                for copy in &copy_of_row[rows] {
                    let (expert, token) = (experts[*copy as usize] as usize, *copy as usize / 3);
                    let choices = &slots_of[expert * 4..][..4];
                    prop_assert_eq!(choices[1 + token % choices[0] as usize], slot as i32);
                }
            }
        }
    }
}
