//! The gate: scores in vectors, and the reference's choices found in one pass.

use std::ops::Range;

use super::rows::{some_rows, vectors};
use crate::backend::GateShape;
use crate::cpu::pool::{Pool, Split};
use crate::cpu::simd::{Isa, Kernel, LANES, Simd, prefetch};
use crate::cpu::views::Rows;

/// `sigmoid(x W^T)` of some rows.
struct Scores<'a> {
    x: Rows<'a>,
    rows: Range<usize>,
    weight: &'a [f32],
    /// `[rows, experts]`
    out: &'a mut [f32],
}

impl Kernel for Scores<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (len, rows) = (self.x.cols, self.rows.len());
        let count = self.out.len() / rows.max(1);
        assert!(self.weight.len() == len * count && self.out.len() == rows * count);
        let (weight, out) = (self.weight.as_ptr(), self.out.as_mut_ptr());
        let x = |i: usize| self.x.row(self.rows.start + i).as_ptr();
        // SAFETY: the slices have these sizes (assert above).
        unsafe {
            let mut i = 0;
            while i < rows {
                let out = out.add(i * count);
                // Weights that are read once for four rows: all of them do not fit the first-level cache.
                if S::WIDE && i + 4 <= rows {
                    logits::<S, 4>([0, 1, 2, 3].map(|j| x(i + j)), len, weight, count, out);
                    i += 4;
                } else {
                    logits::<S, 1>([x(i)], len, weight, count, out);
                    i += 1;
                }
            }
            for (i, n) in vectors(rows * count) {
                let exp = S::exp(S::sub(S::splat(0.0), S::load_first(out.add(i), n)));
                let sigmoid = S::div(S::splat(1.0), S::add(S::splat(1.0), exp));
                S::store_first(out.add(i), n, sigmoid);
            }
        }
    }
}

/// `x W^T` of `R` rows of `len` values with `count` rows of weights.
///
/// # Safety
/// The pointers are good for that.
#[inline(always)]
unsafe fn logits<S: Simd, const R: usize>(
    x: [*const f32; R],
    len: usize,
    weight: *const f32,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        for e in (0..count).step_by(4) {
            // The last experts again where four do not fit, so that all sums are made alike.
            let experts: [usize; 4] = std::array::from_fn(|j| (e + j).min(count - 1));
            let mut sums = [[S::splat(0.0); 4]; R];
            for (i, n) in vectors(len) {
                let mut w = [S::splat(0.0); 4];
                for j in 0..4 {
                    let at = weight.add(experts[j] * len + i);
                    // The next four experts' weights: a row ends before the processor knows it as one.
                    prefetch(
                        at.cast(),
                        LANES * size_of::<f32>(),
                        4 * len * size_of::<f32>(),
                    );
                    w[j] = S::load_first(at, n);
                }
                for r in 0..R {
                    let x = S::load_first(x[r].add(i), n);
                    for j in 0..4 {
                        sums[r][j] = S::fma(x, w[j], sums[r][j]);
                    }
                }
            }
            for r in 0..R {
                for (e, z) in experts.into_iter().zip(S::sum4(sums[r])) {
                    *out.add(r * count + e) = z;
                }
            }
        }
    }
}

/// The gate of every row.
pub(in crate::cpu) fn gate(
    pool: &mut Pool,
    isa: Isa,
    x: Rows<'_>,
    weight: &[f32],
    bias: &[f32],
    shape: &GateShape,
    experts: &mut [i32],
    weights: &mut [f32],
    counts: &mut [i32],
) {
    let top_k = shape.top_k;
    let rows = experts.len() / top_k;
    let (all_experts, all_weights) = (Split::new(experts), Split::new(weights));
    some_rows(pool, rows, x.cols * shape.experts / 8, &|rows| {
        let mut scores = vec![0.0; rows.len() * shape.experts];
        // SAFETY: the kernel checks its slices.
        unsafe {
            isa.run(Scores {
                x,
                rows: rows.clone(),
                weight,
                out: &mut scores,
            });
        }
        for (t, scores) in rows.zip(scores.chunks_exact(shape.experts)) {
            // SAFETY: one task has row `t`.
            let (experts, weights) = unsafe {
                (
                    all_experts.part(t * top_k, top_k),
                    all_weights.part(t * top_k, top_k),
                )
            };
            choose(scores, bias, shape, experts, weights);
        }
    });
    // SAFETY: the region above has ended.
    for e in unsafe { all_experts.part(0, rows * top_k) } {
        counts[*e as usize] += 1;
    }
}

