//! The book of blocks: who holds what, which hash leads where. Pure; [`crate::Pool`] puts it behind a lock.
//!
//! A block is in exactly one place: free, used (by one holder or, when its contents have a hash, several), cached (a
//! hash and no holder) or quarantined (a peer may be writing it). Cached blocks are given up oldest release first.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use kernels::BlockMemory;
use planted::Bug;
use prefix::BlockHash;

use crate::{BlockId, changes::ChangeLog};

/// Too few blocks are free.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} KV blocks needed, {available} of {total} are free")]
pub struct NoBlocks {
    /// Blocks asked for beyond those found in the cache.
    pub needed: usize,
    /// Blocks that could have been had.
    pub available: usize,
    /// Blocks of the pool.
    pub total: usize,
}

/// Where the blocks are. `free + used + cached + quarantined == total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All blocks.
    pub total: usize,
    /// Blocks with nothing in them.
    pub free: usize,
    /// Blocks that sequences hold.
    pub used: usize,
    /// Blocks nobody holds, kept for their contents.
    pub cached: usize,
    /// Blocks that a peer may be writing.
    pub quarantined: usize,
}

impl Usage {
    /// Blocks that can be had at once.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Used { holders: u32 },
    Cached { released: u64 },
    Quarantined,
}

/// Checksum of the first `tokens` rows of one layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    tokens: usize,
    crc: u64,
}

#[derive(Debug)]
struct Block {
    place: Place,
    hash: Option<BlockHash>,
    sums: Vec<Option<Sum>>,
}

/// What tests fill dead contents with: NaN in every format.
const POISON: u8 = 0xff;

pub(crate) struct State {
    blocks: Vec<Block>,
    /// Last freed, first taken: reuse is as quick as it can be, so that a use after free shows early.
    free: Vec<BlockId>,
    index: HashMap<BlockHash, BlockId>,
    /// Cached blocks by the time of their release.
    cached: BTreeMap<u64, BlockId>,
    releases: u64,
    used: usize,
    quarantined: usize,
    pub(crate) log: ChangeLog,
    /// Tests: every block is filled with NaN the moment its contents die.
    poison: Option<Arc<dyn BlockMemory>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.usage().fmt(f)
    }
}

