//! A sequence inside the engine: its tokens, what of them is computed, and its channel to the outside.

use std::{sync::Arc, time::Instant};

use kv::{BLOCK_TOKENS, BlockHash, BlockId, Blocks, Pool, blocks_for};
use tokio::sync::mpsc::{self, OwnedPermit, error::TrySendError};
use tokio_util::sync::CancellationToken;

use crate::{
    api::{CancelOnDrop, Event, Job, Phase, Running, Sampling, Stop, Token},
    sampler::History,
};

/// Events a channel holds beyond those of one step: how far a reader may fall behind before its sequence pauses.
const SLACK: usize = 32;

/// The engine's end of a sequence's channel. Room for the last event is set aside from the start, and a step only
/// runs for a sequence whose channel has room for all the step can tell; so sending never waits and never fails.
#[derive(Debug)]
pub(crate) struct Sink {
    events: mpsc::Sender<Event>,
    last: Option<OwnedPermit<Event>>,
    cancel: CancellationToken,
    per_step: usize,
}

impl Sink {
    fn new(per_step: usize) -> (Self, Running) {
        let (events, receiver) = mpsc::channel(per_step + SLACK + 1);
        let last = events
            .clone()
            .try_reserve_owned()
            .expect("a new channel has room");
        let cancel = CancellationToken::new();
        let sink = Self {
            events,
            last: Some(last),
            cancel: cancel.clone(),
            per_step,
        };
        let running = Running {
            events: receiver,
            guard: CancelOnDrop(cancel),
        };
        (sink, running)
    }

    /// Whether there is room for all that a step may tell.
    pub(crate) fn is_ready(&self) -> bool {
        self.events.capacity() >= self.per_step
    }

    /// Whether nobody wants the sequence any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled() || self.events.is_closed()
    }

    pub(crate) fn send(&self, event: Event) {
        match self.events.try_send(event) {
            // A reader that is gone shows as cancelled before the next step.
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(event)) => {
                unreachable!("no room for {event:?}: steps run for ready sequences only")
            }
        }
    }

    fn end(&mut self, event: Event) {
        if let Some(permit) = self.last.take() {
            permit.send(event);
        }
    }
}

/// Blocks of a running sequence.
#[derive(Debug)]
pub(crate) enum Held {
    /// They grow with the sequence.
    Own(Blocks),
    /// A transfer reads them too; all that are needed are there.
    Lent(Arc<Blocks>),
}

impl Held {
    pub(crate) fn blocks(&self) -> &Blocks {
        match self {
            Self::Own(blocks) => blocks,
            Self::Lent(blocks) => blocks,
        }
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Order of arrival.
    pub(crate) id: u64,
    pub(crate) request: String,
    /// Prompt, then everything generated, here or elsewhere.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    pub(crate) sampling: Sampling,
    pub(crate) stop: Stop,
    pub(crate) history: History,
    pub(crate) deadline: Instant,
    /// It goes on elsewhere after its first token, with the KV of this many tokens.
    pub(crate) leaves_after: Option<usize>,
    /// Log probabilities of the prompt so far, while they are wanted.
    pub(crate) prompt_logprobs: Option<Vec<Token>>,
    pub(crate) sink: Sink,
    pub(crate) held: Option<Held>,
    /// Tokens whose KV is in the blocks.
    pub(crate) computed: usize,
    /// Whether the network holds the state of token `computed - 1`.
    pub(crate) continues: bool,
    /// Index of the network's state for this sequence, while it runs.
    pub(crate) state: Option<usize>,
    pub(crate) started: bool,
    hashes: Vec<BlockHash>,
    chain: prefix::Chain,
    published: usize,
}

impl Sequence {
    /// Takes a valid job in, for an engine of `kv_layers` layers.
    pub(crate) fn new(id: u64, job: Job, pool: &Pool, kv_layers: usize) -> (Self, Running) {
        // Started, prompt log probabilities, a token; when leaving, each layer and the last draft entry too.
        let per_step = match job.phase {
            Phase::Prefill => kv_layers + 4,
            Phase::Decode(_) | Phase::Whole => 3,
        };
        let (sink, running) = Sink::new(per_step);
        let computed = match &job.phase {
            Phase::Decode(_) => job.tokens.len() - 1,
            Phase::Prefill | Phase::Whole => 0,
        };
        let leaves_after = matches!(job.phase, Phase::Prefill).then_some(job.tokens.len());
        let held = match job.phase {
            Phase::Decode(blocks) => Some(Held::Own(blocks)),
            Phase::Prefill | Phase::Whole => None,
        };
        let mut sequence = Self {
            id,
            request: job.request,
            history: History::new(&job.tokens, job.prompt_tokens, &job.sampling),
            tokens: job.tokens,
            prompt_tokens: job.prompt_tokens,
            sampling: job.sampling,
            stop: job.stop,
            deadline: job.deadline,
            leaves_after,
            prompt_logprobs: job.prompt_logprobs.then(Vec::new),
            sink,
            held,
            computed,
            continues: false,
            state: None,
            started: false,
            hashes: Vec::new(),
            chain: pool.chain(&job.cache_salt),
            // Whoever filled transferred blocks has published them.
            published: computed / BLOCK_TOKENS,
        };
        sequence.extend_hashes();
        (sequence, running)
    }