/// What the reference's `choose` gives, ties and NaN included.
fn choose(
    scores: &[f32],
    bias: &[f32],
    shape: &GateShape,
    experts: &mut [i32],
    weights: &mut [f32],
) {
    let size = shape.experts / shape.groups;
    // A NaN counts as best, so that it shows.
    let visible = |x: f32| if x.is_nan() { f32::INFINITY } else { x };
    let choice = |e: usize| visible(scores[e] + bias[e]);
    let mut groups = Best::new(vec![(f32::NEG_INFINITY, 0); shape.top_groups]);
    for group in 0..shape.groups {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for e in group * size..(group + 1) * size {
            let c = choice(e);
            if c > first {
                (first, second) = (c, first);
            } else if c > second {
                second = c;
            }
        }
        groups.offer(
            if size > 1 {
                visible(first + second)
            } else {
                first
            },
            group,
        );
    }
    groups.list.sort_unstable_by_key(|(_, group)| *group);
    let mut best = Best::new(vec![(f32::NEG_INFINITY, 0); shape.top_k]);
    for (_, group) in &groups.list {
        for e in group * size..(group + 1) * size {
            best.offer(choice(e), e);
        }
    }
    for (i, (_, e)) in best.list.iter().enumerate() {
        experts[i] = *e as i32;
        weights[i] = scores[*e];
    }
    let sum = if shape.normalise {
        weights.iter().sum::<f32>() + 1e-20
    } else {
        1.0
    };
    for weight in weights {
        *weight = *weight / sum * shape.scale;
    }
}

/// The best values offered, best first, earlier offers before equal later ones.
struct Best {
    list: Vec<(f32, usize)>,
    taken: usize,
}

impl Best {
    /// Room for as many as `list` has.
    fn new(list: Vec<(f32, usize)>) -> Self {
        Self { list, taken: 0 }
    }

    fn offer(&mut self, value: f32, index: usize) {
        if self.taken == self.list.len() {
            if value <= self.list[self.taken - 1].0 {
                return;
            }
            self.taken -= 1;
        }
        let mut at = self.taken;
        while at > 0 && value > self.list[at - 1].0 {
            self.list[at] = self.list[at - 1];
            at -= 1;
        }
        self.list[at] = (value, index);
        self.taken += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cpu::reference;

    proptest! {
        #[test]
        fn choices_are_the_references(
            (groups, size) in (1..6usize, 1..9usize),
            (groups_share, k_share) in (0.0..1.0f64, 0.0..1.0f64),
            // Few different values make ties; some are not finite.
            values in prop::collection::vec(prop::sample::select(vec![
                0.0, 0.1, 0.25, 0.25, 0.5, 0.75, 1.0, f32::NAN,
            ]), 48),
            biases in prop::collection::vec(prop::sample::select(vec![
                0.0, -0.25, 0.25, -2.0, 0.5, f32::NEG_INFINITY,
            ]), 48),
            normalise: bool,
        ) {
            let top_groups = 1 + (groups_share * groups as f64) as usize;
            let top_k = 1 + (k_share * (top_groups * size) as f64) as usize;
            let experts = groups * size;
            let shape = GateShape { experts, groups, top_groups, top_k, scale: 2.5, normalise };
            let mut got = (vec![-1; top_k], vec![-1.0; top_k]);
            let mut want = got.clone();
            let (values, biases) = (&values[..experts], &biases[..experts]);
            choose(values, biases, &shape, &mut got.0, &mut got.1);
            reference::choose(values, biases, &shape, &mut want.0, &mut want.1);
            prop_assert_eq!(&got.0, &want.0);
            for (got, want) in got.1.iter().zip(&want.1) {
                prop_assert!(got == want || got.is_nan() && want.is_nan(), "{} {}", got, want);
            }
        }
    }
}
