//! The paged latent cache: block pool, prefix index, wire layout of a block, checksums.

/// A handle to the blocks of one worker; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Pool;

/// Blocks held together; freed (or returned to the prefix cache) when dropped.
#[derive(Debug)]
pub struct Blocks;
