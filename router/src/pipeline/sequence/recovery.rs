//! Between two attempts: whether there is another one, when, and where.

use std::time::Duration;

use openai::ApiError;
use planted::Bug;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{PROGRESS_TOKENS, Sequence, Stage};
use crate::pipeline::{
    attempt::Failure,
    retry::{Reason, Verdict, pause},
    route::{Route, Wish, choose},
};

impl Sequence {
    /// Prepares the next attempt, or says why there is none.
    pub(super) async fn recover(&mut self, failure: Failure) -> Result<(), ApiError> {
        // Drops the attempt's streams and lease, which cancels it at the workers.
        self.stage = Stage::Idle;
        if planted::is(Bug::TokenTwice) && self.produced() > 0 {
            self.spec.tokens.pop();
        }
        let Failure {
            verdict,
            detail,
            avoid,
        } = failure;
        let reason = match verdict {
            Verdict::Fatal(error) => return Err(*error),
            Verdict::Full => None,
            Verdict::Retry(reason) => Some(reason),
        };
        if Instant::now() >= self.spec.deadline {
            return Err(ApiError::deadline(
                "The request did not end within its time limit.",
            ));
        }
        let (config, random) = (self.shared.config.retry, self.shared.seams.entropy.u64());
        debug!(attempt = self.attempt, %detail, "attempt failed");
        self.attempt += 1;
        let wait = if let Some(reason) = reason {
            let produced = self.produced();
            if produced - self.failed_at >= PROGRESS_TOKENS {
                self.failures = 0;
                self.avoid.clear();
                self.spec.deaths.lock().clear();
            }
            if reason == Reason::Died {
                self.count_death(avoid.first())?;
            }
            self.failed_at = produced;
            self.failures += 1;
            self.avoid.extend(avoid);
            self.permit_retry(reason)?;
            info!(attempt = self.attempt, reason = reason.as_str(), %detail, "starting over");
            pause(config, self.failures, random)
        } else {
            self.refusals += 1;
            let queue_timeout = self.shared.config.admission.queue_timeout;
            if self.produced() == 0 && self.spec.arrived.elapsed() > queue_timeout {
                let message = "The server is overloaded: no worker had room in time.";
                return Err(ApiError::overloaded(message, 1));
            }
            pause(config, self.refusals + 1, random)
        };
        let left = self.spec.deadline.saturating_duration_since(Instant::now());
        sleep(wait.min(left)).await;
        Ok(())
    }

    /// A request that kills the workers that compute it must not reach them all.
    fn count_death(&self, incarnation: Option<&String>) -> Result<(), ApiError> {
        let count = {
            let mut deaths = self.spec.deaths.lock();
            deaths.extend(incarnation.cloned());
            deaths.len()
        };
        if count < self.shared.config.retry.max_deaths {
            return Ok(());
        }
        self.shared.metrics.poisoned.inc();
        warn!(request.id = ?self.spec.request_id, workers = count, "workers died while they ran this request: giving it up");
        Err(ApiError::poisoned(count))
    }

    pub(super) fn permit_retry(&self, reason: Reason) -> Result<(), ApiError> {
        let metrics = &self.shared.metrics;
        let is_migration = self.produced() > 0;
        if self.failures > self.shared.config.retry.max_failures {
            return Err(ApiError::unavailable("The workers failed repeatedly.", 1));
        }
        if is_migration {
            metrics
                .migrations
                .with_label_values(&[reason.as_str()])
                .inc();
        } else {
            if !self.shared.budget.withdraw() {
                return Err(ApiError::unavailable(
                    "Too many requests fail at the workers.",
                    1,
                ));
            }
            metrics.retries.with_label_values(&[reason.as_str()]).inc();
        }
        Ok(())
    }

    /// Chooses workers; waits a while if there are none.
    pub(super) async fn route(&mut self) -> Result<Route, ApiError> {
        let shared = &self.shared;
        let mut changes = shared.fleet.subscribe();
        let until = self.bound(shared.config.timeouts.no_worker);
        let mut is_counted = false;
        loop {
            changes = changes.resubscribe();
            let wish = Wish {
                mode: shared.config.mode,
                policy: shared.config.policy,
                avoid: &self.avoid,
                tokens: &self.spec.tokens,
                salt: &self.spec.cache_salt,
            };
            let random = shared.seams.entropy.u64();
            match choose(&shared.fleet.workers(), &wish, random, Instant::now()) {
                Ok(route) => return Ok(route),
                Err(none) if !is_counted => {
                    shared
                        .metrics
                        .no_pair
                        .with_label_values(&[none.reason()])
                        .inc();
                    is_counted = true;
                }
                Err(_) => {}
            }
            // A breaker that may be tried again makes no change: look again now and then.
            let soon = Instant::now() + Duration::from_millis(500);
            if tokio::time::timeout_at(until.min(soon), changes.recv())
                .await
                .is_err()
                && Instant::now() >= until
            {
                return Err(ApiError::unavailable(
                    "No worker can take the request now.",
                    1,
                ));
            }
        }
    }
}
