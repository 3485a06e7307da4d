//! How a process stops: a signal cancels a token, whoever holds it stops admitting, and [`Tasks::drain`] waits for what
//! runs, up to a deadline.

use std::{future::Future, io, io::Read, thread, time::Duration};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, info, info_span, warn};

/// Cancels `stop` on the first SIGTERM or SIGINT and `abort` on the second: the first asks, the second insists.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals(
    tasks: &Tasks,
    stop: CancellationToken,
    abort: CancellationToken,
) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let end = tasks.closing.clone();
    tasks.spawn("signals", async move {
        for token in [stop, abort] {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                () = end.cancelled() => return,
            };
            info!(signal = name, "asked to stop");
            token.cancel();
        }
    });
    Ok(())
}

/// Cancels `stop` once standard input ends: a parent that holds the other end of a pipe there takes its children along
/// however it dies. The thread that waits is not joined: it may sit in `read` when the process leaves.
pub fn on_parent_exit(stop: CancellationToken) {
    let wait = move || {
        let mut buffer = [0; 256];
        let mut input = io::stdin().lock();
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        stop.cancel();
    };
    if let Err(error) = thread::Builder::new()
        .name("parent-watch".into())
        .spawn(wait)
    {
        warn!(%error, "cannot watch the parent process");
    }
}

/// The named tasks of a process (or of one part of it): counted, so that a test can see them all go.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    closing: CancellationToken,
}

impl Tasks {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` as a task whose events stand in a span with its name.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.tracker
            .spawn(future.instrument(info_span!("task", name)))
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether none runs.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Cancelled when [`drain`](Self::drain) begins: tasks that only serve others end on it.
    pub fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Waits until every task ended, `deadline` at most.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.closing.cancel();
        self.tracker.close();
        match tokio::time::timeout(deadline, self.tracker.wait()).await {
            Ok(()) => Drained::Whole,
            Err(_) => Drained::Late { left: self.len() },
        }
    }
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// Every task ended by itself.
    Whole,
    /// The deadline came first.
    Late {
        /// Tasks that still ran.
        left: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_tasks_that_end_in_time() {
        let tasks = Tasks::new();
        tasks.spawn("short", tokio::time::sleep(Duration::from_secs(1)));
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Drained::Whole);
        assert!(tasks.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_gives_up_at_its_deadline_and_says_how_many_are_left() {
        let tasks = Tasks::new();
        tasks.spawn("long", tokio::time::sleep(Duration::from_secs(60)));
        assert_eq!(
            tasks.drain(Duration::from_secs(5)).await,
            Drained::Late { left: 1 }
        );
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_only_serve_others_end_when_a_drain_begins() {
        let tasks = Tasks::new();
        tasks.spawn("server", tasks.closing().clone().cancelled_owned());
        assert_eq!(tasks.drain(Duration::from_secs(5)).await, Drained::Whole);
    }
}
