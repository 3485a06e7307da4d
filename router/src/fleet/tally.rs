//! What the router itself knows of a worker's load and health: the sequences it sent there and how they ended. All lanes
//! of the process count together; each has a connection of its own.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::breaker::{Breaker, BreakerConfig};

/// Of one life of a worker.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    sequences: AtomicU32,
    prompt_tokens: AtomicU64,
    breaker: Mutex<Breaker>,
}

impl Tally {
    /// Whether new requests may go there at `now`.
    pub(super) fn allows(&self, now: Instant) -> bool {
        self.breaker.lock().allows(now)
    }

    /// Sequences that are there or on their way.
    pub(super) fn sequences(&self) -> u32 {
        self.sequences.load(Relaxed)
    }

    /// Prompt tokens that it was sent and still has to compute.
    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt_tokens.load(Relaxed)
    }

    /// A sequence goes there.
    pub(super) fn start(&self, prompt_tokens: u64) {
        self.breaker.lock().start();
        self.sequences.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(prompt_tokens, Relaxed);
    }

    /// A sequence left it, whichever way.
    pub(super) fn end(&self, prompt_tokens: u64, is_judged: bool) {
        self.sequences.fetch_sub(1, Relaxed);
        self.prompt_tokens.fetch_sub(prompt_tokens, Relaxed);
        if !is_judged {
            self.breaker.lock().abandon();
        }
    }

    /// It did what it should.
    pub(super) fn succeed(&self) {
        self.breaker.lock().succeed();
    }

    /// It failed.
    pub(super) fn fail(&self, config: BreakerConfig, now: Instant) {
        self.breaker.lock().fail(config, now);
    }
}

/// Those of all workers, by incarnation.
#[derive(Debug, Default)]
pub(crate) struct Tallies(Mutex<BTreeMap<String, Weak<Tally>>>);

impl Tallies {
    /// The one of a worker's life, whichever lane met it first.
    pub(super) fn of(&self, incarnation: &str) -> Arc<Tally> {
        let mut tallies = self.0.lock();
        tallies.retain(|_, tally| tally.strong_count() > 0);
        if let Some(tally) = tallies.get(incarnation).and_then(Weak::upgrade) {
            return tally;
        }
        let tally = Arc::new(Tally::default());
        tallies.insert(incarnation.into(), Arc::downgrade(&tally));
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_the_tally_of_one_life_and_nothing_outlives_it() {
        let tallies = Tallies::default();
        let (first, second) = (tallies.of("a"), tallies.of("a"));
        first.start(5);
        assert_eq!((second.sequences(), second.prompt_tokens()), (1, 5));
        assert_eq!(tallies.of("b").sequences(), 0);
        drop((first, second));
        assert_eq!(tallies.of("a").sequences(), 0);
    }
}
