//! How the KV of one block lies in memory and on the wire.

use std::ops::Range;

use kernels::DType;
use prefix::BLOCK_TOKENS;

/// Version of the layout itself: raised when the meaning of the bytes changes.
const LAYOUT: u32 = 1;

/// The format of a block: `[layer][64][latent | rope]`, contiguous.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvFormat {
    /// What computed the KV (model, precision, image): KV of another revision is worthless.
    pub revision: String,
    /// Layers of a block, MTP included.
    pub layers: usize,
    /// Normalised latent values of a token and layer.
    pub latent: usize,
    /// Rotated key values of a token and layer, neighbours forming pairs.
    pub rope: usize,
    /// Element type.
    pub dtype: DType,
}

impl KvFormat {
    /// Bytes of one token in one layer.
    pub fn row_bytes(&self) -> usize {
        (self.latent + self.rope) * self.dtype.bytes()
    }

    /// Bytes of one layer of a block.
    pub fn layer_bytes(&self) -> usize {
        BLOCK_TOKENS * self.row_bytes()
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.layers * self.layer_bytes()
    }

    /// Where the first `tokens` tokens of `layer` lie in a block.
    pub fn span(&self, layer: usize, tokens: usize) -> Range<usize> {
        let first = layer * self.layer_bytes();
        first..first + tokens * self.row_bytes()
    }

    /// Two workers may exchange KV only if this is the same for both.
    pub fn fingerprint(&self) -> [u8; 32] {
        let dtype = match self.dtype {
            DType::F32 => 0u32,
            DType::Bf16 => 1,
            DType::Fp8 => 2,
            DType::I32 => 3,
        };
        let sizes = [
            LAYOUT,
            BLOCK_TOKENS as u32,
            self.layers as u32,
            self.latent as u32,
            self.rope as u32,
            dtype,
        ];
        let mut hasher = blake3::Hasher::new_derive_key("hadal.v1 kv format");
        for size in sizes {
            hasher.update(&size.to_le_bytes());
        }
        hasher.update(self.revision.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v3() -> KvFormat {
        KvFormat {
            revision: "r".into(),
            layers: 62,
            latent: 512,
            rope: 64,
            dtype: DType::Bf16,
        }
    }

    #[test]
    fn deepseek_v3_has_73728_bytes_a_layer() {
        assert_eq!(v3().layer_bytes(), 73_728);
        assert_eq!(v3().block_bytes(), 62 * 73_728);
        assert_eq!(v3().span(2, 3), 147_456..147_456 + 3 * 1152);
    }

    #[test]
    fn every_field_is_in_the_fingerprint() {
        let base = v3();
        let variants = [
            KvFormat {
                revision: "s".into(),
                ..base.clone()
            },
            KvFormat {
                layers: 61,
                ..base.clone()
            },
            KvFormat {
                latent: 448,
                rope: 128,
                ..base.clone()
            },
            KvFormat {
                dtype: DType::F32,
                ..base.clone()
            },
        ];
        for variant in variants {
            assert_ne!(variant.fingerprint(), base.fingerprint(), "{variant:?}");
        }
    }
}
