//! Blocks in ordinary host memory: what the simulator and the tests keep KV in.

use std::ops::Range;

use kernels::{BlockMemory, Error, Result};
use parking_lot::RwLock;

/// Byte buffers, one a block. Readers and a writer of one block wait for each other.
#[derive(Debug)]
pub struct HostMemory {
    block_bytes: usize,
    blocks: Vec<RwLock<Box<[u8]>>>,
}

impl HostMemory {
    /// `blocks` zeroed blocks of `block_bytes` bytes.
    pub fn new(blocks: usize, block_bytes: usize) -> Self {
        Self {
            block_bytes,
            blocks: (0..blocks)
                .map(|_| RwLock::new(vec![0; block_bytes].into()))
                .collect(),
        }
    }

    fn check(&self, block: usize, bytes: &Range<usize>) -> Result<&RwLock<Box<[u8]>>> {
        let inside = bytes.start <= bytes.end && bytes.end <= self.block_bytes;
        match self.blocks.get(block) {
            Some(memory) if inside => Ok(memory),
            _ => Err(Error::Shape {
                op: "block memory",
                detail: format!(
                    "bytes {bytes:?} of block {block}: there are {} blocks of {} bytes",
                    self.blocks.len(),
                    self.block_bytes
                ),
            }),
        }
    }
}

impl BlockMemory for HostMemory {
    fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn read(&self, block: usize, bytes: Range<usize>, read: &mut dyn FnMut(&[u8])) -> Result<()> {
        read(&self.check(block, &bytes)?.read()[bytes]);
        Ok(())
    }

    fn write(
        &self,
        block: usize,
        bytes: Range<usize>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()> {
        write(&mut self.check(block, &bytes)?.write()[bytes]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_outside_are_refused_and_bytes_come_back() {
        let memory = HostMemory::new(2, 8);
        memory.write(1, 2..4, &mut |b| b.fill(9)).unwrap();
        let mut seen = Vec::new();
        memory.read(1, 0..8, &mut |b| seen = b.to_vec()).unwrap();
        assert_eq!(seen, [0, 0, 9, 9, 0, 0, 0, 0]);
        assert!(memory.read(2, 0..1, &mut |_| ()).is_err());
        assert!(memory.write(0, 7..9, &mut |_| ()).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "exactly what must be refused")]
        let reversed = 5..3;
        assert!(memory.read(0, reversed, &mut |_| ()).is_err());
    }
}
