//! Checksums of blocks, stored when they are filled.
//!
//! CRC-64/NVME over the valid rows of one layer of a block. It is computed once, while the bytes are warm, so that a
//! sender need not touch them again; what binds it to a request and a place travels with the transfer.

use std::ops::Range;

use crc_fast::{CrcAlgorithm, checksum};
use kernels::{BlockMemory, Result};

use crate::{BLOCK_TOKENS, BlockId, KvFormat, Pool, blocks_for};

impl Pool {
    /// The checksum of the first `tokens` rows of `layer` in `block`: the stored one, or computed and stored now. The
    /// caller holds the block and the rows are filled.
    ///
    /// # Errors
    /// If the memory can not be read.
    pub fn sum_rows(
        &self,
        memory: &dyn BlockMemory,
        format: &KvFormat,
        block: BlockId,
        layer: usize,
        tokens: usize,
    ) -> Result<u64> {
        if let Some(sum) = self.sum(block, layer, tokens) {
            return Ok(sum);
        }
        let mut sum = 0;
        memory.read(block.index(), format.span(layer, tokens), &mut |bytes| {
            sum = checksum(CrcAlgorithm::Crc64Nvme, bytes);
        })?;
        self.set_sum(block, layer, tokens, sum);
        Ok(sum)
    }
}

/// Blocks of a sequence of `total` tokens that are complete once tokens `first..end` are filled, given that all before
/// `first` were: full blocks, and the partial last one when the sequence ends.
pub fn complete_blocks(first: usize, end: usize, total: usize) -> Range<usize> {
    let last = if end == total {
        blocks_for(total)
    } else {
        end / BLOCK_TOKENS
    };
    (first / BLOCK_TOKENS).min(last)..last
}

#[cfg(test)]
mod tests {
    use kernels::DType;

    use super::*;
    use crate::HostMemory;

    #[test]
    fn stored_sums_are_those_of_the_bytes_and_die_with_them() {
        let format = KvFormat {
            revision: "r".into(),
            layers: 3,
            latent: 6,
            rope: 2,
            dtype: DType::Bf16,
        };
        let memory = HostMemory::new(1, format.block_bytes());
        let pool = Pool::new(1, "r");
        let blocks = pool.acquire(&[], 1).unwrap();
        let id = blocks.ids()[0];
        let fill = |add: u8| {
            let all = 0..format.block_bytes();
            let fill = &mut |bytes: &mut [u8]| {
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = add.wrapping_add(i as u8);
                }
            };
            memory.write(0, all, fill).unwrap();
        };
        fill(0);
        // Layer 1 begins at byte 1024 and a row has 16 bytes.
        let bytes: Vec<u8> = (0..160u8).collect();
        let direct = checksum(CrcAlgorithm::Crc64Nvme, &bytes);
        let sum = || pool.sum_rows(&memory, &format, id, 1, 10).unwrap();
        assert_eq!(sum(), direct);
        fill(1);
        assert_eq!(sum(), direct, "stored, not computed again");
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
