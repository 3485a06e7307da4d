//! The two ends of an engine: [`Handle`], which workers hold, and [`Driver`], which makes its steps.
//!
//! Who calls [`Driver::tick`] decides where the engine lives: on a thread of its own in production, as a task in
//! simulated time under test.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use kernels::BlockMemory;
use kv::{KvFormat, Pool};
use parking_lot::Mutex;
use tracing::error;

pub use crate::core::Progress;
use crate::{
    ExpertLoad, Runner,
    admission::validate,
    api::{Counters, Engine, Error, Job, Limits, Load, Refused, Running},
    core::{Core, StepLimits},
    sequence::Sequence,
};

/// How long the pool may go unchecked while the engine comes to rest again and again.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How an engine is set up. Zero stands for the default where the field says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Sequences that step together; at most what the network was planned for.
    pub max_running: usize,
    /// Sequences that wait.
    pub max_waiting: usize,
    /// Tokens of a step over all sequences.
    pub step_tokens: usize,
    /// Prompt tokens of one sequence in a step.
    pub chunk_tokens: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_running: 16,
            max_waiting: 256,
            step_tokens: 512,
            chunk_tokens: 256,
        }
    }
}

/// Options that do not fit each other or the network.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadOptions(String);

/// What both ends need from outside.
#[derive(Clone)]
pub struct Surroundings {
    /// Now.
    pub clock: fn() -> Instant,
    /// Called when there may be something to do.
    pub wake: Arc<dyn Fn() + Send + Sync>,
}

/// An engine over a network whose blocks `pool` hands out, in two halves.
///
/// # Errors
/// If the options do not fit.
pub fn build<R: Runner>(
    runner: R,
    pool: Pool,
    options: Options,
    surroundings: Surroundings,
) -> Result<(Arc<Handle>, Driver<R>), BadOptions> {
    check(&options, &runner, &pool).map_err(BadOptions)?;
    let facts = runner.facts().clone();
    let experts = Arc::new(ExpertLoad::new(facts.moe_layers.clone(), facts.experts));
    let steps = StepLimits {
        max_running: options.max_running,
        step_tokens: options.step_tokens,
        chunk_tokens: options.chunk_tokens,
        max_model_len: facts.max_model_len,
    };
    let inbox = Arc::new(Mutex::new(Inbox::default()));
    let handle = Handle {
        inbox: Arc::clone(&inbox),
        wake: surroundings.wake,
        pool: pool.clone(),
        memory: runner.memory(),
        limits: Limits {
            max_model_len: facts.max_model_len,
            max_running: options.max_running,
            max_waiting: options.max_waiting,
            vocab_size: facts.vocab_size,
            kv_layers: facts.format.layers,
            drafts: usize::from(facts.draft_layer),
        },
        format: facts.format,
        experts: Arc::clone(&experts),
    };
    let driver = Driver {
        core: Core::new(runner, pool.clone(), steps, experts),
        inbox,
        pool,
        clock: surroundings.clock,
        checked: (surroundings.clock)(),
        busy: Duration::ZERO,
    };
    Ok((Arc::new(handle), driver))
}

fn check<R: Runner>(options: &Options, runner: &R, pool: &Pool) -> Result<(), String> {
    let facts = runner.facts();
    let Options {
        max_running,
        max_waiting,
        step_tokens,
        chunk_tokens,
    } = *options;
    if max_running == 0 || max_waiting == 0 || chunk_tokens == 0 {
        return Err("max_running, max_waiting and chunk_tokens must be at least 1".into());
    }
    if max_running > facts.max_rows || step_tokens > facts.max_step_tokens {
        return Err(format!(
            "{max_running} sequences and {step_tokens} tokens a step: the network was planned for {} and {}",
            facts.max_rows, facts.max_step_tokens
        ));
    }
    // One token more than all streams take, so that prompts always go on.
    if step_tokens <= max_running {
        return Err(format!(
            "a step of {step_tokens} tokens leaves nothing for prompts beside {max_running} sequences"
        ));
    }
    let blocks = runner.memory().blocks();
    if pool.usage().total != blocks {
        return Err(format!(
            "a pool of {} blocks over a cache of {blocks}",
            pool.usage().total
        ));
    }
    Ok(())
}

/// What passes between the two ends.
#[derive(Debug, Default)]
struct Inbox {
    new: Vec<Sequence>,
    next_id: u64,
    drain: Option<Instant>,
    stop: bool,
    /// Why nothing is taken any more, once the driver is gone or does not trust its books.
    broken: Option<String>,
    /// As of the last step.
    load: Load,
    counters: Counters,
}

