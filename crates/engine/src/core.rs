//! The engine without its thread: sequences in, one step at a time, events out.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use kernels::BlockMemory;
use kv::{BLOCK_TOKENS, Blocks, NoBlocks, Pool, blocks_for};
use tracing::{debug, error};

use crate::{
    ExpertLoad,
    api::{Counters, Error, Event, Load},
    runner::{Facts, Runner},
    sampler::Sampler,
    schedule::{self, Need, Slice},
    sequence::{Held, Sequence},
};

/// Tokens of a step of a sequence that wants a row of logits for each of them: bounds the memory for logits.
const LOGPROB_CHUNK: usize = 64;

/// How steps are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StepLimits {
    /// Sequences that step together.
    pub(crate) max_running: usize,
    /// Tokens of a step, at least `max_running`.
    pub(crate) step_tokens: usize,
    /// Prompt tokens of one sequence in a step.
    pub(crate) chunk_tokens: usize,
    /// Prompt and output together.
    pub(crate) max_model_len: usize,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something was computed.
    Worked,
    /// There are sequences, but their readers are behind or other holders have the blocks.
    Stuck,
    /// There are none.
    Idle,
    /// The engine has ended.
    Stopped,
}

/// What a sweep finds about a sequence.
enum Verdict {
    Keep,
    /// Its reader is gone: there is nobody to tell.
    Drop,
    Fail(Error),
}

/// See the module documentation. The fields that [`crate::compute`] uses are visible to it.
pub(crate) struct Core<R> {
    pub(crate) runner: R,
    pub(crate) facts: Facts,
    pub(crate) memory: Arc<dyn BlockMemory>,
    pub(crate) pool: Pool,
    pub(crate) limits: StepLimits,
    /// Not started (or preempted), without blocks. In order of arrival, like all lists here.
    waiting: VecDeque<Sequence>,
    /// Not started, with transferred blocks. They never wait behind those without: what these need may be what they hold.
    handed: VecDeque<Sequence>,
    pub(crate) running: Vec<Sequence>,
    free_states: Vec<usize>,
    pub(crate) sampler: Sampler,
    pub(crate) logits: Vec<f32>,
    pub(crate) counters: Counters,
    pub(crate) experts: Arc<ExpertLoad>,
    drain: Option<Instant>,
}

impl<R: Runner> Core<R> {
    pub(crate) fn new(runner: R, pool: Pool, limits: StepLimits, experts: Arc<ExpertLoad>) -> Self {
        let facts = runner.facts().clone();
        debug_assert!(limits.max_running <= limits.step_tokens);
        debug_assert!(limits.max_running <= facts.max_rows);
        debug_assert!(limits.step_tokens <= facts.max_step_tokens);
        Self {
            memory: runner.memory(),
            free_states: (0..limits.max_running).rev().collect(),
            runner,
            facts,
            pool,
            limits,
            waiting: VecDeque::new(),
            handed: VecDeque::new(),
            running: Vec::new(),
            sampler: Sampler::default(),
            logits: Vec::new(),
            counters: Counters::default(),
            experts,
            drain: None,
        }
    }

    /// Queues a sequence.
    pub(crate) fn accept(&mut self, sequence: Sequence) {
        let queue = if sequence.held.is_some() {
            &mut self.handed
        } else {
            &mut self.waiting
        };
        queue.push_back(sequence);
    }

    /// What has not ended by then ends.
    pub(crate) fn drain(&mut self, deadline: Instant) {
        self.drain = Some(deadline);
    }

