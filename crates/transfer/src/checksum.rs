//! Checksums, always on. CRC-64/NVME detects every burst of errors up to 64 bits, and runs at memory speed.
//!
//! A piece's checksum covers the transfer's identity, the piece's header and the checksum of each layer's bytes. The
//! layers' own checksums stay useful by themselves: the seal covers them in order, however the bytes were cut.

use crate::geometry::Piece;

/// A running checksum.
#[derive(Debug)]
pub struct Sum(crc_fast::Digest);

impl Default for Sum {
    fn default() -> Self {
        Self::new()
    }
}

impl Sum {
    /// Of no bytes yet.
    pub fn new() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme))
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum.
    pub fn finish(self) -> u64 {
        self.0.finalize()
    }
}

/// Checksum of the bytes of one layer of a block.
pub fn layer(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// Checksum of a piece: `seed` is [`crate::Identity::seed`], `layers` the checksum of each of its layers.
pub fn piece(seed: u64, piece: &Piece, layers: &[u64]) -> u64 {
    let mut sum = Sum::new();
    sum.update(&seed.to_le_bytes());
    for number in [piece.block, piece.first_layer, piece.layers, piece.tokens] {
        sum.update(&number.to_le_bytes());
    }
    for layer in layers {
        sum.update(&layer.to_le_bytes());
    }
    sum.finish()
}

/// Checksum of a whole transfer: of its layers' checksums in order of (block, layer).
pub fn seal(seed: u64, layers: impl IntoIterator<Item = u64>) -> u64 {
    let mut sum = Sum::new();
    sum.update(&seed.to_le_bytes());
    for layer in layers {
        sum.update(&layer.to_le_bytes());
    }
    sum.finish()
}
