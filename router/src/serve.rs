//! The router as a whole, on whatever listeners, connections, clock and randomness it is given.

use std::{io, sync::Arc, time::Duration};

use futures::Stream;
use telemetry::{
    health::{Health, State},
    metrics::Metrics,
    shutdown::{Drained, Tasks},
};
use text::Text;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    admission::Admission,
    auth::Keys,
    discovery::Endpoints,
    fleet::{self, FleetConfig, Fleets},
    front::Front,
    grpc, http,
    http::HttpConfig,
    metrics::RouterMetrics,
    pipeline::{Budget, Pipeline, PipelineConfig},
    seams::{Io, Seams},
};

/// Everything that can be set.
#[derive(Clone, Debug)]
pub struct Config {
    /// What requests may ask, and how they are run.
    pub pipeline: PipelineConfig,
    /// How workers are connected.
    pub fleet: FleetConfig,
    /// The HTTP front.
    pub http: HttpConfig,
    /// Who is let in.
    pub keys: Keys,
    /// How long running requests may take to end once the router is told to stop.
    pub drain: Duration,
}

impl Config {
    /// The defaults for a model of this name.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            pipeline: PipelineConfig::new(model),
            fleet: FleetConfig::default(),
            http: HttpConfig::default(),
            keys: Keys::default(),
            drain: Duration::from_secs(30),
        }
    }
}

/// How long the errors with which requests are cut off may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Accepted connections of both fronts.
#[derive(Debug)]
pub struct Incoming<H, G> {
    /// HTTP/1.1.
    pub http: H,
    /// gRPC (HTTP/2 with prior knowledge).
    pub grpc: G,
}

/// What the lanes of a process have together: limits on requests, counts of them, what is known of workers' loads. Each
/// lane is one call of [`serve`], usually on a thread of its own.
#[derive(Clone)]
pub struct Common {
    metrics: Metrics,
    fleets: Arc<Fleets>,
    pub(crate) series: Arc<RouterMetrics>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) budget: Arc<Budget>,
}

impl Common {
    /// For lanes that are all served with this configuration.
    ///
    /// # Errors
    /// When one of the router's metrics is registered already.
    pub fn new(config: &Config, metrics: Metrics) -> Result<Self, prometheus::Error> {
        let fleets = Arc::new(Fleets::default());
        Ok(Self {
            series: Arc::new(RouterMetrics::new(
                &metrics,
                &config.pipeline.model,
                &fleets,
            )?),
            metrics,
            fleets,
            admission: Admission::new(config.pipeline.admission),
            budget: Arc::new(Budget::new()),
        })
    }
}

impl std::fmt::Debug for Common {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Common").finish_non_exhaustive()
    }
}

/// Serves as one lane until `stop`, then drains. Returns once no task is left, or the drain's deadline has passed.
///
/// # Errors
/// When the gRPC server breaks.
pub async fn serve<H: Io, G: Io>(
    config: Config,
    text: Arc<Text>,
    endpoints: Endpoints,
    incoming: Incoming<
        impl Stream<Item = io::Result<H>> + Send + 'static,
        impl Stream<Item = io::Result<G>> + Send + 'static,
    >,
    seams: Seams,
    common: Common,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (tasks, workers_stop) = (Tasks::new(), CancellationToken::new());
    let cut = CancellationToken::new();
    let fleet = common.fleets.open();
    let pipeline = Pipeline::new(
        config.pipeline,
        text,
        Arc::clone(&fleet),
        &common,
        seams.clone(),
        tasks.clone(),
        cut.clone(),
    );
    let front = Front {
        pipeline: pipeline.clone(),
        keys: config.keys,
        config: config.http,
        started: (seams.unix_time)(),
    };
    let health = Health::new();
    let links = Tasks::new();
    let follow = fleet::follow(
        Arc::clone(&fleet),
        endpoints,
        config.fleet,
        seams,
        links.clone(),
        workers_stop.clone(),
    );
    links.spawn("discovery", follow);
    let app = http::routes(front.clone()).merge(http::probes(common.metrics, pipeline));
    let front_stop = http::Stop {
        drain: stop.clone(),
        abort: CancellationToken::new(),
    };
    let abort = front_stop.abort.clone();
    let served = http::serve(incoming.http, app, config.http, tasks.clone(), front_stop);
    tasks.spawn("http", served);
    let inference = grpc::Inference::new(Arc::new(front));
    let served = grpc::serve(incoming.grpc, inference, health.clone(), stop.clone());
    let grpc = tasks.spawn("grpc", async move {
        if let Err(error) = served.await {
            error!(%error, "the gRPC front ended");
        }
    });
    health.advance(State::Ready);
    stop.cancelled().await;
    health.advance(State::Draining);
    info!("draining");
    match tasks.drain(config.drain).await {
        Drained::Whole => info!("every request ended"),
        Drained::Late { left } => {
            warn!(left, "requests are cut off at the drain's deadline");
            cut.cancel();
            tasks.drain(LAST_WORDS).await;
        }
    }
    abort.cancel();
    grpc.abort();
    workers_stop.cancel();
    links.drain(Duration::from_secs(1)).await;
    Ok(())
}
