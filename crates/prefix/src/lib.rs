//! Names for the blocks of a token sequence, the same in every process and version.
//!
//! A block's hash covers everything that decides its KV: all tokens up to its end, the revision that computes it and
//! the tenant's salt. Workers index their caches by it and the router looks prompts up by it, so it stands in a crate
//! of its own that both may use. [`BLOCK_TOKENS`] tokens make a block; a partial block has no hash.

/// Tokens of a KV block.
pub const BLOCK_TOKENS: usize = 64;

/// Name of one block: the first 64 bits of a keyed BLAKE3 hash, never zero.
pub type BlockHash = u64;

/// Hashes of all full blocks of `tokens`, each chained to the one before.
///
/// `revision` is what prefill and decode share (model, precision, KV format, image); `salt` separates tenants. BLAKE3
/// is used and not a faster hash because a collision that somebody can construct would serve one tenant's cache to
/// another (vLLM's CVE-2025-25183 was such a collision).
pub fn block_hashes(revision: &str, salt: &[u8], tokens: &[u32]) -> Vec<BlockHash> {
    let mut chain = Chain::new(revision, salt);
    tokens
        .as_chunks::<BLOCK_TOKENS>()
        .0
        .iter()
        .map(|block| chain.push(block))
        .collect()
}

/// The hashes of a sequence that grows: one block after the other.
#[derive(Clone, Debug)]
pub struct Chain {
    parent: [u8; 32],
}

impl Chain {
    /// The chain's start: depends on revision and salt only.
    pub fn new(revision: &str, salt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("hadal.v1 block hash");
        hasher.update(&(revision.len() as u64).to_le_bytes());
        hasher.update(revision.as_bytes());
        hasher.update(salt);
        Self {
            parent: *hasher.finalize().as_bytes(),
        }
    }

    /// The hash of the next full block.
    pub fn push(&mut self, block: &[u32; BLOCK_TOKENS]) -> BlockHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.parent);
        let mut bytes = [[0; 4]; BLOCK_TOKENS];
        for (bytes, token) in bytes.iter_mut().zip(block) {
            *bytes = token.to_le_bytes();
        }
        hasher.update(bytes.as_flattened());
        self.parent = *hasher.finalize().as_bytes();
        name(&self.parent)
    }
}

/// Zero is kept free for "no hash" on the wire.
fn name(hash: &[u8; 32]) -> BlockHash {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    u64::from_le_bytes([a, b, c, d, e, f, g, h]).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(n: u32) -> Vec<u32> {
        (0..n).map(|i| i * 7 % 1000).collect()
    }

    #[test]
    fn a_longer_sequence_keeps_the_hashes_of_its_prefix() {
        let long = block_hashes("r1", b"", &tokens(300));
        assert_eq!(long.len(), 4);
        assert_eq!(block_hashes("r1", b"", &tokens(130)), long[..2]);
    }

    #[test]
    fn revision_salt_and_every_earlier_token_change_the_hash() {
        let base = block_hashes("r1", b"", &tokens(128));
        assert_ne!(base, block_hashes("r2", b"", &tokens(128)));
        assert_ne!(base, block_hashes("r1", b"tenant", &tokens(128)));
        let mut changed = tokens(128);
        changed[0] += 1;
        let other = block_hashes("r1", b"", &changed);
        assert_ne!(base[0], other[0]);
        assert_ne!(base[1], other[1], "the chain carries the change on");
    }

    #[test]
    fn hashes_never_change_between_versions() {
        // Stored indexes and peers of another version depend on these very numbers.
        assert_eq!(block_hashes("r1", b"s", &tokens(64)), [GOLDEN]);
    }

    const GOLDEN: BlockHash = 439_189_860_077_582_839;
}
