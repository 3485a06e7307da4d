//! Log probabilities under the model itself: before bias, penalties and temperature.

use std::cmp::Ordering;

/// The normaliser of a row of logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogSoftmax {
    max: f32,
    /// Of the exponentials relative to the largest.
    log_sum: f64,
}

impl LogSoftmax {
    pub(crate) fn new(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
        Self {
            max,
            log_sum: sum.ln(),
        }
    }

    /// The log probability of a token with this logit.
    pub(crate) fn of(self, logit: f32) -> f32 {
        (f64::from(logit - self.max) - self.log_sum) as f32
    }

    /// The `n` most likely tokens, best first, ties by index.
    pub(crate) fn top(self, logits: &[f32], n: usize) -> Vec<(u32, f32)> {
        let mut best: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| best_first(logits, *a, *b);
        if n < best.len() {
            if n == 0 {
                return Vec::new();
            }
            best.select_nth_unstable_by(n - 1, by_logit);
            best.truncate(n);
        }
        best.sort_unstable_by(by_logit);
        best.into_iter()
            .map(|token| (token, self.of(logits[token as usize])))
            .collect()
    }
}

/// Larger logits first, equal ones by index.
pub(crate) fn best_first(logits: &[f32], a: u32, b: u32) -> Ordering {
    logits[b as usize]
        .total_cmp(&logits[a as usize])
        .then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_those_of_a_direct_computation() {
        let logits = [1.0f32, 3.5, -2.0, 3.5, 0.25];
        let exps: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp()).collect();
        let sum: f64 = exps.iter().sum();
        let softmax = LogSoftmax::new(&logits);
        for (i, &x) in logits.iter().enumerate() {
            let direct = (exps[i] / sum).ln();
            assert!((f64::from(softmax.of(x)) - direct).abs() < 1e-6);
        }
        let top = softmax.top(&logits, 3);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0]);
        assert_eq!(softmax.top(&logits, 0), []);
        assert_eq!(softmax.top(&logits, 99).len(), 5);
    }

    #[test]
    fn huge_logits_and_impossible_tokens_are_no_trouble() {
        let logits = [1e30f32, f32::NEG_INFINITY, 1e30];
        let softmax = LogSoftmax::new(&logits);
        assert!((softmax.of(1e30) - 0.5f32.ln()).abs() < 1e-6);
        assert!(softmax.of(f32::NEG_INFINITY) < f32::MIN);
    }
}