impl State {
    pub(crate) fn new(total: usize, poison: Option<Arc<dyn BlockMemory>>) -> Self {
        let blocks = (0..total)
            .map(|_| Block {
                place: Place::Free,
                hash: None,
                sums: Vec::new(),
            })
            .collect();
        let state = Self {
            blocks,
            free: (0..total as u32).rev().map(BlockId).collect(),
            index: HashMap::new(),
            cached: BTreeMap::new(),
            releases: 0,
            used: 0,
            quarantined: 0,
            log: ChangeLog::default(),
            poison,
        };
        for &id in &state.free {
            state.wipe(id);
        }
        state
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            total: self.blocks.len(),
            free: self.free.len(),
            used: self.used,
            cached: self.cached.len(),
            quarantined: self.quarantined,
        }
    }

    pub(crate) fn hashes(&self) -> Vec<BlockHash> {
        let mut hashes: Vec<_> = self.index.keys().copied().collect();
        hashes.sort_unstable();
        hashes
    }

    /// Leading hashes that lead to blocks.
    pub(crate) fn prefix_len(&self, hashes: &[BlockHash]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.index.contains_key(hash))
            .count()
    }

    /// Holds the longest cached prefix of `hashes` and fresh blocks up to `total`, or changes nothing. Fresh blocks are
    /// used, or quarantined if `write` says that a peer will fill them. Returns the blocks and how many were cached.
    pub(crate) fn acquire(
        &mut self,
        hashes: &[BlockHash],
        total: usize,
        write: bool,
    ) -> Result<(Vec<BlockId>, usize), NoBlocks> {
        let mut ids: Vec<BlockId> = hashes
            .iter()
            .take(total)
            .map_while(|hash| self.index.get(hash).copied())
            .collect();
        let cached = ids.len();
        for &id in &ids {
            self.hold(id);
        }
        let needed = total - cached;
        let available = self.usage().available();
        if needed > available {
            self.release(&ids);
            return Err(NoBlocks {
                needed,
                available,
                total: self.blocks.len(),
            });
        }
        ids.extend((0..needed).map(|_| self.take(write)));
        Ok((ids, cached))
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.index()];
        match &mut block.place {
            Place::Used { holders } => *holders += 1,
            Place::Cached { released } => {
                self.cached.remove(released);
                block.place = Place::Used { holders: 1 };
                self.used += 1;
            }
            Place::Free | Place::Quarantined => {
                unreachable!("only used and cached blocks stand in the index")
            }
        }
    }

    /// A fresh block; the caller made sure that one can be had.
    fn take(&mut self, write: bool) -> BlockId {
        let id = self.free.pop().unwrap_or_else(|| self.evict());
        self.check_wiped(id);
        let block = &mut self.blocks[id.index()];
        block.sums.clear();
        if write {
            block.place = Place::Quarantined;
            self.quarantined += 1;
        } else {
            block.place = Place::Used { holders: 1 };
            self.used += 1;
        }
        id
    }

    fn evict(&mut self) -> BlockId {
        let (_, id) = self
            .cached
            .pop_first()
            .expect("the caller counted free and cached blocks");
        let hash = self.blocks[id.index()]
            .hash
            .take()
            .expect("a cached block has a hash");
        if !planted::is(Bug::StalePrefix) {
            self.index.remove(&hash);
            self.log.record(hash, false);
        }
        self.wipe(id);
        id
    }

    /// Lets go of blocks. The last of a sequence go first, so that a prefix outlives what follows it.
    pub(crate) fn release(&mut self, ids: &[BlockId]) {
        for &id in ids.iter().rev() {
            let block = &mut self.blocks[id.index()];
            let Place::Used { holders } = &mut block.place else {
                unreachable!("guards hold used blocks only");
            };
            *holders -= 1;
            if *holders > 0 {
                continue;
            }
            self.used -= 1;
            if block.hash.is_some() {
                self.releases += 1;
                block.place = Place::Cached {
                    released: self.releases,
                };
                self.cached.insert(self.releases, id);
            } else {
                self.set_free(id);
            }
        }
    }

    fn set_free(&mut self, id: BlockId) {
        self.blocks[id.index()].place = Place::Free;
        self.wipe(id);
        self.free.push(id);
    }

    /// Gives a block that holds the whole, verified KV of `hash` its name. The first block of a name keeps it.
    pub(crate) fn publish(&mut self, id: BlockId, hash: BlockHash) {
        let block = &mut self.blocks[id.index()];
        debug_assert!(
            matches!(block.place, Place::Used { .. }),
            "only what a sequence holds and has filled is published"
        );
        if block.hash.is_none() && !self.index.contains_key(&hash) {
            block.hash = Some(hash);
            self.index.insert(hash, id);
            self.log.record(hash, true);
        }
    }

    /// Takes the names of blocks away: their contents are in doubt. Who holds them keeps them.
    pub(crate) fn withdraw(&mut self, ids: &[BlockId]) {
        for id in ids {
            if let Some(hash) = self.blocks[id.index()].hash.take() {
                self.index.remove(&hash);
                self.log.record(hash, false);
            }
        }
    }

    /// No writer is left and the contents are right: the blocks are their holder's.
    pub(crate) fn settle(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.leave_quarantine(*id);
            self.blocks[id.index()].place = Place::Used { holders: 1 };
            self.used += 1;
        }
    }

    /// No writer is left and the contents are worth nothing.
    pub(crate) fn discard(&mut self, ids: &[BlockId]) {
        for id in ids {
            self.leave_quarantine(*id);
            self.set_free(*id);
        }
    }

    fn leave_quarantine(&mut self, id: BlockId) {
        debug_assert_eq!(self.blocks[id.index()].place, Place::Quarantined);
        self.quarantined -= 1;
    }

    /// Forgets all contents nobody uses.
    pub(crate) fn clear_cache(&mut self) {
        while !self.cached.is_empty() {
            let id = self.evict();
            self.blocks[id.index()].place = Place::Free;
            self.free.push(id);
        }
    }

    fn wipe(&self, id: BlockId) {
        if let Some(memory) = &self.poison {
            memory
                .write(id.index(), 0..memory.block_bytes(), &mut |bytes| {
                    bytes.fill(POISON);
                })
                .expect("nobody reads or writes a block that nobody holds");
        }
    }

    /// Tests: nobody wrote into the block after its contents had died.
    fn check_wiped(&self, id: BlockId) {
        if let Some(memory) = &self.poison {
            memory
                .read(id.index(), 0..memory.block_bytes(), &mut |bytes| {
                    let written = bytes.iter().any(|&byte| byte != POISON);
                    assert!(!written, "block {} was written after it was freed", id.0);
                })
                .expect("nobody reads or writes a block that nobody holds");
        }
    }

    pub(crate) fn set_sum(&mut self, id: BlockId, layer: usize, tokens: usize, crc: u64) {
        let sums = &mut self.blocks[id.index()].sums;
        if sums.len() <= layer {
            sums.resize(layer + 1, None);
        }
        sums[layer] = Some(Sum { tokens, crc });
    }

    pub(crate) fn sum(&self, id: BlockId, layer: usize, tokens: usize) -> Option<u64> {
        let sum = self.blocks[id.index()].sums.get(layer)?.as_ref()?;
        (sum.tokens == tokens).then_some(sum.crc)
    }

    /// Counts everything anew and compares with the books.
    pub(crate) fn check(&self) -> Result<Usage, String> {
        let mut counted = Usage {
            total: self.blocks.len(),
            ..Usage::default()
        };
        for (i, block) in self.blocks.iter().enumerate() {
            let id = BlockId(i as u32);
            let named = block.hash.is_some();
            let sound = match block.place {
                Place::Free => {
                    counted.free += 1;
                    !named
                }
                Place::Used { holders } => {
                    counted.used += 1;
                    holders > 0
                }
                Place::Cached { released } => {
                    counted.cached += 1;
                    named && self.cached.get(&released) == Some(&id)
                }
                Place::Quarantined => {
                    counted.quarantined += 1;
                    !named
                }
            };
            let found = block.hash.is_none_or(|h| self.index.get(&h) == Some(&id));
            if !sound || !found {
                return Err(format!("block {i} is broken: {block:?}"));
            }
        }
        let named = self.blocks.iter().filter(|b| b.hash.is_some()).count();
        if named != self.index.len() {
            return Err(format!(
                "{} hashes lead to {named} named blocks",
                self.index.len()
            ));
        }
        if let Some(id) = self
            .free
            .iter()
            .find(|id| self.blocks[id.index()].place != Place::Free)
        {
            return Err(format!("block {} is in the free list and in use", id.0));
        }
        if counted == self.usage() {
            Ok(counted)
        } else {
            Err(format!("counted {counted:?}, booked {:?}", self.usage()))
        }
    }
}
