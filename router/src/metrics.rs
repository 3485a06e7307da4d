//! What the router measures. Series of the one model it serves are looked up once, not for every token.

use std::sync::Arc;

use http::HeaderValue;
use prometheus::{
    Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    core::{Collector, Desc},
    proto::MetricFamily,
};
use proto::v1::Role;
use telemetry::{definitions as names, metrics::Metrics};
use tokio::time::Instant;
use tracing::debug;

use crate::{fleet::Fleets, pipeline::request::Origin};

/// The router's series.
#[derive(Debug)]
pub(crate) struct RouterMetrics {
    model: String,
    requests: IntCounterVec,
    answered: IntCounter,
    pub(crate) duration: Histogram,
    pub(crate) time_to_first_token: Histogram,
    pub(crate) inter_token_latency: Histogram,
    pub(crate) queue_duration: Histogram,
    pub(crate) queue_depth: IntGauge,
    pub(crate) running: IntGauge,
    pub(crate) prompt_tokens: Histogram,
    pub(crate) completion_tokens: Histogram,
    pub(crate) migrations: IntCounterVec,
    pub(crate) retries: IntCounterVec,
    pub(crate) no_pair: IntCounterVec,
    pub(crate) poisoned: IntCounter,
    pub(crate) prefix_cache_hit: Histogram,
}

impl RouterMetrics {
    /// Registers all of them.
    pub(crate) fn new(
        metrics: &Metrics,
        model: &str,
        fleets: &Arc<Fleets>,
    ) -> Result<Self, prometheus::Error> {
        let of_model = |definition| {
            metrics
                .histogram(definition)
                .map(|series| series.with_label_values(&[model]))
        };
        let gauge = |definition| {
            metrics
                .int_gauge(definition)
                .map(|series| series.with_label_values::<&str>(&[]))
        };
        let workers = prometheus::Opts::new(names::ROUTER_WORKERS.name, names::ROUTER_WORKERS.help);
        let workers = IntGaugeVec::new(workers, names::ROUTER_WORKERS.labels)?;
        let workers = Workers {
            fleets: Arc::clone(fleets),
            gauge: workers,
        };
        metrics.registry().register(Box::new(workers))?;
        let requests = metrics.counter(&names::ROUTER_REQUESTS)?;
        Ok(Self {
            answered: requests.with_label_values(&[model, "200"]),
            requests,
            model: model.into(),
            duration: of_model(&names::ROUTER_REQUEST_DURATION)?,
            time_to_first_token: of_model(&names::ROUTER_TIME_TO_FIRST_TOKEN)?,
            inter_token_latency: of_model(&names::ROUTER_INTER_TOKEN_LATENCY)?,
            queue_duration: of_model(&names::ROUTER_QUEUE_DURATION)?,
            queue_depth: gauge(&names::ROUTER_QUEUE_DEPTH)?,
            running: gauge(&names::ROUTER_RUNNING)?,
            prompt_tokens: of_model(&names::ROUTER_PROMPT_TOKENS)?,
            completion_tokens: of_model(&names::ROUTER_COMPLETION_TOKENS)?,
            migrations: metrics.counter(&names::ROUTER_MIGRATIONS)?,
            retries: metrics.counter(&names::ROUTER_RETRIES)?,
            no_pair: metrics.counter(&names::ROUTER_NO_PAIR)?,
            poisoned: metrics
                .counter(&names::ROUTER_POISONED)?
                .with_label_values::<&str>(&[]),
            prefix_cache_hit: metrics
                .histogram(&names::ROUTER_PREFIX_CACHE_HIT)?
                .with_label_values::<&str>(&[]),
        })
    }

    /// A request ended with this HTTP status (499: its client left).
    pub(crate) fn ended(&self, code: u16) {
        if code == 200 {
            return self.answered.inc();
        }
        self.requests
            .with_label_values(&[self.model.as_str(), &code.to_string()])
            .inc();
    }
}

/// Counts and times a request, whichever way it ends.
pub(crate) struct Account {
    metrics: Arc<RouterMetrics>,
    request_id: HeaderValue,
    trace_id: u128,
    arrived: Instant,
    code: u16,
}

impl Account {
    pub(crate) fn open(metrics: &Arc<RouterMetrics>, origin: &Origin) -> Self {
        // Until something else is said, the client left.
        Self {
            metrics: Arc::clone(metrics),
            request_id: origin.request_id.clone(),
            trace_id: origin.trace.trace_id,
            arrived: origin.arrived,
            code: 499,
        }
    }

    pub(crate) fn close(&mut self, code: u16) {
        self.code = code;
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let took = self.arrived.elapsed();
        self.metrics.duration.observe(took.as_secs_f64());
        debug!(
            request.id = ?self.request_id,
            trace.id = %format_args!("{:032x}", self.trace_id),
            code = self.code,
            ms = took.as_millis() as u64,
            "request ended"
        );
        self.metrics.ended(self.code);
    }
}

/// Counts the fleet when somebody reads it.
struct Workers {
    fleets: Arc<Fleets>,
    gauge: IntGaugeVec,
}

impl Collector for Workers {
    fn desc(&self) -> Vec<&Desc> {
        self.gauge.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for role in ["prefill", "decode", "combined"] {
            for state in ["ready", "draining"] {
                self.gauge.with_label_values(&[role, state]).set(0);
            }
        }
        for worker in self.fleets.workers() {
            let role = match worker.role() {
                Role::Prefill => "prefill",
                Role::Decode => "decode",
                Role::Combined | Role::Unspecified => "combined",
            };
            let state = if worker.is_draining() {
                "draining"
            } else {
                "ready"
            };
            self.gauge.with_label_values(&[role, state]).inc();
        }
        self.gauge.collect()
    }
}
