//! A worker process from its settings to its end: listen, load, announce, serve, drain.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use engine::api::Engine;
use futures::{StreamExt, stream};
use telemetry::{
    announce::Announcement,
    health::{Health, State},
    http,
    metrics::Metrics,
    shutdown::{self, Tasks},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;
use tracing::{info, warn};

use crate::{
    Config, Ended, Identity, Incoming, Outside,
    cli::Settings,
    load::{self, Loaded},
    serve,
};

/// How long the process's own tasks may take to end.
const LAST: Duration = Duration::from_secs(1);

/// Runs until it is told to stop.
pub(crate) async fn run(settings: Settings) -> anyhow::Result<()> {
    let tasks = Tasks::new();
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    shutdown::on_signals(&tasks, stop.clone(), abort.clone()).context("watching for signals")?;
    if settings.exit_with_parent {
        shutdown::on_parent_exit(stop.clone());
    }
    // Before the weights are read: a port that is taken is said at once.
    let listeners = Listeners::bind(&settings).await?;
    let (addresses, kv_address) = listeners.addresses(&settings)?;
    let Listeners {
        metrics: metrics_listener,
        grpc,
        kv,
    } = listeners;

    let health = Health::new();
    let role = settings.role.as_str();
    let metrics = Metrics::new(&[
        ("deployment", &settings.deployment),
        ("pool", role),
        ("unit", &settings.unit),
    ])?;
    let (served, shown) = (metrics.clone(), health.clone());
    let end = tasks.closing().clone();
    tasks.spawn("metrics", async move {
        if let Err(error) = http::serve(metrics_listener, served, shown, end).await {
            warn!(%error, "the metrics server ended");
        }
    });

    let Loaded {
        engine,
        revision,
        precision,
        memory_bytes,
    } = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        loaded = load::load(settings.clone()) => loaded?,
    };
    let identity = Identity {
        deployment: settings.deployment,
        role: settings.role,
        unit: settings.unit,
        rank: settings.rank,
        incarnation: incarnation(settings.incarnation.as_deref()),
        revision,
    };
    let ready = Announcement::Ready {
        role: role.to_owned(),
        incarnation: identity.incarnation.clone(),
        addresses,
        memory_bytes,
    };
    tasks.spawn(
        "announce",
        announce(health.clone(), ready, Arc::clone(&engine)),
    );
    let config = Config {
        identity,
        model: settings.served_name,
        precision,
        kv_address,
        drain: settings.drain,
    };
    let outside = Outside {
        engine,
        dial: transfer::tcp(),
        metrics,
        health,
    };
    let nodelay = |listener| TcpIncoming::from(listener).with_nodelay(Some(true));
    let incoming = Incoming {
        grpc: nodelay(grpc),
        kv: match kv {
            Some(kv) => nodelay(kv).left_stream(),
            None => stream::pending().right_stream(),
        },
    };
    let ended = tokio::select! {
        biased;
        // Asked twice: somebody is in a hurry.
        () = abort.cancelled() => bail!("stopped at once, with work unfinished"),
        ended = serve(config, outside, incoming, stop) => ended?,
    };
    match ended {
        Ended::Whole => info!("everything that ran was finished"),
        Ended::GaveUp { calls } => warn!(calls, "left with work unfinished"),
    }
    tasks.drain(LAST).await;
    Ok(())
}

struct Listeners {
    metrics: TcpListener,
    grpc: TcpListener,
    kv: Option<TcpListener>,
}

impl Listeners {
    async fn bind(settings: &Settings) -> anyhow::Result<Self> {
        Ok(Self {
            metrics: bind("--metrics-listen", settings.metrics_listen).await?,
            grpc: bind("--listen", settings.listen).await?,
            kv: match settings.kv_listen {
                Some(address) => Some(bind("--kv-listen", address).await?),
                None => None,
            },
        })
    }

    /// Where each listens, by name, and where peers reach the KV plane.
    fn addresses(&self, settings: &Settings) -> anyhow::Result<(BTreeMap<String, String>, String)> {
        let mut addresses = BTreeMap::new();
        let named = [
            ("metrics", Some(&self.metrics)),
            ("grpc", Some(&self.grpc)),
            ("kv", self.kv.as_ref()),
        ];
        for (name, listener) in named {
            if let Some(listener) = listener {
                addresses.insert(name.to_owned(), listener.local_addr()?.to_string());
            }
        }
        let bound = addresses.get("kv").cloned();
        let kv_address = settings.kv_advertise.clone().or(bound).unwrap_or_default();
        Ok((addresses, kv_address))
    }
}

async fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("{flag} {address}: cannot listen there (port 0 takes any that is free)")
    })
}

/// Differs for every life of a process, also of one that keeps its name over restarts.
fn incarnation(given: Option<&str>) -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let start = since.as_millis();
    match given {
        Some(uid) => format!("{uid}-{start:x}"),
        None => format!("{:016x}-{start:x}", rand::random::<u64>()),
    }
}

/// Tells the parent when the worker takes work, and when it leaves.
async fn announce(health: Health, ready: Announcement, engine: Arc<dyn Engine>) {
    let mut states = health.subscribe();
    let announce = |announcement: Announcement| {
        if let Err(error) = announcement.emit() {
            warn!(%error, "nobody reads the standard output");
        }
    };
    if states
        .wait_for(|state| *state >= State::Ready)
        .await
        .is_ok()
    {
        announce(ready);
    }
    if states
        .wait_for(|state| *state == State::Draining)
        .await
        .is_ok()
    {
        let load = engine.load();
        announce(Announcement::Draining {
            running: (load.running + load.waiting) as u64,
        });
    }
}