    /// Tokens generated so far, here and elsewhere.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens whose KV is to be computed.
    pub(crate) fn uncomputed(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether only its newest token is to be computed.
    pub(crate) fn is_decoding(&self) -> bool {
        self.uncomputed() == 1 && self.computed > 0
    }

    /// Ids of the blocks it holds.
    pub(crate) fn block_ids(&self) -> &[BlockId] {
        self.held.as_ref().map_or(&[], |held| held.blocks().ids())
    }

    /// Whether its blocks have no room for all its tokens.
    pub(crate) fn needs_block(&self) -> bool {
        self.held.is_some() && blocks_for(self.tokens.len()) > self.block_ids().len()
    }

    /// Hashes under which a prefix of it may be cached. The last token is always computed, for its logits; all are when
    /// the log probabilities of the prompt are wanted. What is cached is a prompt's KV: where that differs from that of
    /// generated tokens, these are computed.
    pub(crate) fn prefix_hashes(&self, prompts_differ: bool) -> &[BlockHash] {
        if self.prompt_logprobs.is_some() {
            return &[];
        }
        let reusable = self.tokens.len() - 1;
        let reusable = if prompts_differ {
            reusable.min(self.prompt_tokens)
        } else {
            reusable
        };
        &self.hashes[..reusable / BLOCK_TOKENS]
    }

    /// It starts (again) with these blocks.
    pub(crate) fn hold(&mut self, blocks: Blocks) {
        self.computed = blocks.cached_blocks() * BLOCK_TOKENS;
        self.published = blocks.cached_blocks();
        self.held = Some(if self.leaves_after.is_some() {
            Held::Lent(Arc::new(blocks))
        } else {
            Held::Own(blocks)
        });
    }

    /// It loses its blocks and will be computed anew.
    pub(crate) fn let_go(&mut self) {
        self.held = None;
        self.computed = 0;
        self.continues = false;
        if let Some(logprobs) = &mut self.prompt_logprobs {
            logprobs.clear();
        }
    }

    /// Makes blocks findable: the entries of the first `complete` tokens are there. Blocks with generated tokens stay
    /// private where they differ from what a prompt with these tokens would hold.
    pub(crate) fn publish(&mut self, complete: usize, prompts_differ: bool) {
        let Some(held) = &self.held else { return };
        let complete = if prompts_differ {
            complete.min(self.prompt_tokens)
        } else {
            complete
        };
        while (self.published + 1) * BLOCK_TOKENS <= complete {
            held.blocks()
                .publish(self.published, self.hashes[self.published]);
            self.published += 1;
        }
    }

    /// A token was chosen.
    pub(crate) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        self.history.push(token);
        self.extend_hashes();
    }

    fn extend_hashes(&mut self) {
        let (blocks, _) = self.tokens.as_chunks::<BLOCK_TOKENS>();
        for block in &blocks[self.hashes.len()..] {
            self.hashes.push(self.chain.push(block));
        }
    }

    /// Frees everything, then tells how it ended.
    pub(crate) fn end(mut self, event: Event) {
        self.held = None;
        self.sink.end(event);
    }
}
