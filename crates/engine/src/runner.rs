//! What the scheduler asks of a network: one step over the rows it planned.

use std::{ops::Range, sync::Arc};

use kernels::BlockMemory;
use kv::{BlockId, KvFormat};

use crate::ExpertLoad;

/// A network with its cache. Every method runs on the engine's thread.
pub trait Runner: Send + 'static {
    /// Fixed facts.
    fn facts(&self) -> &Facts;
    /// The cache's blocks.
    fn memory(&self) -> Arc<dyn BlockMemory>;
    /// Computes the rows' tokens, writes their KV, and leaves one row of logits for each token that asked, in the order
    /// of rows and tokens. Calls `on_layer` with each KV layer once its entries for all rows can be read.
    ///
    /// # Errors
    /// If the device fails, or `on_layer` does. What the step wrote is worth nothing then.
    fn forward(
        &mut self,
        step: &StepHeader,
        rows: &[Row<'_>],
        on_layer: &mut dyn FnMut(usize) -> Result<(), RunnerError>,
        logits: &mut Vec<f32>,
    ) -> Result<(), RunnerError>;
    /// Completes the draft layer's entries of the last computed tokens, now that the tokens after them are known. Only
    /// called when the facts say that entries lag.
    ///
    /// # Errors
    /// If the device fails.
    fn fill_last(&mut self, last: &[Last<'_>]) -> Result<(), RunnerError>;
    /// Adds the experts' tokens since the last call.
    ///
    /// # Errors
    /// If the device fails.
    fn count_experts(&mut self, load: &ExpertLoad) -> Result<(), RunnerError>;
}

/// The network failed; the words are for people.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct RunnerError(pub String);

/// What is known of a network before any step.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Longest sequence.
    pub max_model_len: usize,
    /// Rows of a step at most; also the number of states ([`Row::state`]).
    pub max_rows: usize,
    /// Tokens of a step at most.
    pub max_step_tokens: usize,
    /// What lies in a block.
    pub format: KvFormat,
    /// Whether the last KV layer is a draft layer, whose entry for a token needs the token after it and so comes one
    /// step later (or with [`Runner::fill_last`]).
    pub draft_layer: bool,
    /// Whether KV computed as part of a prompt differs in rounding from that of generated tokens. Then a row never mixes
    /// them, and the KV of generated tokens is not shared: what is found in the cache is what would have been computed.
    pub prompts_differ: bool,
    /// Numbers of the MoE layers.
    pub moe_layers: Vec<usize>,
    /// Routed experts of a MoE layer.
    pub experts: usize,
}

impl Facts {
    /// The KV layer whose entries lag by one token.
    pub(crate) fn lagging_layer(&self) -> Option<usize> {
        self.draft_layer.then(|| self.format.layers - 1)
    }
}

/// What every rank of a unit must agree on before a step: where several ranks step together, this travels first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepHeader {
    /// Number of the step in this engine's life.
    pub step: u64,
    /// Rows.
    pub rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    /// The sequence up to the last token to compute.
    pub tokens: &'a [u32],
    /// Position of the first token to compute: the KV of those before is in the blocks.
    pub first: usize,
    /// Whether the tokens to compute belong to the prompt (all or none of them do, where that makes a difference).
    pub prompt: bool,
    /// Blocks of the sequence; they have room for all of `tokens`.
    pub blocks: &'a [BlockId],
    /// Positions whose logits are wanted, all of them computed now.
    pub logits: Range<usize>,
    /// Where the network may keep something for this sequence between steps; nobody else's.
    pub state: usize,
    /// Whether this sequence's state is that of token `first - 1`.
    pub continues: bool,
}

impl Row<'_> {
    /// Tokens to compute.
    pub fn new_tokens(&self) -> &[u32] {
        &self.tokens[self.first..]
    }
}

/// A sequence that leaves: what its last draft entry needs.
#[derive(Clone, Debug)]
pub struct Last<'a> {
    /// The sequence's state.
    pub state: usize,
    /// The token after the last computed one.
    pub next: u32,
    /// Position of the last computed token.
    pub position: usize,
    /// Blocks of the sequence.
    pub blocks: &'a [BlockId],
}
