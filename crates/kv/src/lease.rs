//! Blocks on their way in: reserved for a peer that fills them.
//!
//! While any [`Writer`] lives, bytes may still land in the blocks, so they stay quarantined: dropping the
//! [`Reservation`] refuses new writers and new pieces at once but frees nothing under an open one.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use prefix::BlockHash;

use crate::{BlockId, Blocks, Pool};

struct Inner {
    pool: Pool,
    ids: Vec<BlockId>,
    cached: usize,
    hashes: Vec<BlockHash>,
    closed: AtomicBool,
    /// Set when the blocks went on to a [`Blocks`].
    committed: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let (cached, fresh) = self.ids.split_at(self.cached);
        self.pool.with_state(|state| {
            state.discard(fresh);
            state.release(cached);
        });
    }
}

/// Blocks for one sequence: leading ones with contents from the cache, the rest to be written by a peer.
pub struct Reservation {
    inner: Arc<Inner>,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("ids", &self.inner.ids)
            .field("cached", &self.inner.cached)
            .field("writers", &(Arc::strong_count(&self.inner) - 1))
            .finish()
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
            inner: Arc::new(Inner {
                pool,
                ids,
                cached,
                hashes,
                closed: AtomicBool::new(false),
                committed: false,
            }),
        }
    }

    /// All blocks, in the order of the sequence.
    pub fn ids(&self) -> &[BlockId] {
        &self.inner.ids
    }

    /// Leading blocks that need not be sent.
    pub fn cached_blocks(&self) -> usize {
        self.inner.cached
    }

    /// Permission to write the blocks that are not cached.
    pub fn writer(&self) -> Writer {
        Writer {
            inner: Arc::clone(&self.inner),
        }
    }

    /// The sender delivered everything and every byte was verified: the blocks become a sequence's, and the full ones
    /// findable.
    ///
    /// # Errors
    /// Gives the reservation back while a writer is open.
    pub fn commit(mut self) -> Result<Blocks, Self> {
        let Some(inner) = Arc::get_mut(&mut self.inner) else {
            return Err(self);
        };
        inner.committed = true;
        let ids = std::mem::take(&mut inner.ids);
        inner.pool.with_state(|state| {
            state.settle(&ids[inner.cached..]);
            for (&id, &hash) in ids.iter().zip(&inner.hashes) {
                state.publish(id, hash);
            }
        });
        Ok(Blocks::new(inner.pool.clone(), ids, inner.cached))
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.inner.closed.store(true, Ordering::Release);
    }
}

/// Somebody who may be writing; clones are other writers of the same reservation.
#[derive(Clone)]
pub struct Writer {
    inner: Arc<Inner>,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("open", &self.is_open())
            .finish_non_exhaustive()
    }
}

impl Writer {
    /// Whether the reservation still stands. Once it does not, nothing may be written any more.
    pub fn is_open(&self) -> bool {
        !self.inner.closed.load(Ordering::Acquire)
    }

    /// The block to write for block `index` of the sequence: `None` for one outside, one that came from the cache (and
    /// may be in use), and after the reservation is gone.
    pub fn target(&self, index: usize) -> Option<BlockId> {
        let writable = self.is_open() && index >= self.inner.cached;
        writable
            .then(|| self.inner.ids.get(index).copied())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BLOCK_TOKENS, HostMemory, Usage};

    fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).collect()
    }

    #[test]
    fn nothing_is_freed_under_a_writer() {
        let pool = Pool::new(4, "r");
        let reservation = pool.reserve(&tokens(130), b"").unwrap();
        let writer = reservation.writer();
        assert_eq!(writer.target(2), Some(reservation.ids()[2]));
        assert_eq!(writer.target(3), None);
        drop(reservation);
        assert!(!writer.is_open());
        assert_eq!(writer.target(0), None, "late data is refused");
        assert_eq!(pool.usage().quarantined, 3);
        assert!(pool.acquire(&[], 2).is_err(), "the blocks can not be had");
        drop(writer);
        assert_eq!(pool.check_integrity().unwrap().free, 4);
    }

    #[test]
    fn commit_waits_for_writers_and_publishes_full_blocks() {
        let pool = Pool::new(4, "r");
        let reservation = pool.reserve(&tokens(130), b"t").unwrap();
        assert_eq!(reservation.cached_blocks(), 0);
        let writer = reservation.writer();
        let reservation = reservation.commit().expect_err("a writer is open");
        assert_eq!(pool.snapshot().hashes.len(), 0);
        drop(writer);
        let blocks = reservation.commit().unwrap();
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
        assert_eq!(
            again.writer().target(1),
            None,
            "cached blocks are not written"
        );
        let other = pool.reserve(&tokens(64), b"other tenant").unwrap();
        assert_eq!(other.cached_blocks(), 0);
    }

    #[test]
    fn only_the_prompts_blocks_are_found_by_others() {
        let pool = Pool::new(8, "r");
        let all = tokens(200);
        let replayed = pool.reserve_beyond(&all[..100], all.len(), b"").unwrap();
        assert_eq!(replayed.ids().len(), 4);
        drop(replayed.commit().unwrap());
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
}
