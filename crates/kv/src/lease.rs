//! Blocks on their way in: reserved for a peer that fills them.
//!
//! They are quarantined until [`Reservation::commit`]: no prefix leads to them. Dropping a reservation frees them at
//! once, so whoever lets a peer write keeps it until the peer has stopped (`transfer::protocol`).

use std::fmt;

use prefix::BlockHash;

use crate::{BlockId, Blocks, Pool};

/// Blocks for one sequence: leading ones with contents from the cache, the rest to be written by a peer.
pub struct Reservation {
    pool: Pool,
    /// Empty once they went on to a [`Blocks`].
    ids: Vec<BlockId>,
    cached: usize,
    hashes: Vec<BlockHash>,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("ids", &self.ids)
            .field("cached", &self.cached)
            .finish_non_exhaustive()
    }
}

impl Reservation {
    pub(crate) fn new(
        pool: Pool,
        ids: Vec<BlockId>,
        cached: usize,
        hashes: Vec<BlockHash>,
    ) -> Self {
        Self {
            pool,
            ids,
            cached,
            hashes,
        }
    }

    /// All blocks, in the order of the sequence.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Leading blocks that need not be sent.
    pub fn cached_blocks(&self) -> usize {
        self.cached
    }

    /// The sender delivered everything, every byte was verified and nobody writes any more: the blocks become a
    /// sequence's, and the full ones findable.
    pub fn commit(mut self) -> Blocks {
        let ids = std::mem::take(&mut self.ids);
        self.pool.with_state(|state| {
            state.settle(&ids[self.cached..]);
            for (&id, &hash) in ids.iter().zip(&self.hashes) {
                state.publish(id, hash);
            }
        });
        Blocks::new(self.pool.clone(), ids, self.cached)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let (cached, fresh) = self.ids.split_at(self.cached.min(self.ids.len()));
        self.pool.with_state(|state| {
            state.discard(fresh);
            state.release(cached);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{BLOCK_TOKENS, HostMemory, Usage};

    fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    #[test]
    fn reserved_blocks_are_nobody_elses_until_they_are_given_back() {
        let pool = Pool::new(4, "r");
        let reservation = pool.reserve(&tokens(130), b"").unwrap();
        assert_eq!(pool.usage().quarantined, 3);
        assert!(pool.acquire(&[], 2).is_err(), "the blocks can not be had");
        drop(reservation);
        assert_eq!(pool.check_integrity().unwrap().free, 4);
    }

    #[test]
    fn commit_publishes_full_blocks() {
        let pool = Pool::new(4, "r");
        let reservation = pool.reserve(&tokens(130), b"t").unwrap();
        assert_eq!(reservation.cached_blocks(), 0);
        assert_eq!(pool.snapshot().hashes.len(), 0);
        let blocks = reservation.commit();
        assert_eq!(blocks.ids().len(), 3);
        assert_eq!(pool.snapshot().hashes.len(), 2);
        drop(blocks);
        let expected = Usage {
            total: 4,
            free: 2,
            cached: 2,
            ..Usage::default()
        };
        assert_eq!(pool.check_integrity().unwrap(), expected);
        let again = pool.reserve(&tokens(130), b"t").unwrap();
        assert_eq!(again.cached_blocks(), 2);
        let other = pool.reserve(&tokens(64), b"other tenant").unwrap();
        assert_eq!(other.cached_blocks(), 0);
    }

    #[test]
    fn only_the_prompts_blocks_are_found_by_others() {
        let pool = Pool::new(8, "r");
        let all = tokens(200);
        let replayed = pool.reserve_beyond(&all[..100], all.len(), b"").unwrap();
        assert_eq!(replayed.ids().len(), 4);
        drop(replayed.commit());
        assert_eq!(pool.reserve(&all, b"").unwrap().cached_blocks(), 1);
    }

    #[test]
    fn an_aborted_reservation_leaves_nothing_in_the_cache() {
        let memory = Arc::new(HostMemory::new(2, BLOCK_TOKENS));
        let pool = Pool::poisoning(memory.clone(), "r");
        let reservation = pool.reserve(&tokens(128), b"").unwrap();
        let id = reservation.ids()[0].index();
        kernels::BlockMemory::write(&*memory, id, 0..8, &mut |b| b.fill(1)).unwrap();
        drop(reservation);
        assert_eq!(pool.snapshot().hashes, []);
        kernels::BlockMemory::read(&*memory, id, 0..8, &mut |b| assert_eq!(b, [0xff; 8])).unwrap();
    }

    #[test]
    #[should_panic(expected = "written after it was freed")]
    fn a_write_into_a_free_block_is_found() {
        let memory = Arc::new(HostMemory::new(1, BLOCK_TOKENS));
        let pool = Pool::poisoning(memory.clone(), "r");
        let id = pool.acquire(&[], 1).unwrap().ids()[0].index();
        kernels::BlockMemory::write(&*memory, id, 8..16, &mut |b| b.fill(1)).unwrap();
        let _ = pool.acquire(&[], 1);
    }
}
