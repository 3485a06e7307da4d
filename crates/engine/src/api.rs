//! What a worker asks of an engine. The production engine runs the network on its own thread; the simulator's scripted
//! engine answers the same calls from a table. Nothing here knows gRPC.

use std::{fmt, sync::Arc, time::Instant};

use kernels::BlockMemory;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::ExpertLoad;

/// Runs sequences. Calls return at once; what happens is reported on the channel of each [`Running`].
pub trait Engine: Send + Sync + 'static {
    /// Queues a sequence.
    ///
    /// # Errors
    /// [`Refused`] when the queue is full, the engine drains, or the sequence can never run here.
    fn submit(&self, job: Job) -> Result<Running, Refused>;
    /// The block pool that leases, prefixes and running sequences share.
    fn pool(&self) -> &kv::Pool;
    /// The bytes of the pool's blocks, for moving them between processes.
    fn memory(&self) -> Arc<dyn BlockMemory>;
    /// What lies in a block.
    fn format(&self) -> &kv::KvFormat;
    /// Fixed facts.
    fn limits(&self) -> Limits;
    /// What it is doing now.
    fn load(&self) -> Load;
    /// What it has done so far.
    fn counters(&self) -> Counters;
    /// Tokens that each logical expert has computed so far.
    fn experts(&self) -> Arc<ExpertLoad>;
    /// Why it does not work any more and takes nothing: its thread ended, or its books of blocks are wrong. The process
    /// should be replaced.
    fn broken(&self) -> Option<String>;
    /// Takes nothing new from now on; what has not ended by `deadline` ends in [`Error::Draining`].
    fn drain(&self, deadline: Instant);
}

/// One sequence to run.
#[derive(Debug)]
pub struct Job {
    /// Name for logs.
    pub request: String,
    /// Prompt, then tokens already produced elsewhere.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// When it ends by itself.
    pub stop: Stop,
    /// Report log probabilities of the prompt too.
    pub prompt_logprobs: bool,
    /// Part of the first block's hash: separates tenants' prefix caches.
    pub cache_salt: Vec<u8>,
    /// It ends in [`Error::Deadline`] when it has not finished by then. Make it from tokio's clock
    /// (`tokio::time::Instant::now().into_std() + d`), so that it holds in simulated time too.
    pub deadline: Instant,
    /// Which part of its life happens here.
    pub phase: Phase,
}

/// Which part of a sequence's life happens in this engine.
#[derive(Debug)]
pub enum Phase {
    /// Compute the KV of all tokens, report [`Event::Filled`] layer by layer, sample one token, stop. The blocks come
    /// with [`Event::Started`].
    Prefill,
    /// The KV of all tokens but the last is in these blocks: go on from there.
    Decode(kv::Blocks),
    /// Compute and generate.
    Whole,
}

/// How the next token is chosen. Neutral values switch a part off.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of most likely tokens with at least this probability; 1 is off.
    pub top_p: f32,
    /// Most likely tokens kept; 0 is off.
    pub top_k: u32,
    /// Tokens with less than this fraction of the best token's probability are dropped; 0 is off.
    pub min_p: f32,
    /// Subtracted from the logits of tokens that were generated; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for every time a token was generated; 0 is off.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Token i (from the end of the prompt) is drawn from (seed, i) alone.
    pub seed: u64,
    /// Alternatives to report beside each token's log probability; `None` reports none at all.
    pub top_logprobs: Option<u32>,
    /// Added to logits first.
    pub logit_bias: Vec<(u32, f32)>,
}

/// When a sequence ends by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// Tokens that end it (and are reported).
    pub tokens: Vec<u32>,
    /// New tokens at most, from the end of the prompt.
    pub max_tokens: usize,
    /// No stop token is chosen before this many new tokens exist.
    pub min_tokens: usize,
}

/// A sequence in the engine. Dropping it cancels the sequence, and the engine frees all it holds.
#[derive(Debug)]
pub struct Running {
    /// What happens. Bounded: a sequence whose reader does not keep up waits, the others do not.
    pub events: mpsc::Receiver<Event>,
    /// Tells the engine when this is dropped.
    pub guard: CancelOnDrop,
}

