//! Decode: the worker with the fewest sequences; of equal ones, the one with the most free blocks.

/// What is known about a decode worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecodeState {
    /// Sequences it runs or will run.
    pub sequences: u32,
    /// Blocks that can be taken at once.
    pub free_blocks: u32,
}

/// The index of the least loaded worker; of equal ones, the one that `tie` (a random number) falls on. `None` when there
/// is none.
pub fn least_loaded(workers: &[DecodeState], tie: u64) -> Option<usize> {
    let rank = |worker: &DecodeState| (worker.sequences, std::cmp::Reverse(worker.free_blocks));
    let best = workers.iter().map(rank).min()?;
    let equal = || {
        workers
            .iter()
            .enumerate()
            .filter(|(_, worker)| rank(worker) == best)
    };
    let chosen = (tie % equal().count() as u64) as usize;
    equal().nth(chosen).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(sequences: u32, free_blocks: u32) -> DecodeState {
        DecodeState {
            sequences,
            free_blocks,
        }
    }

    #[test]
    fn fewer_sequences_win_then_more_free_blocks_then_chance() {
        assert_eq!(least_loaded(&[state(2, 9), state(1, 1)], 0), Some(1));
        assert_eq!(least_loaded(&[state(1, 1), state(1, 9)], 0), Some(1));
        assert_eq!(least_loaded(&[state(1, 9), state(1, 9)], 1), Some(1));
        assert_eq!(least_loaded(&[], 1), None);
    }
}
