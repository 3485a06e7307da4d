//! Command-line flags, and the router on sockets.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use clap::Parser;
use telemetry::{
    announce::Announcement,
    metrics::Metrics,
    shutdown::{Tasks, on_parent_exit, on_signals},
};
use text::Text;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    AdmissionConfig, Common, Config, FleetConfig, Keys, Mode, PipelineConfig, Timeouts,
    discovery::{self, Endpoints},
    lanes::{self, Lanes},
    policy::Policy,
    seams::Seams,
};

/// Routes requests to prefill and decode workers; speaks OpenAI HTTP and gRPC.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Checkpoint directory; its tokenizer and chat template are read
    #[arg(long, env = "HADAL_MODEL")]
    pub model: PathBuf,
    /// Name of the model in requests; the directory's name unless given
    #[arg(long, env = "HADAL_SERVED_NAME")]
    pub served_name: Option<String>,
    /// Most tokens of prompt and answer together; 0 leaves it to the workers
    #[arg(long, env = "HADAL_MAX_MODEL_LEN", default_value_t = 0)]
    pub max_model_len: u32,
    /// Address of the OpenAI HTTP API
    #[arg(long, env = "HADAL_HTTP", default_value = "127.0.0.1:8000")]
    pub http: SocketAddr,
    /// Address of the gRPC API
    #[arg(long, env = "HADAL_GRPC", default_value = "127.0.0.1:8001")]
    pub grpc: SocketAddr,
    /// Addresses of workers, host:port, separated by commas; each says its role itself
    #[arg(long, env = "HADAL_WORKERS", value_delimiter = ',')]
    pub workers: Vec<String>,
    /// Addresses of prefill workers (the same list, for readers)
    #[arg(long, env = "HADAL_PREFILL_WORKERS", value_delimiter = ',')]
    pub prefill_workers: Vec<String>,
    /// Addresses of decode workers (the same list, for readers)
    #[arg(long, env = "HADAL_DECODE_WORKERS", value_delimiter = ',')]
    pub decode_workers: Vec<String>,
    /// JSON file that lists workers and is read again when it changes, instead of the lists above
    #[arg(long, env = "HADAL_WORKERS_FILE", conflicts_with_all = ["workers", "prefill_workers", "decode_workers"])]
    pub workers_file: Option<PathBuf>,
    /// Keys that clients must send as 'Authorization: Bearer KEY', separated by commas; none lets everybody in
    #[arg(
        long,
        env = "HADAL_API_KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub api_key: Vec<String>,
    /// Whether prompts are computed by workers of their own
    #[arg(long, env = "HADAL_MODE", value_enum, default_value_t)]
    pub mode: Mode,
    /// How workers are chosen
    #[arg(long, env = "HADAL_POLICY", value_enum, default_value_t)]
    pub policy: Policy,
    /// Answers that run at the same time
    #[arg(long, env = "HADAL_MAX_RUNNING", default_value_t = AdmissionConfig::default().max_running)]
    pub max_running: u32,
    /// Requests that may wait for that
    #[arg(long, env = "HADAL_MAX_QUEUED", default_value_t = AdmissionConfig::default().max_queued)]
    pub max_queued: usize,
    /// Longest wait in the queue, in seconds
    #[arg(long, env = "HADAL_QUEUE_TIMEOUT_S", default_value_t = AdmissionConfig::default().queue_timeout.as_secs())]
    pub queue_timeout_s: u64,
    /// Longest life of a request, in seconds
    #[arg(long, env = "HADAL_REQUEST_TIMEOUT_S", default_value_t = Timeouts::default().request.as_secs())]
    pub request_timeout_s: u64,
    /// A worker that does not answer a ping for so many milliseconds is gone
    #[arg(long, env = "HADAL_WORKER_TIMEOUT_MS", default_value_t = FleetConfig::default().silence.as_millis() as u64)]
    pub worker_timeout_ms: u64,
    /// Threads that serve requests, each with a connection of its own to every worker; 0: one a core, 4 at most
    #[arg(long, env = "HADAL_ROUTER_THREADS", default_value_t = 0)]
    pub threads: usize,
    /// How long running requests may take to end after SIGTERM, in seconds
    #[arg(long, env = "HADAL_DRAIN_TIMEOUT_S", default_value_t = 30)]
    pub drain_timeout_s: u64,
    /// Stop when standard input ends: when the process that started this one does
    #[arg(long)]
    pub exit_with_parent: bool,
}

