//! Prefill: the worker whose answer is expected first. What it has to compute before and for this prompt, in tokens,
//! stands for the time (Mooncake's Conductor, algorithm 1, with a constant cost a token).

/// What is known about a prefill worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillState {
    /// Tokens it has to compute before this prompt.
    pub pending_tokens: u64,
    /// Tokens of this prompt that it holds.
    pub cached_tokens: u64,
}

/// The index of the worker with the least to compute; of equal ones, the one that `tie` (a random number) falls on.
/// `None` when there is none.
pub fn prefix_aware(workers: &[PrefillState], prompt_tokens: u64, tie: u64) -> Option<usize> {
    let cost = |worker: &PrefillState| {
        worker.pending_tokens + prompt_tokens.saturating_sub(worker.cached_tokens)
    };
    let least = workers.iter().map(cost).min()?;
    let equal = || {
        workers
            .iter()
            .enumerate()
            .filter(|(_, worker)| cost(worker) == least)
    };
    let chosen = (tie % equal().count() as u64) as usize;
    equal().nth(chosen).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(pending_tokens: u64, cached_tokens: u64) -> PrefillState {
        PrefillState {
            pending_tokens,
            cached_tokens,
        }
    }

    #[test]
    fn a_cached_prefix_draws_a_prompt_until_the_queue_costs_more() {
        assert_eq!(
            prefix_aware(&[state(0, 0), state(0, 512)], 1000, 0),
            Some(1)
        );
        assert_eq!(
            prefix_aware(&[state(0, 0), state(500, 512)], 1000, 0),
            Some(1)
        );
        assert_eq!(
            prefix_aware(&[state(0, 0), state(513, 512)], 1000, 0),
            Some(0)
        );
    }

    #[test]
    fn equal_workers_share_by_the_random_number() {
        let workers = [state(9, 0), state(0, 0), state(0, 0)];
        assert_eq!(prefix_aware(&workers, 10, 6), Some(1));
        assert_eq!(prefix_aware(&workers, 10, 7), Some(2));
        assert_eq!(prefix_aware(&[], 10, 7), None);
    }
}
