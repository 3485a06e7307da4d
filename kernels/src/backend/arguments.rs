//! What operations are given besides tensors: precisions, host matrices, inputs and outputs, a step's sequences, the
//! gate's shape and choices.

use std::{fmt, str::FromStr};

use crate::tensor::{DType, Tensor};

/// How a network is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Everything in float32: weights are dequantised, the cache is float32. The oracle.
    F32,
    /// BF16 weights (FP8 ones dequantised), BF16 inputs of the layers' products, BF16 cache.
    Bf16,
    /// FP8 block weights and activations quantised 1x128 on the fly (report section 3.3), BF16 cache.
    W8A8,
    /// FP8 block weights, activations not quantised, BF16 cache.
    W8,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::W8A8, Self::W8];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::W8A8 => "w8a8",
            Self::W8 => "w8",
        })
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let named = |precision: &Self| precision.to_string() == name;
        let found = Self::ALL.into_iter().find(named);
        found.ok_or_else(|| format!("\"{name}\" is none of f32, bf16, w8a8, w8"))
    }
}

/// How activation scales are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleFormat {
    /// amax / 448 in float32 (V3, V3-0324, R1).
    F32,
    /// The next power of two (V3.1's `ue8m0`).
    Ue8m0,
}

/// A matrix on the host, as a checkpoint holds it: `[rows, cols]` row-major, `rows` outputs.
#[derive(Clone, Debug)]
pub struct HostMatrix<'a> {
    /// Element type of `data`.
    pub dtype: DType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Little-endian elements.
    pub data: &'a [u8],
    /// For FP8: one multiplicative float32 per 128x128 block, `[ceil(rows/128), ceil(cols/128)]`.
    pub scales: Option<&'a [f32]>,
}

/// Activations quantised 1x128: `data` FP8 `[T, K]`, `scales` float32 `[T, ceil(K/128)]`.
#[derive(Debug)]
pub struct Quantised<M> {
    /// FP8 values.
    pub data: Tensor<M>,
    /// One multiplicative scale per row and 128 columns.
    pub scales: Tensor<M>,
}

/// Input of a matrix product.
#[derive(Debug)]
pub enum Input<'a, M> {
    /// Activations as they are.
    Plain(&'a Tensor<M>),
    /// Activations that the product takes as BF16: rounded first, where they are wider.
    Rounded(&'a Tensor<M>),
    /// Activations quantised by an operation before.
    Quantised(&'a Quantised<M>),
}

/// Where an operation puts activations: plain, quantised for the next product, or both.
#[derive(Debug)]
pub struct Output<'a, M> {
    /// Activations in the backend's activation type.
    pub plain: Option<&'a mut Tensor<M>>,
    /// Quantised 1x128 with the given scale format.
    pub quantised: Option<(&'a mut Quantised<M>, ScaleFormat)>,
}

/// Columns `first..first + cols` of every row of a tensor.
#[derive(Debug)]
pub struct Columns<'a, M> {
    /// The tensor.
    pub tensor: &'a Tensor<M>,
    /// First column.
    pub first: usize,
    /// Number of columns.
    pub cols: usize,
}

/// Sequences of a step, in device memory (all I32). A step may be split into several of these (the absorbed sequences
/// together, every expanded one alone): `query_start[0]` need not be 0, `slots` and `positions` always cover all rows
/// of the step, and an attention operation reads and writes rows `query_start[0]..query_start[count]` only.
#[derive(Debug)]
pub struct Sequences<M> {
    /// `[S + 1]`: query tokens of sequence `s` are rows `query_start[s]..query_start[s + 1]`.
    pub query_start: Tensor<M>,
    /// `[S]`: tokens in the cache for each sequence, this step's included.
    pub context_len: Tensor<M>,
    /// `[S, max_blocks]`: block ids, in order.
    pub block_table: Tensor<M>,
    /// `[T]`: where each query token's cache entry goes: `block * 64 + offset`, or -1 for none.
    pub slots: Tensor<M>,
    /// `[T]`: position of each query token.
    pub positions: Tensor<M>,
    /// Number of sequences (known on the host).
    pub count: usize,
    /// Most query tokens of one sequence (upper bound, known on the host).
    pub max_query: usize,
    /// Largest context length (upper bound, known on the host).
    pub max_context: usize,
}

/// The gate's parameters (report 2.1.2; Hugging Face names in brackets).
#[derive(Clone, Copy, Debug)]
pub struct GateShape {
    /// Routed experts [n_routed_experts].
    pub experts: usize,
    /// Groups of contiguous experts [n_group].
    pub groups: usize,
    /// Groups kept [topk_group].
    pub top_groups: usize,
    /// Experts chosen for a token [num_experts_per_tok].
    pub top_k: usize,
    /// Factor on the normalised weights [routed_scaling_factor].
    pub scale: f32,
    /// Divide the chosen scores by their sum [norm_topk_prob].
    pub normalise: bool,
}

/// The gate's choices for a step.
#[derive(Debug)]
pub struct Routing<M> {
    /// I32 `[T, K]`: logical experts, best first.
    pub experts: Tensor<M>,
    /// F32 `[T, K]`: their weights.
    pub weights: Tensor<M>,
}

/// Token copies sorted by expert slot.
#[derive(Debug)]
pub struct Dispatch<M> {
    /// I32 `[slots + 1]`: rows of slot `i` are `offsets[i]..offsets[i + 1]`.
    pub offsets: Tensor<M>,
    /// I32 `[T * K]`: copy `t * K + k` behind each row.
    pub copy_of_row: Tensor<M>,
    /// I32 `[T * K]`: row of copy `t * K + k` (the inverse).
    pub row_of_copy: Tensor<M>,
}
