//! A circuit breaker for a worker that is there but fails: after some failures in a row it gets no requests for a while,
//! then one, and only when that one succeeds all of them again.

use std::time::Duration;

use tokio::time::Instant;

/// When it opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures in a row.
    pub failures: u32,
    /// Time without requests.
    pub open: Duration,
}

/// State of one worker. Takes the time as an argument and decides nothing by itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
    is_probing: bool,
}

impl Breaker {
    /// Whether a request may go to the worker at `now`.
    pub(crate) fn allows(&self, now: Instant) -> bool {
        match self.open_until {
            None => true,
            Some(until) => now >= until && !self.is_probing,
        }
    }

    /// A request goes to the worker.
    pub(crate) fn start(&mut self) {
        self.is_probing = self.open_until.is_some();
    }

    /// A request got what it wanted.
    pub(crate) fn succeed(&mut self) {
        *self = Self::default();
    }

    /// A request failed because of the worker.
    pub(crate) fn fail(&mut self, config: BreakerConfig, now: Instant) {
        self.failures += 1;
        if self.failures >= config.failures || self.open_until.is_some() {
            self.open_until = Some(now + config.open);
        }
        self.is_probing = false;
    }

    /// A request ended without saying anything about the worker (its client left).
    pub(crate) fn abandon(&mut self) {
        self.is_probing = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BreakerConfig = BreakerConfig {
        failures: 3,
        open: Duration::from_secs(5),
    };

    #[tokio::test(start_paused = true)]
    async fn three_failures_in_a_row_open_it_and_one_success_closes_it() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        breaker.fail(CONFIG, now);
        breaker.fail(CONFIG, now);
        breaker.succeed();
        breaker.fail(CONFIG, now);
        breaker.fail(CONFIG, now);
        assert!(breaker.allows(now));
        breaker.fail(CONFIG, now);
        assert!(!breaker.allows(now));
        let later = now + CONFIG.open;
        assert!(breaker.allows(later));
        breaker.start();
        assert!(!breaker.allows(later), "one probe at a time");
        breaker.succeed();
        assert!(breaker.allows(later));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_probe_opens_it_again_and_an_abandoned_one_makes_room_for_another() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for _ in 0..3 {
            breaker.fail(CONFIG, now);
        }
        let later = now + CONFIG.open;
        breaker.start();
        breaker.abandon();
        assert!(breaker.allows(later));
        breaker.start();
        breaker.fail(CONFIG, later);
        assert!(!breaker.allows(later));
    }
}