impl Args {
    fn model_name(&self) -> anyhow::Result<String> {
        if let Some(name) = &self.served_name {
            return Ok(name.clone());
        }
        let folder = self.model.canonicalize();
        let folder = folder.with_context(|| format!("--model {}", self.model.display()))?;
        let name = folder
            .file_name()
            .context("--model has no name; give --served-name")?;
        Ok(name.to_string_lossy().into_owned())
    }

    fn config(&self) -> anyhow::Result<Config> {
        anyhow::ensure!(self.max_running > 0, "--max-running must be at least 1");
        let defaults = Config::new(self.model_name()?);
        Ok(Config {
            pipeline: PipelineConfig {
                max_model_len: self.max_model_len,
                mode: self.mode,
                policy: self.policy,
                admission: AdmissionConfig {
                    max_running: self.max_running,
                    max_queued: self.max_queued,
                    queue_timeout: Duration::from_secs(self.queue_timeout_s),
                },
                timeouts: Timeouts {
                    request: Duration::from_secs(self.request_timeout_s),
                    ..Timeouts::default()
                },
                ..defaults.pipeline
            },
            fleet: FleetConfig {
                silence: Duration::from_millis(self.worker_timeout_ms),
                ..defaults.fleet
            },
            keys: Keys::new(self.api_key.clone()),
            drain: Duration::from_secs(self.drain_timeout_s),
            ..defaults
        })
    }

    async fn endpoints(&self, tasks: &Tasks) -> anyhow::Result<Endpoints> {
        if let Some(path) = &self.workers_file {
            return Ok(discovery::follow_file(path.clone(), tasks).await?);
        }
        let lists = [&self.workers, &self.prefill_workers, &self.decode_workers];
        Ok(discovery::fixed(lists.into_iter().flatten().cloned()))
    }
}

/// Runs the router until it is told to stop. Failures to start are announced on standard output as well.
///
/// # Errors
/// When it cannot start: a bad flag, no tokenizer, a port that is taken.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let result = start(args).await;
    if let Err(error) = &result {
        Announcement::Failed {
            error: format!("{error:#}"),
        }
        .emit()?;
    }
    result
}

async fn start(args: Args) -> anyhow::Result<()> {
    let config = args.config()?;
    let (tasks, stop, abort) = (
        Tasks::new(),
        CancellationToken::new(),
        CancellationToken::new(),
    );
    on_signals(&tasks, stop.clone(), abort.clone())?;
    if args.exit_with_parent {
        on_parent_exit(stop.clone());
    }
    let http = bind("--http", args.http).await?;
    let grpc = bind("--grpc", args.grpc).await?;
    let folder = args.model.clone();
    let text = tokio::task::spawn_blocking(move || Text::load(&folder)).await??;
    let endpoints = args.endpoints(&tasks).await?;
    let ready = Announcement::Ready {
        role: "router".into(),
        incarnation: format!("router-{:016x}", Seams::system().entropy.u64()),
        addresses: BTreeMap::from([
            ("http".into(), http.local_addr()?.to_string()),
            ("grpc".into(), grpc.local_addr()?.to_string()),
        ]),
        memory_bytes: 0,
    };
    let lanes = Lanes {
        count: lanes::count(args.threads),
        common: Common::new(&config, Metrics::new(&[])?)?,
        config,
        text: Arc::new(text),
        endpoints,
        seams: Seams::system,
        stop,
        // The second signal insists.
        abort,
    };
    ready.emit()?;
    lanes.serve(http, grpc, &tasks).await?;
    tasks.drain(Duration::from_secs(1)).await;
    Ok(())
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let hint = "is the port taken? Choose another, or 0 for any";
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {flag} {address}; {hint}"))
}