    pub(crate) fn load(&self) -> Load {
        let queued = self.waiting.iter().chain(&self.handed);
        let prompts = self.running.iter().filter(|s| !s.is_decoding());
        Load {
            running: self.running.len(),
            waiting: self.waiting.len() + self.handed.len(),
            waiting_tokens: queued.chain(prompts).map(Sequence::uncomputed).sum(),
        }
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Ends everything.
    pub(crate) fn abandon(&mut self, reason: &Error) {
        let all = self.running.drain(..).chain(self.waiting.drain(..));
        for sequence in all.chain(self.handed.drain(..)) {
            sequence.end(Event::Failed(reason.clone()));
        }
        self.free_states = (0..self.limits.max_running).rev().collect();
    }

    /// One step: ends what must end, lets in what fits, computes, and tells the readers.
    pub(crate) fn step(&mut self, now: Instant) -> Progress {
        self.sweep(now);
        self.grow();
        self.admit();
        let slices = self.share();
        if slices.is_empty() {
            let none = self.running.is_empty() && self.waiting.is_empty() && self.handed.is_empty();
            return if none {
                Progress::Idle
            } else {
                Progress::Stuck
            };
        }
        if let Err(failed) = self.compute(&slices) {
            error!(error = %failed, "a step failed");
            for slice in slices.iter().rev() {
                self.end(
                    slice.index,
                    Event::Failed(Error::Network(failed.to_string())),
                );
            }
        }
        self.counters.steps += 1;
        Progress::Worked
    }

    /// Ends what nobody wants, what is too late, and at the end of a drain everything.
    fn sweep(&mut self, now: Instant) {
        let drained = self.drain.is_some_and(|deadline| now >= deadline);
        let verdict = |sequence: &Sequence| {
            if sequence.sink.is_cancelled() {
                Verdict::Drop
            } else if now >= sequence.deadline {
                Verdict::Fail(Error::Deadline)
            } else if drained {
                Verdict::Fail(Error::Draining)
            } else {
                Verdict::Keep
            }
        };
        for queue in [&mut self.waiting, &mut self.handed] {
            let mut i = 0;
            while let Some(sequence) = queue.get(i) {
                match verdict(sequence) {
                    Verdict::Keep => i += 1,
                    Verdict::Drop => drop(queue.remove(i)),
                    Verdict::Fail(reason) => {
                        if let Some(sequence) = queue.remove(i) {
                            sequence.end(Event::Failed(reason));
                        }
                    }
                }
            }
        }
        for i in (0..self.running.len()).rev() {
            match verdict(&self.running[i]) {
                Verdict::Keep => {}
                Verdict::Drop => drop(self.remove(i)),
                Verdict::Fail(reason) => self.end(i, Event::Failed(reason)),
            }
        }
    }

    /// Gives every sequence the block its next token needs; the youngest pay where there are not enough.
    fn grow(&mut self) {
        let mut i = 0;
        while i < self.running.len() {
            let sequence = &mut self.running[i];
            let needed = blocks_for(sequence.tokens.len());
            let grown = match &mut sequence.held {
                // Nobody loses blocks for a sequence whose reader makes it wait.
                Some(Held::Own(blocks)) if sequence.sink.is_ready() => grow_to(blocks, needed),
                _ => Ok(()),
            };
            let Err(NoBlocks { total, .. }) = grown else {
                i += 1;
                continue;
            };
            if needed > total {
                self.end(i, Event::Failed(Error::OutOfBlocks { needed, total }));
                continue;
            }
            // What a transfer reads can not be taken away.
            let may_lose: Vec<bool> = self
                .running
                .iter()
                .map(|s| s.leaves_after.is_none())
                .collect();
            let victim = schedule::victim(&may_lose, i).unwrap_or(i);
            self.preempt(victim);
        }
    }

    fn preempt(&mut self, i: usize) {
        let mut sequence = self.remove(i);
        debug!(request = sequence.request, "preempted: out of KV blocks");
        sequence.let_go();
        self.counters.preemptions += 1;
        let place = self.waiting.partition_point(|s| s.id < sequence.id);
        self.waiting.insert(place, sequence);
    }

    fn admit(&mut self) {
        while self.running.len() < self.limits.max_running {
            let Some(sequence) = self.handed.pop_front() else {
                break;
            };
            self.start(sequence);
        }
        while self.running.len() < self.limits.max_running {
            let Some(sequence) = self.waiting.front_mut() else {
                break;
            };
            let blocks = blocks_for(sequence.tokens.len());
            let hashes = sequence.prefix_hashes(self.facts.prompts_differ);
            let fresh = blocks - self.pool.prefix_len(hashes);
            let available = self.pool.usage().available();
            if !schedule::admits(fresh, available, self.running.len()) {
                break;
            }
            // Leases are taken beside us, so that this may fail even though the count was right.
            let Ok(blocks) = self.pool.acquire(hashes, blocks) else {
                break;
            };
            let Some(mut sequence) = self.waiting.pop_front() else {
                break;
            };
            sequence.hold(blocks);
            self.start(sequence);
        }
    }

    fn start(&mut self, mut sequence: Sequence) {
        sequence.state = self.free_states.pop();
        debug_assert!(
            sequence.state.is_some(),
            "as many states as running sequences"
        );
        if !sequence.started {
            sequence.started = true;
            let cached_tokens = match &sequence.held {
                Some(held) => held.blocks().cached_blocks() * BLOCK_TOKENS,
                None => 0,
            };
            self.counters.cached_tokens += sequence.computed.min(cached_tokens) as u64;
            sequence.sink.send(Event::Started {
                cached_tokens,
                blocks: match &sequence.held {
                    Some(Held::Lent(blocks)) => Some(Arc::clone(blocks)),
                    Some(Held::Own(_)) | None => None,
                },
            });
        }
        let place = self.running.partition_point(|s| s.id < sequence.id);
        self.running.insert(place, sequence);
    }

    fn share(&self) -> Vec<Slice> {
        let need = |sequence: &Sequence| Need {
            tokens: if self.facts.prompts_differ && sequence.computed < sequence.prompt_tokens {
                sequence.prompt_tokens - sequence.computed
            } else {
                sequence.uncomputed()
            },
            chunk: if sequence.prompt_logprobs.is_some() {
                self.limits.chunk_tokens.min(LOGPROB_CHUNK)
            } else {
                self.limits.chunk_tokens
            },
            decodes: sequence.is_decoding(),
            ready: sequence.sink.is_ready() && !sequence.needs_block(),
        };
        let needs: Vec<Need> = self.running.iter().map(need).collect();
        schedule::share(&needs, self.limits.step_tokens)
    }

    /// Takes a sequence out of the batch.
    fn remove(&mut self, i: usize) -> Sequence {
        let mut sequence = self.running.remove(i);
        self.free_states.extend(sequence.state.take());
        sequence
    }

    pub(crate) fn end(&mut self, i: usize, event: Event) {
        self.remove(i).end(event);
    }
}

fn grow_to(blocks: &mut Blocks, needed: usize) -> Result<(), NoBlocks> {
    while blocks.ids().len() < needed {
        blocks.grow()?;
    }
    Ok(())
}
