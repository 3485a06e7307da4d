//! Prompts of a wanted length from token ids that mean nothing: what is measured is the work, not the answer.

use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// Ids below this are special tokens in DeepSeek's vocabularies (begin, end, padding and a few more).
const FIRST_ID: u32 = 16;

/// Draws token ids.
#[derive(Clone, Copy, Debug)]
pub(super) struct Prompts {
    pub(super) vocabulary: u32,
    pub(super) seed: u64,
}

impl Prompts {
    /// `tokens` ids that depend on `name` and the seed alone.
    pub(super) fn block(&self, name: u64, tokens: u64) -> Vec<u32> {
        // Mixed by the golden ratio, so that neighbouring names are far apart.
        let mut random =
            SmallRng::seed_from_u64(self.seed ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..tokens)
            .map(|_| FIRST_ID + random.random_range(0..self.vocabulary))
            .collect()
    }

    /// `tokens` ids of which the leading `shared` are the same in every prompt.
    pub(super) fn with_prefix(&self, name: u64, tokens: u64, shared: u64) -> Vec<u32> {
        let shared = shared.min(tokens);
        let mut ids = self.block(u64::MAX, shared);
        ids.extend(self.block(name, tokens - shared));
        ids
    }

    /// `tokens` ids cut from the blocks of a trace: equal block ids give equal tokens.
    pub(super) fn cut_from_blocks(
        &self,
        blocks: &[u64],
        block_tokens: u64,
        tokens: u64,
    ) -> Vec<u32> {
        let mut ids: Vec<u32> = blocks
            .iter()
            .flat_map(|&block| self.block(block, block_tokens))
            .collect();
        ids.truncate(tokens as usize);
        let missing = tokens - ids.len() as u64;
        ids.extend(self.block(
            blocks.last().copied().unwrap_or_default() ^ u64::MAX,
            missing,
        ));
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPTS: Prompts = Prompts {
        vocabulary: 200,
        seed: 1,
    };

    #[test]
    fn prompts_are_repeatable_and_of_the_wanted_length() {
        let prompt = PROMPTS.with_prefix(7, 100, 30);
        assert_eq!(prompt.len(), 100);
        assert_eq!(prompt, PROMPTS.with_prefix(7, 100, 30));
        assert!(prompt.iter().all(|id| (16..216).contains(id)));
    }

    #[test]
    fn only_the_shared_part_is_shared() {
        let (a, b) = (
            PROMPTS.with_prefix(1, 100, 30),
            PROMPTS.with_prefix(2, 100, 30),
        );
        assert_eq!(a[..30], b[..30]);
        assert_ne!(a[30..], b[30..]);
    }

    #[test]
    fn equal_blocks_of_a_trace_give_equal_tokens() {
        let (a, b) = (
            PROMPTS.cut_from_blocks(&[0, 1], 8, 14),
            PROMPTS.cut_from_blocks(&[0, 2], 8, 20),
        );
        assert_eq!((a.len(), b.len()), (14, 20));
        assert_eq!(a[..8], b[..8]);
        assert_ne!(a[8..], b[8..14]);
    }
}
