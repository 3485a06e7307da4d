//! Element types and shaped device memory.

/// Element type of a tensor in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// FP8 E4M3FN: bias 7, largest value 448, no infinities, NaN 0x7f and 0xff.
    Fp8,
    /// Signed 32-bit integers: tokens, positions, slots, block tables.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }
}

/// Row-major device memory with a shape. `M` is the backend's memory handle; a tensor owns its memory.
#[derive(Debug)]
pub struct Tensor<M> {
    /// The memory, at least `rows * cols` elements.
    pub mem: M,
    /// Element type.
    pub dtype: DType,
    /// Number of rows (the capacity: operations say how many of them a step uses).
    pub rows: usize,
    /// Elements of a row. Higher dimensions are folded into it (`[T, H, 192]` is `T` rows of `H * 192`).
    pub cols: usize,
}

impl<M> Tensor<M> {
    /// Bytes of the whole tensor.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.bytes()
    }
}
