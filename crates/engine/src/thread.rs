//! An engine on a thread of its own.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use kv::Pool;
use parking_lot::{Condvar, Mutex};

use crate::{
    Runner,
    api::Engine,
    driver::{BadOptions, Driver, Options, Progress, Surroundings, build},
};

/// How long the thread waits when sequences exist but none can go on: readers and block holders do not wake it.
const STUCK_WAIT: Duration = Duration::from_millis(1);

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// See [`BadOptions`].
    #[error(transparent)]
    Options(#[from] BadOptions),
    /// The operating system gave no thread.
    #[error("starting the engine's thread")]
    Thread(#[source] io::Error),
}

/// Starts an engine over a network whose blocks `pool` hands out. Its thread ends soon after the last handle is dropped.
///
/// # Errors
/// If the options do not fit, or no thread can be had.
pub fn start(
    runner: impl Runner,
    pool: Pool,
    options: Options,
) -> Result<Arc<dyn Engine>, StartError> {
    let signal = Arc::new(Signal::default());
    let surroundings = Surroundings {
        clock: Instant::now,
        wake: {
            let signal = Arc::clone(&signal);
            Arc::new(move || signal.give())
        },
    };
    let (handle, driver) = build(runner, pool, options, surroundings)?;
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || drive(driver, &signal))
        .map_err(StartError::Thread)?;
    Ok(handle)
}

fn drive<R: Runner>(mut driver: Driver<R>, signal: &Signal) {
    loop {
        match driver.tick() {
            Progress::Worked => {}
            Progress::Stuck => signal.wait(Some(STUCK_WAIT)),
            Progress::Idle => signal.wait(None),
            Progress::Stopped => return,
        }
    }
}

/// Wakes one waiter, now or when it next waits.
#[derive(Debug, Default)]
struct Signal {
    given: Mutex<bool>,
    condition: Condvar,
}

impl Signal {
    fn give(&self) {
        *self.given.lock() = true;
        self.condition.notify_one();
    }

    fn wait(&self, at_most: Option<Duration>) {
        let mut given = self.given.lock();
        if !*given {
            match at_most {
                Some(limit) => drop(self.condition.wait_for(&mut given, limit)),
                None => self.condition.wait_while(&mut given, |given| !*given),
            }
        }
        *given = false;
    }
}
