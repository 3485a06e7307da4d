//! The pool of one worker's blocks, and the guard of blocks that a sequence holds.

use std::{fmt, sync::Arc};

use kernels::BlockMemory;
use parking_lot::Mutex;
use prefix::{BlockHash, Chain, block_hashes};

use crate::{BlockId, Changes, NoBlocks, Reservation, Snapshot, Usage, blocks_for, state::State};

/// The blocks of one worker; clones share them.
#[derive(Clone)]
pub struct Pool {
    state: Arc<Mutex<State>>,
    revision: Arc<str>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `blocks` free blocks. `revision` names what computes their contents and is part of every hash.
    pub fn new(blocks: usize, revision: &str) -> Self {
        Self::build(blocks, revision, None)
    }

    /// A pool that fills blocks of `memory` with NaN as soon as their contents die: tests see who reads them after.
    pub fn poisoning(memory: Arc<dyn BlockMemory>, revision: &str) -> Self {
        Self::build(memory.blocks(), revision, Some(memory))
    }

    fn build(blocks: usize, revision: &str, poison: Option<Arc<dyn BlockMemory>>) -> Self {
        Self {
            state: Arc::new(Mutex::new(State::new(blocks, poison))),
            revision: revision.into(),
        }
    }

    /// The start of the hash chain of a tenant's sequences.
    pub fn chain(&self, salt: &[u8]) -> Chain {
        Chain::new(&self.revision, salt)
    }

    /// Hashes of all full blocks of `tokens`.
    pub fn hashes(&self, tokens: &[u32], salt: &[u8]) -> Vec<BlockHash> {
        block_hashes(&self.revision, salt, tokens)
    }

    /// How many leading blocks of `hashes` are cached now.
    pub fn prefix_len(&self, hashes: &[BlockHash]) -> usize {
        self.state.lock().prefix_len(hashes)
    }

    /// `blocks` blocks to compute into, of which the leading ones may come from the cache with their contents:
    /// those found under `hashes`, in order, up to the first that is missing.
    ///
    /// # Errors
    /// If too few can be had; nothing is held then.
    pub fn acquire(&self, hashes: &[BlockHash], blocks: usize) -> Result<Blocks, NoBlocks> {
        let (ids, cached) = self.state.lock().acquire(hashes, blocks, false)?;
        Ok(Blocks {
            pool: self.clone(),
            ids,
            cached,
        })
    }

    /// Blocks for the KV of `tokens`, to be filled by a peer except where the cache has them already.
    ///
    /// # Errors
    /// If too few can be had; nothing is held then.
    pub fn reserve(&self, tokens: &[u32], salt: &[u8]) -> Result<Reservation, NoBlocks> {
        self.reserve_beyond(tokens, tokens.len(), salt)
    }

    /// As [`Pool::reserve`], for `tokens` tokens of which only those of `prompt` may be found by others: a prompt's KV is
    /// computed in another form than that of tokens that were generated one by one, and must not stand for it.
    ///
    /// # Errors
    /// As [`Pool::reserve`].
    pub fn reserve_beyond(
        &self,
        prompt: &[u32],
        tokens: usize,
        salt: &[u8],
    ) -> Result<Reservation, NoBlocks> {
        let hashes = self.hashes(prompt, salt);
        let blocks = blocks_for(tokens);
        let (ids, cached) = self.state.lock().acquire(&hashes, blocks, true)?;
        Ok(Reservation::new(self.clone(), ids, cached, hashes))
    }

    /// Where the blocks are now.
    pub fn usage(&self) -> Usage {
        self.state.lock().usage()
    }

    /// All hashes that prefixes can be found under.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state.lock();
        Snapshot {
            version: state.log.version(),
            hashes: state.hashes(),
        }
    }

    /// What changed since `version`; `None` if that is too long ago: take a snapshot.
    pub fn changes(&self, version: u64) -> Option<Changes> {
        self.state.lock().log.since(version)
    }

    /// Stores the CRC-64/NVME of the first `tokens` rows of a layer of a block that the caller holds and has filled.
    pub fn set_sum(&self, block: BlockId, layer: usize, tokens: usize, crc: u64) {
        self.state.lock().set_sum(block, layer, tokens, crc);
    }

    /// The checksum stored for exactly these rows of a block that the caller holds.
    pub fn sum(&self, block: BlockId, layer: usize, tokens: usize) -> Option<u64> {
        self.state.lock().sum(block, layer, tokens)
    }

    /// Forgets all contents that nobody uses.
    pub fn clear_cache(&self) {
        self.state.lock().clear_cache();
    }

    /// Counts every block and compares with the books: `free + used + cached + quarantined == total`, each block in one
    /// place, the index exact.
    ///
    /// # Errors
    /// What does not agree. The pool can not be trusted then.
    pub fn check_integrity(&self) -> Result<Usage, String> {
        self.state.lock().check()
    }

    pub(crate) fn with_state<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        f(&mut self.state.lock())
    }
}

/// Blocks of one sequence, in order; given back when dropped, those with a published hash to the cache.
pub struct Blocks {
    pool: Pool,
    ids: Vec<BlockId>,
    cached: usize,
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocks")
            .field("ids", &self.ids)
            .field("cached", &self.cached)
            .finish_non_exhaustive()
    }
}

impl Blocks {
    pub(crate) fn new(pool: Pool, ids: Vec<BlockId>, cached: usize) -> Self {
        Self { pool, ids, cached }
    }

    /// The blocks, in the order of the sequence.
    pub fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Leading blocks that came from the cache.
    pub fn cached_blocks(&self) -> usize {
        self.cached
    }

    /// The pool they belong to.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// One block more.
    ///
    /// # Errors
    /// If none can be had.
    pub fn grow(&mut self) -> Result<(), NoBlocks> {
        let (ids, _) = self.pool.state.lock().acquire(&[], 1, false)?;
        self.ids.extend(ids);
        Ok(())
    }

    /// Makes block `index` of the sequence findable: its KV is complete and right.
    pub fn publish(&self, index: usize, hash: BlockHash) {
        self.pool.state.lock().publish(self.ids[index], hash);
    }

    /// Makes all of them unfindable: what they hold gave an answer that can not be. Other holders keep them, nobody
    /// else gets them.
    pub fn withdraw(&self) {
        self.pool.state.lock().withdraw(&self.ids);
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.pool.state.lock().release(&self.ids);
    }
}
