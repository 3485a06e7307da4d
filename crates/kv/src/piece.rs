//! What travels: pieces of blocks, and the checksums that bind bytes to where they belong.
//!
//! A piece is some layers of one block. Its payload is, layer by layer, the rows of its valid tokens: for a full block
//! exactly the bytes as they lie in memory. Rows behind the last token never leave the machine, whoever's they were.
//!
//! Two levels of CRC-64/NVME. One over the payload of each layer, stored when the layer of a block is filled, so that
//! a sender need not touch the bytes again. One over everything that says what the piece is, followed by those sums:
//! a payload under the wrong header is as wrong as a flipped bit.

use std::ops::Range;

use crc_fast::{CrcAlgorithm, Digest, checksum};
use kernels::{BlockMemory, Result};

use crate::{BLOCK_TOKENS, BlockId, KvFormat, Pool};

/// Some layers of one block of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which block of the sequence.
    pub block: usize,
    /// Which layers.
    pub layers: Range<usize>,
    /// Valid tokens of the block.
    pub tokens: usize,
}

impl Piece {
    /// Whether a block of this format has such a piece.
    pub fn fits(&self, format: &KvFormat) -> bool {
        (1..=BLOCK_TOKENS).contains(&self.tokens)
            && self.layers.start < self.layers.end
            && self.layers.end <= format.layers
    }

    /// Bytes of the payload of one layer.
    pub fn layer_payload_bytes(&self, format: &KvFormat) -> usize {
        self.tokens * format.row_bytes()
    }

    /// Bytes of the payload.
    pub fn payload_bytes(&self, format: &KvFormat) -> usize {
        self.layers.len() * self.layer_payload_bytes(format)
    }

    /// Where the payload lies in the block, in its order: one range where that is contiguous, else one a layer.
    pub fn spans(&self, format: &KvFormat) -> Vec<Range<usize>> {
        let spans = self
            .layers
            .clone()
            .map(|layer| format.span(layer, self.tokens));
        if self.tokens == BLOCK_TOKENS {
            let whole = spans.reduce(|a, b| a.start..b.end);
            return whole.into_iter().collect();
        }
        spans.collect()
    }
}

/// What every piece of one transfer has in common, and no piece of another has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The request.
    pub request: String,
    /// Which attempt at it.
    pub attempt: u32,
    /// The receiver's lease.
    pub lease: u64,
    /// The life of the receiver that gave the lease.
    pub incarnation: String,
    /// [`KvFormat::fingerprint`] of both ends.
    pub fingerprint: [u8; 32],
}

impl Binding {
    /// The checksum that travels with a piece; `sums` are those of its layers' payloads, in order.
    pub fn checksum(&self, piece: &Piece, sums: &[u64]) -> u64 {
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        // Lengths first, so that no two bindings give the same bytes.
        for text in [&self.request, &self.incarnation] {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        }
        digest.update(&self.fingerprint);
        let numbers = [
            u64::from(self.attempt),
            self.lease,
            piece.block as u64,
            piece.layers.start as u64,
            piece.layers.end as u64,
            piece.tokens as u64,
        ];
        for number in numbers.iter().chain(sums) {
            digest.update(&number.to_le_bytes());
        }
        digest.finalize()
    }
}

/// CRC-64/NVME of each layer of a received payload of `layer_bytes` bytes a layer.
pub fn payload_sums(payload: &[u8], layer_bytes: usize) -> Vec<u64> {
    payload
        .chunks(layer_bytes)
        .map(|layer| checksum(CrcAlgorithm::Crc64Nvme, layer))
        .collect()
}

impl Pool {
    /// Checksums of a piece's layers as they lie in `block`: the stored ones, computed (and stored) where there is
    /// none. The caller holds the block and its rows are filled.
    ///
    /// # Errors
    /// If the memory can not be read.
    pub fn sums(
        &self,
        memory: &dyn BlockMemory,
        format: &KvFormat,
        block: BlockId,
        piece: &Piece,
    ) -> Result<Vec<u64>> {
        piece
            .layers
            .clone()
            .map(|layer| {
                if let Some(sum) = self.sum(block, layer, piece.tokens) {
                    return Ok(sum);
                }
                let mut sum = 0;
                memory.read(
                    block.index(),
                    format.span(layer, piece.tokens),
                    &mut |bytes| sum = checksum(CrcAlgorithm::Crc64Nvme, bytes),
                )?;
                self.set_sum(block, layer, piece.tokens, sum);
                Ok(sum)
            })
            .collect()
    }
}

