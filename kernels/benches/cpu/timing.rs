//! Times of variants that take turns.

use std::time::Instant;

/// Seconds that every variant of a line may take together.
const BUDGET: f64 = 0.4;

/// Best time of each variant in microseconds; variants take turns.
pub(crate) fn race(variants: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut best = vec![f64::INFINITY; variants.len()];
    let start = Instant::now();
    let mut rounds = 0;
    while start.elapsed().as_secs_f64() < BUDGET || rounds < 5 {
        rounds += 1;
        for (variant, best) in variants.iter_mut().zip(&mut best) {
            let begin = Instant::now();
            variant();
            *best = best.min(begin.elapsed().as_secs_f64() * 1e6);
        }
    }
    best
}
