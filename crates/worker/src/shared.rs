//! What all services of a worker share.

use std::sync::Arc;

use engine::api::{Engine, Job, Running};
use kv::{BlockId, Pool, Reservation};
use telemetry::{health::Health, metrics::Metrics};
use tokio::time::Instant;
use tonic::Status;
use transfer::{Channels, Dial, Geometry, Receiver, Reserved, Settings, Sums};

use crate::{Config, drain::Signal, metrics::WorkerMetrics, rpc::Calls, status};

/// What comes from outside: the same code runs over TCP and in a simulator.
pub struct Outside {
    /// Runs the network.
    pub engine: Arc<dyn Engine>,
    /// Makes connections to other workers.
    pub dial: Dial,
    /// The process's metrics.
    pub metrics: Metrics,
    /// The process's health; `serve` moves it on.
    pub health: Health,
}

/// Blocks that wait for a transfer, and whose they are.
#[derive(Debug)]
pub(crate) struct Leased {
    /// The blocks.
    pub(crate) reservation: Reservation,
    /// The tokens that their KV is for.
    pub(crate) tokens: Vec<u32>,
    /// The tenant's salt.
    pub(crate) cache_salt: Vec<u8>,
}

impl Reserved for Leased {
    fn ids(&self) -> Vec<u32> {
        self.reservation.ids().iter().map(|id| id.0).collect()
    }
}

/// Checksums kept in the pool.
pub(crate) struct PoolSums(pub(crate) Pool);

impl Sums for PoolSums {
    fn get(&self, block: u32, layer: u32, tokens: u32) -> Option<u64> {
        self.0.sum(BlockId(block), layer as usize, tokens as usize)
    }

    fn put(&self, block: u32, layer: u32, tokens: u32, sum: u64) {
        self.0
            .set_sum(BlockId(block), layer as usize, tokens as usize, sum);
    }
}

/// What all services share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) receiver: Receiver<Leased>,
    pub(crate) channels: Channels,
    pub(crate) metrics: Arc<WorkerMetrics>,
    pub(crate) health: Health,
    /// Calls about sequences that run now.
    pub(crate) calls: Calls,
    pub(crate) drain: Signal,
}

impl Shared {
    pub(crate) fn new(config: Config, outside: Outside) -> Result<Self, prometheus::Error> {
        let Outside {
            engine,
            dial,
            metrics,
            health,
        } = outside;
        let metrics = Arc::new(WorkerMetrics::new(&metrics, &*engine)?);
        let settings = Settings::new(
            config.identity.incarnation.clone(),
            engine.format().fingerprint().to_vec(),
            geometry(&*engine),
        );
        let receiver = Receiver::new(settings, engine.memory(), Arc::clone(&metrics) as _);
        let channels = Channels::new(dial);
        let (calls, drain) = (Calls::default(), Signal::new());
        Ok(Self {
            config,
            engine,
            receiver,
            channels,
            metrics,
            health,
            calls,
            drain,
        })
    }
}

impl Shared {
    /// Queues a sequence.
    pub(crate) fn submit(&self, job: Job) -> Result<Running, Status> {
        self.engine.submit(job).map_err(|refused| {
            self.leave_if_broken();
            status::refused(&refused)
        })
    }

    /// Where the engine does not work any more, the process leaves at once: whoever started it starts another.
    pub(crate) fn leave_if_broken(&self) {
        if self.engine.broken().is_some() {
            self.drain.begin(Instant::now());
        }
    }
}

/// The shape of the engine's blocks.
pub(crate) fn geometry(engine: &dyn Engine) -> Geometry {
    let format = engine.format();
    Geometry {
        layers: format.layers as u32,
        block_tokens: kv::BLOCK_TOKENS as u32,
        token_bytes: format.row_bytes() as u32,
    }
}
