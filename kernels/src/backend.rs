//! The operations of DeepSeek-V3, as a GPU wants them.
//!
//! Conventions. `T` is the number of query tokens of a step over all sequences, `S` the number of sequences, `H` heads,
//! `C` context tokens. Tensors are row-major; a `rows` argument says how many rows of a tensor's capacity this step
//! uses (on a GPU: the captured bucket). Operations enqueue on the stream and return at once; an error of the
//! device surfaces at [`Backend::synchronize`]. Shape errors are found before anything is enqueued.
//!
//! Weights of norms, the gate's weight and its bias are F32 `[1, n]` and `[experts, hidden]`; the embedding table is in
//! the activation type. The row of a token never depends on the other rows of a step, bit for bit: a request gives the
//! same tokens whatever else is in the batch and however its prompt was cut.

mod arguments;

pub use arguments::{
    Columns, Dispatch, GateShape, HostMatrix, Input, Output, Precision, Quantised, Routing,
    ScaleFormat, Sequences,
};

use crate::tensor::{DType, Tensor};

/// What can go wrong in a backend. Names the operation and the shapes.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments do not fit each other or a limit of the kernel.
    #[error("{op}: {detail}")]
    Shape {
        /// Name of the operation.
        op: &'static str,
        /// What does not fit, with the numbers.
        detail: String,
    },
    /// The device has no memory left for an allocation.
    #[error("out of device memory: {bytes} bytes asked for")]
    OutOfMemory {
        /// Size of the allocation that failed.
        bytes: usize,
    },
    /// The device or its driver reported an error.
    #[error("{op}: device error: {detail}")]
    Device {
        /// Name of the operation.
        op: &'static str,
        /// The driver's words.
        detail: String,
    },
}

/// Result of a backend operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Bytes lent out of a cache without a copy.
pub type HostView = Box<dyn AsRef<[u8]> + Send + Sync>;

/// Host access to KV blocks, for moving them between processes. A block is one contiguous piece of memory
/// (`[layer][64][576]`, page-major) of [`BlockMemory::block_bytes`] bytes. Access is exclusive by layer of a block: one
/// layer can be sent while the next is computed. Short conflicts are waited for.
pub trait BlockMemory: Send + Sync + 'static {
    /// Bytes of a block over all layers.
    fn block_bytes(&self) -> usize;
    /// Number of blocks.
    fn blocks(&self) -> usize;
    /// Hands `bytes` of block `block` to `read`.
    ///
    /// # Errors
    /// If the range is outside the block, or somebody keeps writing it.
    fn read(
        &self,
        block: usize,
        bytes: std::ops::Range<usize>,
        read: &mut dyn FnMut(&[u8]),
    ) -> Result<()>;
    /// Lets `write` fill `bytes` of block `block`.
    ///
    /// # Errors
    /// If the range is outside the block, or somebody keeps reading or writing it.
    fn write(
        &self,
        block: usize,
        bytes: std::ops::Range<usize>,
        write: &mut dyn FnMut(&mut [u8]),
    ) -> Result<()>;
    /// Lends `bytes` of a block without a copy, where the cache is in host memory. Layers that a view touches cannot be
    /// written while it lives, so view only what is complete; the holder keeps the block from being reused.
    fn view(
        self: std::sync::Arc<Self>,
        block: usize,
        bytes: std::ops::Range<usize>,
    ) -> Option<HostView> {
        let _ = (block, bytes);
        None
    }
}

