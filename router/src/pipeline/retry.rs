//! What to do about a failure: try elsewhere, wait for room, or give up. Decisions only.

use std::{
    sync::atomic::{AtomicI64, Ordering::Relaxed},
    time::Duration,
};

use openai::ApiError;
use tonic::{Code, Status};

use crate::fleet::Died;

/// How often a sequence is started over.
#[derive(Clone, Copy, Debug)]
pub struct RetryConfig {
    /// Attempts that may fail before the request does.
    pub max_failures: u32,
    /// Workers that may die while they run a request before it is held to be what kills them.
    pub max_deaths: usize,
    /// Pause before the second retry (the first comes at once); doubles from there.
    pub pause: Duration,
    /// Longest pause.
    pub max_pause: Duration,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            max_failures: 4,
            max_deaths: 2,
            pause: Duration::from_millis(50),
            max_pause: Duration::from_secs(2),
        }
    }
}

/// Why an attempt ended early: the label of the retry and migration counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The worker's connection broke after it took the call: it died, or the network did.
    Died,
    /// The worker cannot be reached, left, or closed the stream.
    Lost,
    /// It did not answer in time.
    Slow,
    /// Bytes of the KV cache did not match their checksums.
    Corrupt,
    /// The lease, incarnation or revision is not the one that was meant.
    Stale,
    /// It failed.
    Failed,
    /// It said what it may not say: a token out of order, no end.
    Protocol,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Died => "died",
            Self::Lost => "lost",
            Self::Slow => "slow",
            Self::Corrupt => "corrupt",
            Self::Stale => "stale",
            Self::Failed => "failed",
            Self::Protocol => "protocol",
        }
    }

    /// Whether it speaks against the worker.
    pub(crate) fn is_blame(self) -> bool {
        !matches!(self, Self::Stale)
    }
}

/// What a failed call means for the sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start over, elsewhere if possible.
    Retry(Reason),
    /// No room: wait.
    Full,
    /// No worker will do better.
    Fatal(Box<ApiError>),
}

/// Judges a worker's status.
pub(crate) fn judge(status: &Status) -> Verdict {
    match status.code() {
        Code::Unavailable if is_death(status) => Verdict::Retry(Reason::Died),
        Code::Unavailable | Code::Cancelled => Verdict::Retry(Reason::Lost),
        Code::DeadlineExceeded => Verdict::Retry(Reason::Slow),
        Code::DataLoss => Verdict::Retry(Reason::Corrupt),
        Code::Aborted | Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition => {
            Verdict::Retry(Reason::Stale)
        }
        Code::ResourceExhausted => Verdict::Full,
        Code::InvalidArgument | Code::OutOfRange => {
            Verdict::Fatal(Box::new(ApiError::invalid("prompt", status.message())))
        }
        Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => Verdict::Fatal(
            Box::new(ApiError::internal("A worker refused the request.")),
        ),
        Code::Ok | Code::Unknown | Code::Internal => Verdict::Retry(Reason::Failed),
    }
}

fn is_death(status: &Status) -> bool {
    std::error::Error::source(status).is_some_and(<dyn std::error::Error>::is::<Died>)
}

/// The pause before retry number `retry` (from 1), with up to half more at random.
pub(crate) fn pause(config: RetryConfig, retry: u32, random: u64) -> Duration {
    if retry <= 1 {
        return Duration::ZERO;
    }
    let pause = config
        .pause
        .saturating_mul(1 << (retry - 2).min(16))
        .min(config.max_pause);
    pause + pause.mul_f64((random % 1024) as f64 / 2048.0)
}

/// Keeps retries a small part of all attempts, so that an outage is not made worse by them: every request puts a fifth
/// of a retry in, every retry takes one out. Migrations of running answers are not counted: they replace load, they do
/// not add any.
#[derive(Debug)]
pub(crate) struct Budget {
    /// In fifths.
    balance: AtomicI64,
}

const FULL_BALANCE: i64 = 5 * 100;

impl Budget {
    pub(crate) fn new() -> Self {
        Self {
            balance: AtomicI64::new(FULL_BALANCE),
        }
    }

    /// A request came.
    pub(crate) fn deposit(&self) {
        if self.balance.load(Relaxed) < FULL_BALANCE {
            self.balance.fetch_add(1, Relaxed);
        }
    }

    /// Whether a retry may be made.
    pub(crate) fn withdraw(&self) -> bool {
        self.balance
            .fetch_update(Relaxed, Relaxed, |balance| {
                (balance >= 5).then_some(balance - 5)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_user_s_mistakes_and_refusals_are_final() {
        let is_retried = |code| !matches!(judge(&Status::new(code, "")), Verdict::Fatal(_));
        for code in [
            Code::Unavailable,
            Code::DataLoss,
            Code::NotFound,
            Code::Unknown,
            Code::Aborted,
        ] {
            assert!(is_retried(code), "{code:?}");
        }
        assert!(!is_retried(Code::InvalidArgument));
        assert_eq!(judge(&Status::resource_exhausted("")), Verdict::Full);
    }

    #[test]
    fn only_a_connection_that_broke_under_a_call_that_was_taken_is_a_death() {
        let mut status = Status::unavailable("connection to the worker: broken pipe");
        assert_eq!(judge(&status), Verdict::Retry(Reason::Lost));
        status.set_source(std::sync::Arc::new(Died));
        assert_eq!(judge(&status), Verdict::Retry(Reason::Died));
    }

    #[test]
    fn pauses_grow_from_none_to_the_longest() {
        let config = RetryConfig::default();
        assert_eq!(pause(config, 1, 0), Duration::ZERO);
        assert_eq!(pause(config, 2, 0), config.pause);
        assert_eq!(pause(config, 4, 0), config.pause * 4);
        assert_eq!(pause(config, 40, 0), config.max_pause);
    }

    #[test]
    fn a_budget_lets_a_fifth_of_all_requests_be_retried() {
        let budget = Budget::new();
        while budget.withdraw() {}
        for _ in 0..50 {
            budget.deposit();
        }
        assert_eq!((0..50).filter(|_| budget.withdraw()).count(), 10);
    }
}
