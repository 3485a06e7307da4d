//! Leaving in order: not ready, nothing new, finish what runs or give it up at the deadline.

use std::time::Duration;

use proto::v1;
use telemetry::health::State;
use tokio::{sync::watch, time::Instant};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::{info, warn};

use crate::shared::Shared;

/// Leases whose sequence has not come yet are waited for so long.
const LEASE_GRACE: Duration = Duration::from_secs(5);
/// From the end of the deadline until every call has said so to its caller.
const LAST_WORDS: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(10);

/// How a worker's life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything that ran was finished.
    Whole,
    /// The deadline came first.
    GaveUp {
        /// Calls that were given up.
        calls: usize,
    },
}

/// Asks for a drain; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Signal(watch::Sender<Option<Instant>>);

impl Signal {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    /// Begins a drain that ends at `deadline`; an earlier deadline than one given before replaces it.
    pub(crate) fn begin(&self, deadline: Instant) {
        self.0.send_if_modified(|current| {
            let earlier = current.is_none_or(|current| deadline < current);
            if earlier {
                *current = Some(deadline);
            }
            earlier
        });
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Follows the deadline.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Instant>> {
        self.0.subscribe()
    }
}

/// What `grpc.health.v1` says for each service of a worker, and for the worker ("").
pub(crate) async fn report(
    reporter: &HealthReporter,
    services: &[&'static str],
    status: ServingStatus,
) {
    for service in services.iter().chain(&[""]) {
        reporter.set_service_status(service, status).await;
    }
}

/// Waits for the drain to begin and brings it to its end.
pub(crate) async fn run(
    shared: &Shared,
    reporter: &HealthReporter,
    services: &[&'static str],
) -> Ended {
    let mut signal = shared.drain.subscribe();
    let began = signal.wait_for(Option::is_some).await;
    drop(began);
    let start = Instant::now();
    report(reporter, services, ServingStatus::NotServing).await;
    shared.health.advance(State::Draining);
    info!(
        calls = shared.calls.len(),
        leases = shared.receiver.leases(),
        "draining"
    );

    loop {
        let deadline = signal.borrow().unwrap_or(start);
        let now = Instant::now();
        let leases = shared.receiver.leases() > 0 && now < start + LEASE_GRACE;
        if shared.calls.len() == 0 && !leases {
            shared.receiver.end_all();
            shared.engine.drain(now.into_std());
            info!("drained");
            return Ended::Whole;
        }
        if now >= deadline {
            break;
        }
        tokio::time::sleep(POLL.min(deadline - now)).await;
    }
    let calls = shared.calls.len();
    shared.engine.drain(Instant::now().into_std());
    shared.receiver.end_all();
    // Their callers hear why.
    let _ = tokio::time::timeout(LAST_WORDS, shared.calls.ended()).await;
    warn!(calls, "gave up what still ran at the drain's deadline");
    Ended::GaveUp { calls }
}

impl Shared {
    /// Begins a drain on behalf of a caller; says how many calls run.
    pub(crate) fn begin_drain(&self, request: v1::DrainRequest) -> u32 {
        let limit = if request.deadline_ms == 0 {
            self.config.drain
        } else {
            Duration::from_millis(u64::from(request.deadline_ms))
        };
        self.drain.begin(Instant::now() + limit);
        self.calls.len() as u32
    }
}
