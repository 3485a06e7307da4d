//! The shape of what is moved: [`Geometry`] of a block, [`Plan`] of a transfer, [`Piece`] of a block.

use std::ops::Range;

/// How the bytes of a block lie: `[layer][token][token_bytes]`, one contiguous piece of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Layers of a block.
    pub layers: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Bytes of one token in one layer.
    pub token_bytes: u32,
}

impl Geometry {
    /// Bytes of one layer of a block.
    pub fn layer_bytes(&self) -> usize {
        self.block_tokens as usize * self.token_bytes as usize
    }

    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> usize {
        self.layers as usize * self.layer_bytes()
    }
}

/// What a transfer moves: blocks `first_block..total_blocks` of a sequence of `total_tokens` tokens, all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Shape of a block.
    pub geometry: Geometry,
    /// Leading blocks of the sequence that the receiver already holds.
    pub first_block: u32,
    /// Tokens of the sequence; the last block may be partial.
    pub total_tokens: u32,
}

impl Plan {
    /// Blocks of the whole sequence.
    pub fn total_blocks(&self) -> u32 {
        self.total_tokens.div_ceil(self.geometry.block_tokens)
    }

    /// Blocks to move.
    pub fn blocks(&self) -> Range<u32> {
        self.first_block..self.total_blocks().max(self.first_block)
    }

    /// Valid tokens of block `block` of the sequence (0 behind its end).
    pub fn tokens(&self, block: u32) -> u32 {
        self.total_tokens
            .saturating_sub(block.saturating_mul(self.geometry.block_tokens))
            .min(self.geometry.block_tokens)
    }

    /// One past the last token of block `block`.
    pub fn end(&self, block: u32) -> u32 {
        block * self.geometry.block_tokens + self.tokens(block)
    }

    /// Pairs of (block, layer) to move.
    pub fn parts(&self) -> usize {
        self.blocks().len() * self.geometry.layers as usize
    }

    /// Bytes to move.
    pub fn bytes(&self) -> u64 {
        let tokens: u64 = self.blocks().map(|b| u64::from(self.tokens(b))).sum();
        tokens * u64::from(self.geometry.token_bytes) * u64::from(self.geometry.layers)
    }

    /// Whether `piece` lies inside this plan and has one contiguous range of bytes.
    pub fn holds(&self, piece: &Piece) -> bool {
        self.blocks().contains(&piece.block)
            && piece.layers > 0
            && piece.first_layer < self.geometry.layers
            && piece.layers <= self.geometry.layers - piece.first_layer
            && piece.tokens == self.tokens(piece.block)
            && (piece.layers == 1 || piece.tokens == self.geometry.block_tokens)
    }

    /// Position of (`block`, `layer`) among the parts, in order of block, then layer.
    pub fn part(&self, block: u32, layer: u32) -> usize {
        (block - self.first_block) as usize * self.geometry.layers as usize + layer as usize
    }
}

/// A contiguous part of one block: some layers, all valid tokens. Several layers only where the block is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Index of the block within the sequence.
    pub block: u32,
    /// First layer.
    pub first_layer: u32,
    /// Layers.
    pub layers: u32,
    /// Valid tokens of the block.
    pub tokens: u32,
}

impl Piece {
    /// Bytes of one of its layers.
    pub fn layer_bytes(&self, geometry: &Geometry) -> usize {
        self.tokens as usize * geometry.token_bytes as usize
    }

    /// Bytes of the piece.
    pub fn bytes(&self, geometry: &Geometry) -> usize {
        self.layers as usize * self.layer_bytes(geometry)
    }

    /// Where it lies within its block. Only for pieces that [`Plan::holds`].
    pub fn range(&self, geometry: &Geometry) -> Range<usize> {
        let start = self.first_layer as usize * geometry.layer_bytes();
        start..start + self.bytes(geometry)
    }

    /// Its layers.
    pub fn layer_range(&self) -> Range<u32> {
        self.first_layer..self.first_layer + self.layers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let geometry = Geometry {
            layers: 3,
            block_tokens: 4,
            token_bytes: 2,
        };
        Plan {
            geometry,
            first_block: 1,
            total_tokens: 10,
        }
    }

    #[test]
    fn a_plan_counts_the_partial_last_block() {
        let plan = plan();
        assert_eq!(plan.blocks(), 1..3);
        assert_eq!((plan.tokens(1), plan.tokens(2), plan.tokens(3)), (4, 2, 0));
        assert_eq!(plan.bytes(), 6 * 2 * 3);
        assert_eq!(plan.parts(), 6);
    }

    #[test]
    fn pieces_outside_the_plan_are_not_held() {
        let plan = plan();
        let good = Piece {
            block: 1,
            first_layer: 1,
            layers: 2,
            tokens: 4,
        };
        assert!(plan.holds(&good));
        for bad in [
            Piece { block: 0, ..good },
            Piece { block: 3, ..good },
            Piece { layers: 0, ..good },
            Piece { layers: 3, ..good },
            Piece {
                layers: u32::MAX,
                ..good
            },
            Piece {
                first_layer: 3,
                layers: 1,
                ..good
            },
            Piece { tokens: 3, ..good },
            // Two layers of a partial block do not lie side by side.
            Piece {
                block: 2,
                first_layer: 0,
                layers: 2,
                tokens: 2,
            },
        ] {
            assert!(!plan.holds(&bad), "{bad:?}");
        }
        assert_eq!(good.range(&plan.geometry), 8..24);
    }

    #[test]
    fn a_plan_whose_blocks_are_all_cached_moves_nothing() {
        let plan = Plan {
            first_block: 3,
            ..plan()
        };
        assert_eq!((plan.blocks().len(), plan.parts(), plan.bytes()), (0, 0, 0));
    }
}