/// Cancels a sequence when dropped.
#[derive(Debug)]
pub struct CancelOnDrop(pub CancellationToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// What happens to a sequence, in this order: `Started`, `Filled`* mixed with `Token`*, then one of `Finished` and
/// `Failed`, after which nothing comes.
#[derive(Clone, Debug)]
pub enum Event {
    /// It left the queue.
    Started {
        /// Tokens whose KV a cached prefix supplied. Their blocks are complete in all layers.
        cached_tokens: usize,
        /// In phase `Prefill`, all blocks of the sequence. They stay as they are for as long as this is held, past the
        /// end of the sequence: whoever sends them holds it.
        blocks: Option<Arc<kv::Blocks>>,
    },
    /// The KV of tokens `first..end` is now in `layers` of the sequence's blocks (prefill phase only).
    /// [`kv::complete_blocks`] says which blocks can leave.
    Filled {
        /// First token.
        first: usize,
        /// One past the last token.
        end: usize,
        /// Layers that became complete for these tokens.
        layers: std::ops::Range<usize>,
    },
    /// A new token.
    Token(Token),
    /// Log probabilities of prompt tokens 1.. (when asked for), before the first token. Their `index` is the position
    /// in the prompt.
    PromptLogprobs(Vec<Token>),
    /// It ended.
    Finished(Finish),
    /// It ended in an error.
    Failed(Error),
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Position from the end of the prompt.
    pub index: usize,
    /// The token.
    pub token: u32,
    /// Its log probability under the model (before temperature), when asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_tokens` or the context length.
    Length,
    /// Phase `Prefill` is done and the sequence goes on elsewhere.
    HandOff,
}

/// Why a sequence failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Its deadline passed.
    #[error("the deadline passed")]
    Deadline,
    /// The worker is leaving and did not finish in time.
    #[error("the worker is draining")]
    Draining,
    /// No blocks, and nothing can be preempted.
    #[error("out of KV blocks: {needed} needed, {total} exist")]
    OutOfBlocks {
        /// Blocks the sequence needs.
        needed: usize,
        /// Blocks of the pool.
        total: usize,
    },
    /// The device failed or produced logits that are not numbers.
    #[error("the network failed: {0}")]
    Network(String),
}

/// Why a sequence was not taken.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    /// Try again later, or elsewhere.
    #[error("the queue is full ({waiting} waiting)")]
    QueueFull {
        /// Sequences that wait.
        waiting: usize,
    },
    /// Leaving.
    #[error("the worker is draining")]
    Draining,
    /// It can never run here.
    #[error("{0}")]
    Invalid(String),
    /// The engine does not work any more: the process should be replaced.
    #[error("the engine is broken: {0}")]
    Broken(String),
}

/// Fixed facts of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Prompt and output together.
    pub max_model_len: usize,
    /// Sequences that step together.
    pub max_running: usize,
    /// Sequences that wait at most.
    pub max_waiting: usize,
    /// Size of the vocabulary: token ids are below it.
    pub vocab_size: usize,
    /// Layers of a KV block (MTP included).
    pub kv_layers: usize,
    /// Whether tokens are drafted by the MTP layer.
    pub drafts: usize,
}

/// What an engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences stepping.
    pub running: usize,
    /// Sequences waiting.
    pub waiting: usize,
    /// Prompt tokens accepted and not computed yet.
    pub waiting_tokens: usize,
}

/// What an engine has done since it started; each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Steps of the batch.
    pub steps: u64,
    /// Nanoseconds spent in steps.
    pub step_nanos: u64,
    /// Tokens whose KV was computed, prompt and generated, recomputed ones again.
    pub computed_tokens: u64,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: u64,
    /// Tokens chosen.
    pub generated_tokens: u64,
    /// Sequences that lost their blocks to an older one and were computed anew.
    pub preemptions: u64,
}

impl fmt::Display for Finish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::HandOff => "hand-off",
        })
    }
}
