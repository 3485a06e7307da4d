//! Names of prefix-cache blocks, computed alike by workers (what they hold) and by the router (what a prompt needs).
//!
//! A block's name covers every token before it as well: it is the BLAKE3 hash of its parent's name and its own tokens,
//! and the first block's parent is the root of the tenant's cache salt. Two prompts therefore share a block's name
//! exactly when they share all tokens up to its end and the salt. BLAKE3 is collision resistant, so nobody can craft a
//! prompt that is answered from somebody else's cache.

/// Name of one full block of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

/// Separates these hashes from every other use of BLAKE3.
const CONTEXT: &str = "hadal 2026 kv block prefix chain v1";

impl BlockHash {
    /// The parent of a sequence's first block, for a tenant's salt (empty for none).
    pub fn root(salt: &[u8]) -> Self {
        Self(blake3::derive_key(CONTEXT, salt))
    }

    /// The block of `tokens` that follows `self`.
    #[must_use]
    pub fn child(&self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        // In pieces: one update of many bytes is several times faster than one update for each token.
        let mut bytes = [0_u8; 256];
        for piece in tokens.chunks(64) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(piece) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..piece.len() * 4]);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The short form that workers report and the router indexes: a hint for routing, never a key to bytes.
    pub fn wire(&self) -> u64 {
        let mut first = [0_u8; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(first)
    }
}

/// Names of the full blocks of `tokens`, in order; a partial block at the end has no name.
///
/// # Panics
/// When `block_tokens` is 0.
pub fn chain(salt: &[u8], tokens: &[u32], block_tokens: usize) -> impl Iterator<Item = BlockHash> {
    let mut parent = BlockHash::root(salt);
    tokens.chunks_exact(block_tokens).map(move |block| {
        parent = parent.child(block);
        parent
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_full_blocks_are_named() {
        let tokens: Vec<u32> = (0..150).collect();
        assert_eq!(chain(b"", &tokens, 64).count(), 2);
        assert_eq!(chain(b"", &tokens[..63], 64).count(), 0);
    }

    #[test]
    fn a_name_covers_all_tokens_before_it_and_the_salt() {
        let tokens: Vec<u32> = (0..128).collect();
        let names: Vec<_> = chain(b"", &tokens, 64).collect();
        let mut other = tokens.clone();
        other[3] = 999;
        let changed: Vec<_> = chain(b"", &other, 64).collect();
        assert_ne!(names[0], changed[0]);
        assert_ne!(names[1], changed[1]);
        other = tokens.clone();
        other[127] = 999;
        let changed: Vec<_> = chain(b"", &other, 64).collect();
        assert_eq!(names[0], changed[0]);
        assert_ne!(names[1], changed[1]);
        let salted: Vec<_> = chain(b"tenant", &tokens, 64).collect();
        assert_ne!(names[0], salted[0]);
    }

    #[test]
    fn names_never_change_between_versions() {
        // Workers and routers of different builds must agree while one replaces the other.
        let tokens: Vec<u32> = (0..64).collect();
        let name = chain(b"", &tokens, 64).next().expect("one block");
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        let root = blake3::derive_key("hadal 2026 kv block prefix chain v1", b"");
        assert_eq!(name.0, *blake3::keyed_hash(&root, &bytes).as_bytes());
        assert_eq!(name.wire().to_le_bytes(), name.0[..8]);
    }
}
