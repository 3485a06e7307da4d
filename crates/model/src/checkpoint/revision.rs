//! What two processes compare before they share work: a hash of everything that decides the numbers.

use kernels::Precision;

use super::Checkpoint;

/// Pieces of a shard's data that enter the hash, spread evenly. Hashing all of a 689 GB checkpoint at every start would
/// take minutes; weights that differ at all differ in every piece after any training step.
const PIECES: usize = 64;
const PIECE_BYTES: usize = 4096;

impl Checkpoint {
    /// Hash (hex) of configuration, weights, precision and this crate's version: workers whose revisions differ must not
    /// exchange KV blocks or continue each other's sequences.
    pub fn revision(&self, precision: Precision) -> String {
        let mut hash = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(env!("CARGO_PKG_VERSION").as_bytes());
        part(format!("{precision:?}").as_bytes());
        part(format!("{:?}", self.config).as_bytes());
        for shard in &self.shards {
            let (header, data) = shard.map.split_at(shard.data);
            part(header);
            let step = (data.len() / PIECES).max(PIECE_BYTES);
            for start in (0..data.len()).step_by(step) {
                part(&data[start..data.len().min(start + PIECE_BYTES)]);
            }
        }
        hash.finalize().to_hex()[..32].to_owned()
    }
}
