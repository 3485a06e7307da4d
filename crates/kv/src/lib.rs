//! The paged latent cache: block pool, prefix index, layout of a block, checksums.
//!
//! [`Pool`] hands out blocks of 64 tokens as guards: [`Blocks`] of a running sequence, and [`Reservation`]s that a peer
//! fills. A guard gives its blocks back when dropped; full blocks whose contents are known to be right stay findable by
//! their hash until their room is needed. [`KvFormat`] says where in a block what lies. The bytes themselves belong to
//! the backend (`kernels::BlockMemory`).

mod changes;
mod format;
mod host;
mod lease;
mod pool;
mod state;
mod sums;

pub use changes::{Changes, Snapshot};
pub use format::KvFormat;
pub use host::HostMemory;
pub use lease::Reservation;
pub use pool::{Blocks, Pool};
pub use prefix::{BLOCK_TOKENS, BlockHash};
pub use state::{NoBlocks, Usage};
pub use sums::complete_blocks;

/// A place for one block's KV in a worker's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

impl BlockId {
    /// As an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// Blocks that `tokens` tokens fill, the last perhaps partly.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
