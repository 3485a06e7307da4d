//! A worker's metrics.

use std::{cell::Cell, sync::Arc, time::Duration};

use engine::{
    ExpertLoad,
    api::{Counters, Engine, Finish},
};
use parking_lot::Mutex;
use prometheus::{
    GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
};
use telemetry::{definitions as names, metrics::Metrics};
use tonic::{Code, Status};
use transfer::{
    Observer, Report,
    protocol::{Ended, Refusal},
};

/// The transport's name in labels.
const GRPC: &str = "grpc";
/// Of each layer, the load of so many experts is shown, the heaviest first.
const TOP_EXPERTS: usize = 4;

/// Everything a worker counts.
pub(crate) struct WorkerMetrics {
    cache_usage: GaugeVec,
    blocks: IntGaugeVec,
    running: IntGauge,
    waiting: IntGauge,
    prompt_tokens: IntCounterVec,
    generated_tokens: IntCounter,
    steps: IntCounter,
    preemptions: IntCounter,
    requests: IntCounterVec,
    queued: Histogram,
    prefilled: Histogram,
    transfer_duration: HistogramVec,
    transfer_bytes: IntCounterVec,
    transfer_failures: IntCounterVec,
    leases: IntGauge,
    lease_expirations: IntCounter,
    balancedness: GaugeVec,
    top_load: GaugeVec,
    rank_tokens: IntCounterVec,
    seen: Mutex<Seen>,
}

/// Counters of the engine as they were last read.
#[derive(Default)]
struct Seen {
    counters: Counters,
    experts: Vec<Vec<u64>>,
}

impl WorkerMetrics {
    pub(crate) fn new(metrics: &Metrics, engine: &dyn Engine) -> Result<Self, prometheus::Error> {
        let transport = metrics.int_gauge(&names::KV_TRANSPORT_INFO)?;
        transport.with_label_values(&[GRPC]).set(1);
        let single = |definition| {
            metrics
                .counter(definition)
                .map(|c| c.with_label_values(&[""; 0]))
        };
        let gauge = |definition| {
            metrics
                .int_gauge(definition)
                .map(|g| g.with_label_values(&[""; 0]))
        };
        let timer = |definition| {
            metrics
                .histogram(definition)
                .map(|h| h.with_label_values(&[""; 0]))
        };
        let experts = engine.experts();
        let rows = (0..experts.layers().len())
            .map(|row| experts.row(row))
            .collect();
        Ok(Self {
            cache_usage: metrics.gauge(&names::WORKER_KV_CACHE_USAGE)?,
            blocks: metrics.int_gauge(&names::WORKER_KV_BLOCKS)?,
            running: gauge(&names::WORKER_RUNNING)?,
            waiting: gauge(&names::WORKER_WAITING)?,
            prompt_tokens: metrics.counter(&names::WORKER_PROMPT_TOKENS)?,
            generated_tokens: single(&names::WORKER_GENERATED_TOKENS)?,
            steps: single(&names::WORKER_STEPS)?,
            preemptions: single(&names::WORKER_PREEMPTIONS)?,
            requests: metrics.counter(&names::WORKER_REQUESTS)?,
            queued: timer(&names::WORKER_QUEUE_DURATION)?,
            prefilled: timer(&names::WORKER_PREFILL_DURATION)?,
            transfer_duration: metrics.histogram(&names::KV_TRANSFER_DURATION)?,
            transfer_bytes: metrics.counter(&names::KV_TRANSFER_BYTES)?,
            transfer_failures: metrics.counter(&names::KV_TRANSFER_FAILURES)?,
            leases: gauge(&names::KV_LEASES)?,
            lease_expirations: single(&names::KV_LEASE_EXPIRATIONS)?,
            balancedness: metrics.gauge(&names::EXPERT_BALANCEDNESS)?,
            top_load: metrics.gauge(&names::EXPERT_TOP_LOAD)?,
            rank_tokens: metrics.counter(&names::EXPERT_RANK_TOKENS)?,
            seen: Mutex::new(Seen {
                counters: engine.counters(),
                experts: rows,
            }),
        })
    }

    /// Reads what the engine and the receiver know. Called once in a while, never per token.
    pub(crate) fn refresh(&self, engine: &dyn Engine, leases: usize) {
        let load = engine.load();
        self.running.set(load.running as i64);
        self.waiting.set(load.waiting as i64);
        self.leases.set(leases as i64);
        let usage = engine.pool().usage();
        for (state, blocks) in [
            ("free", usage.free),
            ("cached", usage.cached),
            ("used", usage.used),
            ("quarantined", usage.quarantined),
        ] {
            self.blocks.with_label_values(&[state]).set(blocks as i64);
        }
        let held = (usage.used + usage.quarantined) as f64 / usage.total.max(1) as f64;
        self.cache_usage.with_label_values(&[""; 0]).set(held);

        let now = engine.counters();
        let mut seen = self.seen.lock();
        let before = std::mem::replace(&mut seen.counters, now);
        self.steps.inc_by(now.steps - before.steps);
        self.generated_tokens
            .inc_by(now.generated_tokens - before.generated_tokens);
        self.preemptions
            .inc_by(now.preemptions - before.preemptions);
        self.experts(&engine.experts(), &mut seen.experts);
    }

