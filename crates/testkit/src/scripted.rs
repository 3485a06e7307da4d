//! An engine without weights and without a thread: the real scheduler over a [`Toy`] network, stepping in tokio's time.
//!
//! For the simulator and for tests of workers: tokens are a pure function of sequence and seed ([`ToyConfig::greedy`]
//! says which), KV bytes are checked wherever they are used, and everything happens in the order of simulated time.

use std::{fmt, sync::Arc, time::Duration};

use engine::{
    Options,
    driver::{Driver, Handle, Progress, Surroundings, build},
};
use kv::Pool;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep},
};

use crate::toy::{Toy, ToyConfig};

/// An engine for simulated time.
#[derive(Debug)]
pub struct Scripted {
    /// The engine. It stops when the last handle is dropped.
    pub engine: Arc<Handle>,
    /// Makes the engine's steps: to be spawned ([`Stepper::run`]).
    pub stepper: Stepper,
    /// Wrong KV bytes that were found in use: must stay empty.
    pub violations: mpsc::UnboundedReceiver<String>,
}

/// Makes the steps of a [`Scripted`] engine.
pub struct Stepper {
    driver: Driver<Toy>,
    woken: Arc<Notify>,
    pace: Box<dyn Fn() -> Duration + Send>,
}

impl fmt::Debug for Stepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stepper").finish_non_exhaustive()
    }
}

impl Scripted {
    /// An engine that takes `step` of tokio's time for each step. With `poison`, blocks are filled with NaN when freed.
    ///
    /// # Panics
    /// If the options do not fit the network: the test is wrong then.
    pub fn new(config: &ToyConfig, options: Options, step: Duration, poison: bool) -> Self {
        Self::paced(config, options, move || step, poison)
    }

    /// As [`Scripted::new`], with a time for each step that may change.
    ///
    /// # Panics
    /// As [`Scripted::new`].
    pub fn paced(
        config: &ToyConfig,
        options: Options,
        pace: impl Fn() -> Duration + Send + 'static,
        poison: bool,
    ) -> Self {
        let (toy, violations) = Toy::new(config.clone());
        let pool = if poison {
            Pool::poisoning(engine::Runner::memory(&toy), &config.revision)
        } else {
            Pool::new(config.blocks, &config.revision)
        };
        let woken = Arc::new(Notify::new());
        let surroundings = Surroundings {
            clock: || Instant::now().into_std(),
            wake: {
                let woken = Arc::clone(&woken);
                Arc::new(move || woken.notify_one())
            },
        };
        let (engine, driver) = build(toy, pool, options, surroundings).expect("options that fit");
        Self {
            engine,
            stepper: Stepper {
                driver,
                woken,
                pace: Box::new(pace),
            },
            violations,
        }
    }
}

impl Stepper {
    /// Steps until the last handle of the engine is dropped.
    pub async fn run(mut self) {
        loop {
            match self.driver.tick() {
                Progress::Worked | Progress::Stuck => sleep((self.pace)()).await,
                Progress::Idle => self.woken.notified().await,
                Progress::Stopped => return,
            }
        }
    }
}