/// Blocks of a sequence of `total` tokens that are complete once tokens `first..end` are filled, given that all before
/// `first` were: full blocks, and the partial last one when the sequence ends.
pub fn complete_blocks(first: usize, end: usize, total: usize) -> Range<usize> {
    let last = if end == total {
        crate::blocks_for(total)
    } else {
        end / BLOCK_TOKENS
    };
    (first / BLOCK_TOKENS).min(last)..last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostMemory;
    use kernels::DType;

    fn format() -> KvFormat {
        KvFormat {
            revision: "r".into(),
            layers: 3,
            latent: 6,
            rope: 2,
            dtype: DType::Bf16,
        }
    }

    fn piece() -> Piece {
        Piece {
            block: 4,
            layers: 1..3,
            tokens: 10,
        }
    }

    fn binding() -> Binding {
        Binding {
            request: "req".into(),
            attempt: 1,
            lease: 9,
            incarnation: "pod".into(),
            fingerprint: format().fingerprint(),
        }
    }

    #[test]
    fn a_full_block_is_one_span_and_a_partial_one_a_span_a_layer() {
        let full = Piece {
            tokens: 64,
            ..piece()
        };
        assert_eq!(full.spans(&format()), vec![1024..3072; 1]);
        assert_eq!(piece().spans(&format()), [1024..1184, 2048..2208]);
        for piece in [full, piece()] {
            let bytes: usize = piece
                .spans(&format())
                .iter()
                .map(ExactSizeIterator::len)
                .sum();
            assert_eq!(bytes, piece.payload_bytes(&format()));
        }
    }

    #[test]
    fn pieces_outside_the_format_do_not_fit() {
        assert!(piece().fits(&format()));
        for (layers, tokens) in [(1..4, 10), (2..2, 10), (0..1, 0), (0..1, 65)] {
            let piece = Piece {
                block: 0,
                layers,
                tokens,
            };
            assert!(!piece.fits(&format()), "{piece:?}");
        }
    }

    #[test]
    fn every_part_of_the_header_is_bound() {
        let sums = [1, 2];
        let base = binding().checksum(&piece(), &sums);
        let b = binding;
        let bindings = [
            Binding {
                request: "reqp".into(),
                incarnation: "od".into(),
                ..b()
            },
            Binding { attempt: 2, ..b() },
            Binding { lease: 8, ..b() },
            Binding {
                incarnation: "pad".into(),
                ..b()
            },
            Binding {
                fingerprint: [0; 32],
                ..b()
            },
        ];
        for other in bindings {
            assert_ne!(other.checksum(&piece(), &sums), base, "{other:?}");
        }
        let pieces = [
            Piece {
                block: 5,
                ..piece()
            },
            Piece {
                layers: 0..2,
                ..piece()
            },
            Piece {
                tokens: 11,
                ..piece()
            },
        ];
        for other in pieces {
            assert_ne!(binding().checksum(&other, &sums), base, "{other:?}");
        }
        assert_ne!(
            binding().checksum(&piece(), &[2, 1]),
            base,
            "swapped layers"
        );
    }

    #[test]
    fn stored_sums_are_those_of_the_bytes_and_die_with_them() {
        let format = format();
        let memory = HostMemory::new(1, format.block_bytes());
        let pool = Pool::new(1, "r");
        let blocks = pool.acquire(&[], 1).unwrap();
        let id = blocks.ids()[0];
        memory
            .write(0, 0..format.block_bytes(), &mut |bytes| {
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = i as u8;
                }
            })
            .unwrap();
        let mut payload = Vec::new();
        for span in piece().spans(&format) {
            memory
                .read(0, span, &mut |b| payload.extend_from_slice(b))
                .unwrap();
        }
        let sums = pool.sums(&memory, &format, id, &piece()).unwrap();
        assert_eq!(
            sums,
            payload_sums(&payload, piece().layer_payload_bytes(&format))
        );
        assert_eq!(pool.sum(id, 1, 10), Some(sums[0]));
        assert_eq!(pool.sum(id, 1, 11), None, "of other rows");
        drop(blocks);
        let blocks = pool.acquire(&[], 1).unwrap();
        assert_eq!(pool.sum(blocks.ids()[0], 1, 10), None, "of another life");
    }

    #[test]
    fn blocks_are_complete_when_full_or_at_the_end() {
        assert_eq!(complete_blocks(0, 63, 200), 0..0);
        assert_eq!(complete_blocks(0, 64, 200), 0..1);
        assert_eq!(complete_blocks(64, 130, 200), 1..2);
        assert_eq!(complete_blocks(130, 200, 200), 2..4);
        assert_eq!(complete_blocks(130, 131, 200), 2..2);
        assert_eq!(complete_blocks(64, 128, 128), 1..2);
    }

    #[test]
    fn the_checksum_is_crc_64_nvme() {
        // The check value of the published catalogue.
        assert_eq!(
            checksum(CrcAlgorithm::Crc64Nvme, b"123456789"),
            0xae8b_1486_0a79_9888
        );
    }
}
