//! Whether a process is ready for work and whether it is alive. The two are kept apart: a worker without a peer is not
//! ready at most, never dead.

use std::{fmt, sync::Arc};

use tokio::sync::watch;

/// How far a process is in its life. It only ever moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Loads weights, warms up, looks for peers.
    Starting,
    /// Takes work.
    Ready,
    /// Finishes what it has and takes no more.
    Draining,
}

impl State {
    /// One lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

/// Says why a process is stuck, or nothing.
type LivenessCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The health of a process, shared by all that set or show it.
#[derive(Clone)]
pub struct Health {
    state: Arc<watch::Sender<State>>,
    liveness: LivenessCheck,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Health {
    /// Starting, and alive as long as it answers.
    pub fn new() -> Self {
        Self {
            state: Arc::new(watch::Sender::new(State::Starting)),
            liveness: Arc::new(|| Ok(())),
        }
    }

    /// Also alive only while `check` says so: the heartbeat of the engine's thread, say. The check must return at once.
    #[must_use]
    pub fn with_liveness(
        mut self,
        check: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.liveness = Arc::new(check);
        self
    }

    /// Moves on to `state`. Going back (from draining to ready) does nothing: a peer that was told of the drain must
    /// never see this process ready again.
    pub fn advance(&self, state: State) {
        self.state.send_if_modified(|current| {
            let forward = state > *current;
            if forward {
                *current = state;
            }
            forward
        });
    }

    /// Where it is now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Follows the state.
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// # Errors
    /// Why the process is stuck and should be restarted.
    pub fn check_liveness(&self) -> Result<(), String> {
        (self.liveness)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draining_process_never_becomes_ready_again() {
        let health = Health::new();
        health.advance(State::Draining);
        health.advance(State::Ready);
        assert_eq!(health.state(), State::Draining);
    }
}
