//! How far a low-precision run is from its judge.

use std::fmt;

use crate::run::greedy;

/// Differences of logits and agreement of choices, collected over checkpoints.
#[derive(Default)]
pub(crate) struct Distance {
    /// Absolute differences in units of the judge's standard deviation.
    differences: Vec<f64>,
    best_tokens: Agreement,
    expert_sets: Agreement,
}

#[derive(Default)]
struct Agreement {
    equal: usize,
    of: usize,
}

impl Agreement {
    fn share(&self) -> f64 {
        self.equal as f64 / self.of as f64
    }
}

impl Distance {
    pub(crate) fn add_logits(&mut self, logits: &[f32], exact: &[f32], vocab: usize) {
        assert_eq!(logits.len(), exact.len());
        let square = |sum: f64, &x: &f32| sum + f64::from(x) * f64::from(x);
        let deviation = (exact.iter().fold(0.0, square) / exact.len() as f64).sqrt();
        let pairs = logits.iter().zip(exact);
        self.differences
            .extend(pairs.map(|(a, b)| f64::from((a - b).abs()) / deviation));
        self.differences.sort_by(f64::total_cmp);
        for (ours, exact) in logits.chunks(vocab).zip(exact.chunks(vocab)) {
            self.best_tokens.equal += usize::from(greedy(ours) == greedy(exact));
            self.best_tokens.of += 1;
        }
    }

    pub(crate) fn add_experts(&mut self, ids: &[i32], exact: &[i32], top_k: usize) {
        assert_eq!(ids.len(), exact.len());
        for (ours, exact) in ids.chunks(top_k).zip(exact.chunks(top_k)) {
            let (mut ours, mut exact) = (ours.to_vec(), exact.to_vec());
            ours.sort_unstable();
            exact.sort_unstable();
            self.expert_sets.equal += usize::from(ours == exact);
            self.expert_sets.of += 1;
        }
    }

    /// Median, 90th and 99th percentile, mean.
    fn quantiles(&self) -> [f64; 4] {
        let last = self.differences.len() - 1;
        let at = |share: f64| self.differences[(last as f64 * share) as usize];
        let mean = self.differences.iter().sum::<f64>() / self.differences.len() as f64;
        [at(0.5), at(0.9), at(0.99), mean]
    }

    pub(crate) fn is_no_further_than(&self, other: &Self) -> bool {
        let quantiles = self.quantiles();
        quantiles
            .iter()
            .zip(&other.quantiles())
            .all(|(ours, theirs)| ours <= theirs)
            && self.best_tokens.share() >= other.best_tokens.share()
            && self.expert_sets.share() >= other.expert_sets.share()
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p90, p99, mean] = self.quantiles();
        let (best, sets) = (self.best_tokens.share(), self.expert_sets.share());
        write!(
            f,
            "p50 {p50:.5} p90 {p90:.5} p99 {p99:.5} mean {mean:.5} best tokens {best:.4} expert sets {sets:.4}"
        )
    }
}
