//! Who computes what in a step. Pure decisions over numbers; [`crate::core`] carries them out.
//!
//! Sequences are always in order of arrival. Generating sequences come first, one token each, so that prompts never
//! stall a stream; prompts share what is left in chunks, oldest first, no one taking more than a chunk. When blocks
//! run out the youngest gives its own up, so the oldest always goes on.

/// What one running sequence wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tokens to compute.
    pub(crate) tokens: usize,
    /// Tokens it may compute in one step.
    pub(crate) chunk: usize,
    /// Only its newest token is to be computed.
    pub(crate) decodes: bool,
    /// Its reader keeps up and its blocks are there.
    pub(crate) ready: bool,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    /// Which running sequence.
    pub(crate) index: usize,
    /// Tokens to compute.
    pub(crate) tokens: usize,
}

/// Shares a step of `budget` tokens out; the result is in the order of `needs`.
pub(crate) fn share(needs: &[Need], budget: usize) -> Vec<Slice> {
    let mut left = budget;
    let mut slices = Vec::new();
    let mut serve = |decodes: bool| {
        for (index, need) in needs.iter().enumerate() {
            let tokens = need.tokens.min(need.chunk).min(left);
            if need.ready && need.decodes == decodes && tokens > 0 {
                left -= tokens;
                slices.push(Slice { index, tokens });
            }
        }
    };
    serve(true);
    serve(false);
    slices.sort_unstable_by_key(|slice| slice.index);
    slices
}

/// Which of the running sequences loses its blocks, so that `for_whom` can go on: the youngest that may, never one older
/// than `for_whom`.
pub(crate) fn victim(may_lose: &[bool], for_whom: usize) -> Option<usize> {
    (for_whom..may_lose.len()).rev().find(|&i| may_lose[i])
}

/// Whether a waiting sequence may take `needed` blocks of `available`: beside others, each of them keeps a block to
/// grow into, so that a sequence is not let in only to be thrown out.
pub(crate) fn admits(needed: usize, available: usize, running: usize) -> bool {
    needed + running <= available
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prompt(tokens: usize) -> Need {
        Need {
            tokens,
            chunk: 64,
            decodes: false,
            ready: true,
        }
    }

    fn decode() -> Need {
        Need {
            tokens: 1,
            chunk: 64,
            decodes: true,
            ready: true,
        }
    }

    fn pairs(slices: &[Slice]) -> Vec<(usize, usize)> {
        slices.iter().map(|s| (s.index, s.tokens)).collect()
    }

    #[test]
    fn streams_go_first_and_prompts_share_the_rest_in_chunks() {
        let needs = [prompt(1000), decode(), prompt(30), decode(), prompt(1000)];
        let slices = share(&needs, 128);
        assert_eq!(pairs(&slices), [(0, 64), (1, 1), (2, 30), (3, 1), (4, 32)]);
    }

    #[test]
    fn a_paused_sequence_takes_nothing() {
        let paused = Need {
            ready: false,
            ..prompt(10)
        };
        assert_eq!(pairs(&share(&[paused, prompt(5)], 8)), [(1, 5)]);
    }

    #[test]
    fn the_youngest_loses_and_never_an_older_one() {
        assert_eq!(victim(&[true, true, true], 0), Some(2));
        assert_eq!(victim(&[true, true, false], 1), Some(1));
        assert_eq!(victim(&[true, false, false], 1), None);
    }

    #[test]
    fn a_newcomer_leaves_room_for_the_others_to_grow() {
        assert!(admits(4, 4, 0));
        assert!(!admits(4, 4, 1));
        assert!(admits(4, 5, 1));
    }

    proptest! {
        #[test]
        fn a_step_keeps_its_budget_and_starves_nobody_it_has_room_for(
            needs in prop::collection::vec((1usize..200, any::<bool>(), any::<bool>()), 0..40),
            budget in 1usize..300,
        ) {
            let needs: Vec<Need> = needs
                .into_iter()
                .map(|(tokens, decodes, ready)| Need { tokens: if decodes { 1 } else { tokens }, chunk: 64, decodes, ready })
                .collect();
            let slices = share(&needs, budget);
            let total: usize = slices.iter().map(|s| s.tokens).sum();
            prop_assert!(total <= budget);
            for slice in &slices {
                let need = needs[slice.index];
                prop_assert!(need.ready && slice.tokens <= need.tokens.min(need.chunk));
            }
            let wanted: usize = needs.iter().filter(|n| n.ready).map(|n| n.tokens.min(64)).sum();
            prop_assert_eq!(total, wanted.min(budget), "no token of the budget is left while somebody could use it");
        }
    }
}