/// Makes the steps.
pub struct Driver<R> {
    core: Core<R>,
    inbox: Arc<Mutex<Inbox>>,
    pool: Pool,
    clock: fn() -> Instant,
    checked: Instant,
    busy: Duration,
}

impl<R> fmt::Debug for Driver<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl<R: Runner> Driver<R> {
    /// One step. What it returns says when the next is due: at once after [`Progress::Worked`], soon after
    /// [`Progress::Stuck`] (nobody wakes it then), at the next wake after [`Progress::Idle`], never after
    /// [`Progress::Stopped`].
    pub fn tick(&mut self) -> Progress {
        let stop = self.take_in();
        if stop {
            self.core.abandon(&Error::Draining);
            return Progress::Stopped;
        }
        let began = (self.clock)();
        let progress = self.core.step(began);
        let ended = (self.clock)();
        if progress == Progress::Worked {
            self.busy += ended - began;
        }
        let mut broken = None;
        if progress == Progress::Idle && ended - self.checked >= CHECK_EVERY {
            self.checked = ended;
            broken = self.pool.check_integrity().err();
        }
        let mut inbox = self.inbox.lock();
        inbox.load = self.core.load();
        inbox.counters = Counters {
            step_nanos: self.busy.as_nanos() as u64,
            ..self.core.counters()
        };
        if let Some(broken) = broken {
            error!(
                broken,
                "the books of KV blocks are wrong: nothing more is taken"
            );
            inbox.broken = Some(broken);
        }
        progress
    }

    /// Moves new sequences in; whether to stop.
    fn take_in(&mut self) -> bool {
        let mut inbox = self.inbox.lock();
        for sequence in inbox.new.drain(..) {
            self.core.accept(sequence);
        }
        if let Some(deadline) = inbox.drain {
            self.core.drain(deadline);
        }
        // Counted at once, so that nobody slips in over the limit while the step runs.
        inbox.load = self.core.load();
        inbox.stop
    }
}

impl<R> Drop for Driver<R> {
    fn drop(&mut self) {
        let mut inbox = self.inbox.lock();
        inbox.new.clear();
        inbox.load = Load::default();
        inbox
            .broken
            .get_or_insert_with(|| "the engine's driver ended".into());
    }
}

/// The end that workers hold; the engine stops when it is dropped.
pub struct Handle {
    inbox: Arc<Mutex<Inbox>>,
    wake: Arc<dyn Fn() + Send + Sync>,
    pool: Pool,
    memory: Arc<dyn BlockMemory>,
    format: KvFormat,
    limits: Limits,
    experts: Arc<ExpertLoad>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("load", &self.load())
            .finish_non_exhaustive()
    }
}

impl Engine for Handle {
    fn submit(&self, job: Job) -> Result<Running, Refused> {
        validate(&job, &self.limits, self.pool.usage().total)?;
        let mut inbox = self.inbox.lock();
        if let Some(broken) = &inbox.broken {
            return Err(Refused::Broken(broken.clone()));
        }
        if inbox.drain.is_some() || inbox.stop {
            return Err(Refused::Draining);
        }
        let waiting = inbox.load.waiting + inbox.new.len();
        if waiting >= self.limits.max_waiting {
            return Err(Refused::QueueFull { waiting });
        }
        let id = inbox.next_id;
        inbox.next_id += 1;
        let (sequence, running) = Sequence::new(id, job, &self.pool, self.limits.kv_layers);
        inbox.new.push(sequence);
        drop(inbox);
        (self.wake)();
        Ok(running)
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn memory(&self) -> Arc<dyn BlockMemory> {
        Arc::clone(&self.memory)
    }

    fn format(&self) -> &KvFormat {
        &self.format
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn load(&self) -> Load {
        let inbox = self.inbox.lock();
        let new_tokens: usize = inbox.new.iter().map(Sequence::uncomputed).sum();
        Load {
            waiting: inbox.load.waiting + inbox.new.len(),
            waiting_tokens: inbox.load.waiting_tokens + new_tokens,
            ..inbox.load
        }
    }

    fn counters(&self) -> Counters {
        self.inbox.lock().counters
    }

    fn experts(&self) -> Arc<ExpertLoad> {
        Arc::clone(&self.experts)
    }

    fn broken(&self) -> Option<String> {
        self.inbox.lock().broken.clone()
    }

    fn drain(&self, deadline: Instant) {
        self.inbox.lock().drain = Some(deadline);
        (self.wake)();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.inbox.lock().stop = true;
        (self.wake)();
    }
}