/// A device and the operations on it. See the module documentation for conventions.
pub trait Backend: Send + Sync + 'static {
    /// Handle to device memory; freed when dropped.
    type Mem: Send + Sync + 'static;
    /// An order of execution.
    type Stream: Send + 'static;
    /// Weights of one linear layer, in the layout this backend computes with.
    type Linear: Send + Sync + 'static;
    /// Weights of many experts' fused gate|up and down projections, addressable by slot.
    type Experts: Send + Sync + 'static;
    /// Per-head weights `[H, out, in]` of the absorbed products.
    type Heads: Send + Sync + 'static;
    /// The paged latent cache: `[block][layer][64][latent + rope]`.
    type Cache: BlockMemory;

    /// Short name for logs and metrics ("cpu", "cuda").
    fn name(&self) -> &'static str;
    /// Type of the residual stream and of operations' outputs for a precision.
    fn activation(&self, precision: Precision) -> DType;

    // --- memory ---------------------------------------------------------------------------------------------------
    /// A new stream.
    fn stream(&self) -> Result<Self::Stream>;
    /// Uninitialised memory. Only called while planning, never inside a step.
    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor<Self::Mem>>;
    /// A tensor with the given little-endian contents.
    fn import(
        &self,
        dtype: DType,
        rows: usize,
        cols: usize,
        data: &[u8],
    ) -> Result<Tensor<Self::Mem>>;
    /// A linear layer's weights: the rows of all `parts`, one after the other (q_a | kv_a, gate | up), each part with
    /// its own blocks of scales, so that a part need not end on a block's limit. Parts share type and inputs.
    /// `precision` decides the form kept; W8 and W8A8 are asked for FP8 parts only.
    fn linear(&self, parts: &[HostMatrix<'_>], precision: Precision) -> Result<Self::Linear>;
    /// Room for `slots` experts with `hidden` inputs and `inter` intermediate values.
    fn experts(
        &self,
        slots: usize,
        hidden: usize,
        inter: usize,
        precision: Precision,
    ) -> Result<Self::Experts>;
    /// Loads or replaces one slot's expert. `gate`, `up`: `[inter, hidden]`; `down`: `[hidden, inter]`.
    fn load_expert(
        &self,
        experts: &mut Self::Experts,
        slot: usize,
        gate: &HostMatrix<'_>,
        up: &HostMatrix<'_>,
        down: &HostMatrix<'_>,
    ) -> Result<()>;
    /// Weights of per-head products from float32 `[heads, out, inp]`.
    fn heads(
        &self,
        heads: usize,
        out: usize,
        inp: usize,
        data: &[f32],
        precision: Precision,
    ) -> Result<Self::Heads>;
    /// A cache of `blocks` blocks of 64 tokens over `layers` layers, `width` values (latent + rope) of `dtype` each.
    fn cache(
        &self,
        blocks: usize,
        layers: usize,
        width: usize,
        dtype: DType,
    ) -> Result<Self::Cache>;
    /// Copies host bytes to the first bytes of a tensor, in stream order.
    fn upload(
        &self,
        stream: &mut Self::Stream,
        data: &[u8],
        to: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Copies the first bytes of a tensor to the host. The bytes are there after [`Backend::synchronize`].
    fn download(
        &self,
        stream: &mut Self::Stream,
        from: &Tensor<Self::Mem>,
        data: &mut [u8],
    ) -> Result<()>;
    /// Waits for everything enqueued and reports the device's errors.
    fn synchronize(&self, stream: &mut Self::Stream) -> Result<()>;

    // --- operations -----------------------------------------------------------------------------------------------
    /// `out[t] = table[tokens[t]]`. `tokens` I32 `[T]`, `table` `[V, hidden]`.
    fn embed(
        &self,
        stream: &mut Self::Stream,
        table: &Tensor<Self::Mem>,
        tokens: &Tensor<Self::Mem>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `residual += delta` (where given), then `out = residual / rms(residual) * weight`, statistics in float32.
    fn add_norm(
        &self,
        stream: &mut Self::Stream,
        residual: &mut Tensor<Self::Mem>,
        delta: Option<&Tensor<Self::Mem>>,
        weight: &Tensor<Self::Mem>,
        eps: f32,
        rows: usize,
        out: Output<'_, Self::Mem>,
    ) -> Result<()>;
    /// RMSNorm of some columns (the query latent inside the fused projection's output).
    fn norm(
        &self,
        stream: &mut Self::Stream,
        x: Columns<'_, Self::Mem>,
        weight: &Tensor<Self::Mem>,
        eps: f32,
        rows: usize,
        out: Output<'_, Self::Mem>,
    ) -> Result<()>;
    /// Quantises activations 1x128 (DeepSeek-V3 report 3.3.2, `act_quant` of its `inference/kernel.py`).
    fn quantise(
        &self,
        stream: &mut Self::Stream,
        x: &Tensor<Self::Mem>,
        rows: usize,
        scale: ScaleFormat,
        out: &mut Quantised<Self::Mem>,
    ) -> Result<()>;
    /// `out = x W^T`, float32 accumulation. `out` is in the activation type or F32 (logits).
    fn matmul(
        &self,
        stream: &mut Self::Stream,
        x: Input<'_, Self::Mem>,
        weight: &Self::Linear,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out = silu(gate) * up` for rows `[gate | up]` of `2 * inter` columns.
    fn swiglu(
        &self,
        stream: &mut Self::Stream,
        gate_up: &Tensor<Self::Mem>,
        rows: usize,
        out: Output<'_, Self::Mem>,
    ) -> Result<()>;
    /// `out[i] = x[index[i]]`, `index` I32 `[rows]`: picks the rows that need logits.
    fn gather(
        &self,
        stream: &mut Self::Stream,
        x: &Tensor<Self::Mem>,
        index: &Tensor<Self::Mem>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out[index[i]] = x[i]`, `index` I32 `[rows]`, the inverse of [`Backend::gather`] (last states kept for the MTP layer).
    fn scatter(
        &self,
        stream: &mut Self::Stream,
        x: &Tensor<Self::Mem>,
        index: &Tensor<Self::Mem>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out = [a | b]` row by row (the MTP layer's input).
    fn concat(
        &self,
        stream: &mut Self::Stream,
        a: &Tensor<Self::Mem>,
        b: &Tensor<Self::Mem>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;

    /// Rotates the last `rope` values of every head in place: `q` `[T, heads * (nope + rope)]`, neighbours (2i, 2i+1)
    /// form a pair; `table` F32 `[max_position, rope]` holds cos and sin of pair i at 2i and 2i + 1.
    fn rope(
        &self,
        stream: &mut Self::Stream,
        q: &mut Tensor<Self::Mem>,
        heads: usize,
        nope: usize,
        rope: usize,
        table: &Tensor<Self::Mem>,
        positions: &Tensor<Self::Mem>,
        rows: usize,
    ) -> Result<()>;
    /// Normalises the latent, rotates the rope key, and writes both to the cache at `seqs.slots`.
    /// `kv`: columns `[latent | rope]` of the fused projection's output.
    fn cache_write(
        &self,
        stream: &mut Self::Stream,
        kv: Columns<'_, Self::Mem>,
        weight: &Tensor<Self::Mem>,
        eps: f32,
        table: &Tensor<Self::Mem>,
        seqs: &Sequences<Self::Mem>,
        layer: usize,
        rows: usize,
        cache: &Self::Cache,
    ) -> Result<()>;
    /// Absorbed queries: `out[t, h] = [q_nope[t, h] W_UK[h] | q_rope[t, h]]`, `[T, heads * (latent + rope)]`.
    /// `w_uk` is `[heads, latent, nope]`.
    fn absorb_query(
        &self,
        stream: &mut Self::Stream,
        q: &Tensor<Self::Mem>,
        w_uk: &Self::Heads,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Causal attention in the latent space over the paged cache: `q` `[T, heads * width]`, `out` `[T, heads * latent]`.
    fn attend_absorbed(
        &self,
        stream: &mut Self::Stream,
        q: &Tensor<Self::Mem>,
        cache: &Self::Cache,
        layer: usize,
        seqs: &Sequences<Self::Mem>,
        heads: usize,
        scale: f32,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out[t, h] = W_UV[h] x[t, h]`: from the latent to the value space, `w_uv` is `[heads, v, latent]`.
    fn absorb_value(
        &self,
        stream: &mut Self::Stream,
        x: &Tensor<Self::Mem>,
        w_uv: &Self::Heads,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Reads the latents and rope keys of all context tokens of all sequences, one sequence after the other:
    /// `latent` `[C, latent]`, `rope` `[C, rope]`; `context_start` I32 `[S + 1]` says where each sequence begins.
    fn cache_read(
        &self,
        stream: &mut Self::Stream,
        cache: &Self::Cache,
        layer: usize,
        seqs: &Sequences<Self::Mem>,
        context_start: &Tensor<Self::Mem>,
        rows: usize,
        latent: &mut Tensor<Self::Mem>,
        rope: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Causal attention in the expanded form: `q` `[T, heads * (nope + rope)]`, `kv` `[C, heads * (nope + v)]`
    /// (key part and value of each head side by side), `rope` `[C, rope]`, `out` `[T, heads * v]`.
    fn attend_expanded(
        &self,
        stream: &mut Self::Stream,
        q: &Tensor<Self::Mem>,
        kv: &Tensor<Self::Mem>,
        rope: &Tensor<Self::Mem>,
        seqs: &Sequences<Self::Mem>,
        context_start: &Tensor<Self::Mem>,
        heads: usize,
        scale: f32,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;

    /// Scores, selects and weighs experts (DeepSeek-V3 report 2.1.2), and adds one to `counts[e]` (I32 `[experts]`) for every
    /// choice. Products in float32; the bias only selects; dropped groups are -inf; ties go to the lowest index.
    fn gate(
        &self,
        stream: &mut Self::Stream,
        x: &Tensor<Self::Mem>,
        weight: &Tensor<Self::Mem>,
        bias: &Tensor<Self::Mem>,
        shape: &GateShape,
        rows: usize,
        out: &mut Routing<Self::Mem>,
        counts: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Sorts token copies by slot. `slot_of_expert` I32 `[experts, 1 + max replicas]`: number of slots, then the slots;
    /// a token with several to choose from takes `slots[t % number]`. Order within a slot is by copy, so it is fixed.
    fn dispatch(
        &self,
        stream: &mut Self::Stream,
        routing: &Routing<Self::Mem>,
        slot_of_expert: &Tensor<Self::Mem>,
        rows: usize,
        slots: usize,
        out: &mut Dispatch<Self::Mem>,
    ) -> Result<()>;
    /// Gate|up products of every slot over its rows: row r reads token `copy_of_row[r] / K` of `x`;
    /// `out` `[T * K, 2 * inter]`.
    fn experts_gate_up(
        &self,
        stream: &mut Self::Stream,
        x: Input<'_, Self::Mem>,
        experts: &Self::Experts,
        dispatch: &Dispatch<Self::Mem>,
        copies: usize,
        top_k: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// Down products of every slot over its rows: `x` `[T * K, inter]`, `out` `[T * K, hidden]`.
    fn experts_down(
        &self,
        stream: &mut Self::Stream,
        x: Input<'_, Self::Mem>,
        experts: &Self::Experts,
        dispatch: &Dispatch<Self::Mem>,
        copies: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out[t] = sum over k in order (weights[t, k] * y[row_of_copy[t K + k]]) + shared[t]`, float32 sums: the order is
    /// the gate's, so that where an expert lives cannot change a bit.
    fn combine(
        &self,
        stream: &mut Self::Stream,
        y: &Tensor<Self::Mem>,
        routing: &Routing<Self::Mem>,
        dispatch: &Dispatch<Self::Mem>,
        shared: Option<&Tensor<Self::Mem>>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
    /// `out[s] = argmax(logits[s])`, I32, lowest index on ties; a NaN in a row gives -1.
    fn argmax(
        &self,
        stream: &mut Self::Stream,
        logits: &Tensor<Self::Mem>,
        rows: usize,
        out: &mut Tensor<Self::Mem>,
    ) -> Result<()>;
}
