//! How many sequences run at once, and how many may wait for that. Whoever finds the queue full is told at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use openai::ApiError;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use crate::metrics::RouterMetrics;

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct AdmissionConfig {
    /// Sequences (answers, not requests) at the workers together.
    pub max_running: u32,
    /// Requests that wait at most.
    pub max_queued: usize,
    /// How long one waits at most.
    pub queue_timeout: Duration,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            max_running: 512,
            max_queued: 1024,
            queue_timeout: Duration::from_secs(60),
        }
    }
}

/// Lets requests in.
#[derive(Debug)]
pub(crate) struct Admission {
    config: AdmissionConfig,
    slots: Arc<Semaphore>,
    queued: AtomicUsize,
}

/// A request that was let in, or waits.
#[derive(Debug)]
pub(crate) enum Ticket {
    /// It may run.
    Admitted(Permit),
    /// It waits.
    Queued(Place),
}

/// Room for a request's sequences; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    _slots: OwnedSemaphorePermit,
    running: prometheus::IntGauge,
    sequences: i64,
}

/// A place in the queue; given up when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    admission: Arc<Admission>,
    depth: prometheus::IntGauge,
    sequences: u32,
    since: Instant,
}

impl Admission {
    pub(crate) fn new(config: AdmissionConfig) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(config.max_running as usize));
        Arc::new(Self {
            config,
            slots,
            queued: AtomicUsize::new(0),
        })
    }

    /// Lets a request of `sequences` in, queues it, or refuses it.
    ///
    /// # Errors
    /// 429 when the queue is full.
    pub(crate) fn enter(
        self: &Arc<Self>,
        sequences: u32,
        metrics: &RouterMetrics,
    ) -> Result<Ticket, ApiError> {
        // More than all there is would wait for ever.
        let sequences = sequences.min(self.config.max_running);
        let queued = self.queued.load(Relaxed);
        if queued == 0
            && let Ok(slots) = Arc::clone(&self.slots).try_acquire_many_owned(sequences)
        {
            metrics.queue_duration.observe(0.0);
            return Ok(Ticket::Admitted(Permit::new(slots, sequences, metrics)));
        }
        if queued >= self.config.max_queued {
            let message =
                "The server is overloaded: too many requests are waiting. Try again soon.";
            return Err(ApiError::overloaded(message, RETRY_AFTER_S));
        }
        self.queued.fetch_add(1, Relaxed);
        metrics.queue_depth.inc();
        Ok(Ticket::Queued(Place {
            admission: Arc::clone(self),
            depth: metrics.queue_depth.clone(),
            sequences,
            since: Instant::now(),
        }))
    }
}

/// What clients are told to wait: the queue moves within seconds or not at all.
const RETRY_AFTER_S: u32 = 1;

impl Ticket {
    /// Waits until the request may run; first come, first served.
    ///
    /// # Errors
    /// 429 when that takes too long.
    pub(crate) async fn admit(self, metrics: &RouterMetrics) -> Result<Permit, ApiError> {
        let place = match self {
            Self::Admitted(permit) => return Ok(permit),
            Self::Queued(place) => place,
        };
        let slots = Arc::clone(&place.admission.slots).acquire_many_owned(place.sequences);
        let slots = timeout(place.admission.config.queue_timeout, slots).await;
        metrics
            .queue_duration
            .observe(place.since.elapsed().as_secs_f64());
        match slots {
            Ok(Ok(slots)) => Ok(Permit::new(slots, place.sequences, metrics)),
            Ok(Err(_)) => Err(ApiError::unavailable(
                "The server is shutting down.",
                RETRY_AFTER_S,
            )),
            Err(_) => {
                let message = "The server is overloaded: the request waited for too long.";
                Err(ApiError::overloaded(message, RETRY_AFTER_S))
            }
        }
    }
}

impl Permit {
    fn new(slots: OwnedSemaphorePermit, sequences: u32, metrics: &RouterMetrics) -> Self {
        metrics.running.add(i64::from(sequences));
        Self {
            _slots: slots,
            running: metrics.running.clone(),
            sequences: i64::from(sequences),
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.running.sub(self.sequences);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.admission.queued.fetch_sub(1, Relaxed);
        self.depth.dec();
    }
}