    /// Load of the experts since it was last looked at. Layers that computed nothing keep their last value.
    fn experts(&self, load: &ExpertLoad, seen: &mut [Vec<u64>]) {
        let mut tokens = 0;
        for (row, before) in seen.iter_mut().enumerate() {
            let now = load.row(row);
            let mut new: Vec<u64> = now
                .iter()
                .zip(&*before)
                .map(|(now, then)| now - then)
                .collect();
            *before = now;
            let sum: u64 = new.iter().sum();
            if sum == 0 {
                continue;
            }
            tokens += sum;
            new.sort_unstable_by(|a, b| b.cmp(a));
            let layer = load.layers()[row].to_string();
            let balance = sum as f64 / new.len() as f64 / new[0] as f64;
            self.balancedness.with_label_values(&[&layer]).set(balance);
            for (place, tokens) in new.iter().take(TOP_EXPERTS).enumerate() {
                let share = *tokens as f64 / sum as f64;
                self.top_load
                    .with_label_values(&[&layer, &place.to_string()])
                    .set(share);
            }
        }
        // One rank holds all experts until there are several.
        self.rank_tokens.with_label_values(&["0"]).inc_by(tokens);
    }

    /// A sequence begins; unless it is told otherwise, it ended because its caller left.
    pub(crate) fn outcome(self: &Arc<Self>) -> Outcome {
        Outcome {
            metrics: Arc::clone(self),
            result: Cell::new("cancelled"),
        }
    }

    pub(crate) fn queued(&self, waited: Duration) {
        self.queued.observe(waited.as_secs_f64());
    }

    pub(crate) fn prefilled(&self, took: Duration) {
        self.prefilled.observe(took.as_secs_f64());
    }

    pub(crate) fn prompt_tokens(&self, computed: usize, cached: usize, transferred: usize) {
        for (source, tokens) in [
            ("computed", computed),
            ("cached", cached),
            ("transferred", transferred),
        ] {
            self.prompt_tokens
                .with_label_values(&[source])
                .inc_by(tokens as u64);
        }
    }

    /// Bytes left, also of a transfer that fails or is given up.
    pub(crate) fn sent(&self, bytes: u64) {
        self.transfer_bytes
            .with_label_values(&["sent", GRPC])
            .inc_by(bytes);
    }

    pub(crate) fn pushed(&self, report: &Report) {
        let duration = self.transfer_duration.with_label_values(&["sent", GRPC]);
        duration.observe(report.took.as_secs_f64());
    }

    pub(crate) fn push_failed(&self, reason: &str) {
        self.transfer_failures
            .with_label_values(&["sent", GRPC, reason])
            .inc();
    }

    pub(crate) fn received(&self, waited: Duration) {
        let duration = self
            .transfer_duration
            .with_label_values(&["received", GRPC]);
        duration.observe(waited.as_secs_f64());
    }

    pub(crate) fn receive_failed(&self, code: Code) {
        let reason = match code {
            Code::DeadlineExceeded => "deadline",
            Code::DataLoss => "data_loss",
            _ => "refused",
        };
        self.transfer_failures
            .with_label_values(&["received", GRPC, reason])
            .inc();
    }
}

impl Observer for WorkerMetrics {
    fn received(&self, bytes: u64) {
        self.transfer_bytes
            .with_label_values(&["received", GRPC])
            .inc_by(bytes);
    }

    fn ended(&self, why: Ended) {
        if why == Ended::Expired {
            self.lease_expirations.inc();
        }
    }

    fn refused(&self, why: Refusal) {
        self.transfer_failures
            .with_label_values(&["received", GRPC, why.as_str()])
            .inc();
    }
}

/// Counts how one sequence ended, however it does.
pub(crate) struct Outcome {
    metrics: Arc<WorkerMetrics>,
    result: Cell<&'static str>,
}

impl Outcome {
    /// It ended by itself, or goes on elsewhere.
    pub(crate) fn finished(&self, finish: Finish) {
        self.result.set(match finish {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::HandOff => "hand_off",
        });
    }

    /// It failed.
    pub(crate) fn failed(&self, status: Status) -> Status {
        self.result.set("error");
        status
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.metrics
            .requests
            .with_label_values(&[self.result.get()])
            .inc();
    }
}
