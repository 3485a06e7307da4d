//! A worker's life: assemble the services, serve, drain.

use std::{io, sync::Arc, time::Duration};

use futures::Stream;
use proto::v1::{
    self, decode_server::DecodeServer, prefill_server::PrefillServer, worker_server::WorkerServer,
};
use telemetry::health::State;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    transport::{Server, server::Connected},
};
use tonic_health::ServingStatus;
use tracing::info;
use transfer::{FRAME_BYTES, KvTransferServer};

use crate::{
    Config, Ended, Outside, Role,
    decode::DecodeService,
    drain,
    info::InfoService,
    prefill::PrefillService,
    shared::{Leased, Shared},
};

/// Calls at once over one connection.
const MAX_STREAMS: u32 = 1024;
/// Streams that a peer may open and reset before it is cut off.
const MAX_RESETS: usize = 64;
/// Bytes of one message: a sequence of tokens, not KV.
const MAX_MESSAGE: usize = 8 << 20;
/// Bytes of headers.
const MAX_HEADERS: u32 = 16 << 10;
/// Expired leases are looked for, and gauges read, so often.
const SWEEP: Duration = Duration::from_millis(250);
/// How long connections may take to close at the end.
const CLOSE: Duration = Duration::from_secs(2);

/// Connections as they arrive, without delay (`TCP_NODELAY`): a stream for each port.
pub struct Incoming<G, K> {
    /// For the services.
    pub grpc: G,
    /// For `KvTransfer`: bulk bytes never share a connection with tokens.
    pub kv: K,
}

/// Why a worker could not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Registering its metrics failed.
    #[error("registering metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The reflection service could not be made.
    #[error("making the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The engine does not work any more.
    #[error("the engine is broken: {0}")]
    Engine(String),
    /// A listener broke.
    #[error("serving: {0}")]
    Transport(#[from] tonic::transport::Error),
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_pending_accept_reset_streams(Some(MAX_RESETS))
        .http2_max_header_list_size(MAX_HEADERS)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
}

/// Serves until `stop` is cancelled or somebody calls `Drain`, then drains. Health turns ready when everything is
/// assembled, and not ready as the first act of a drain.
pub async fn serve<G, K, IO>(
    config: Config,
    outside: Outside,
    incoming: Incoming<G, K>,
    stop: CancellationToken,
) -> Result<Ended, Error>
where
    G: Stream<Item = io::Result<IO>> + Send,
    K: Stream<Item = io::Result<IO>> + Send,
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let role = config.identity.role;
    let shared = Arc::new(Shared::new(config, outside)?);
    let (leave, leaving) = watch::channel(());
    let closing = CancellationToken::new();

    let (reporter, health) = tonic_health::server::health_reporter();
    let info = InfoService {
        shared: Arc::clone(&shared),
        leaving,
    };
    let prefill = (role == Role::Prefill).then(|| {
        let service = PrefillServer::new(PrefillService(Arc::clone(&shared)));
        service.max_decoding_message_size(MAX_MESSAGE)
    });
    let decode = (role != Role::Prefill).then(|| {
        let service = DecodeServer::new(DecodeService(Arc::clone(&shared)));
        service.max_decoding_message_size(MAX_MESSAGE)
    });
    let reflection = |services: &[&str]| {
        let all = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        // Only what this listener serves.
        services
            .iter()
            .fold(all, |builder, &name| builder.with_service_name(name))
            .with_service_name(tonic_health::pb::health_server::SERVICE_NAME)
    };
    let mut services = vec![<WorkerServer<InfoService> as NamedService>::NAME];
    services.push(match role {
        Role::Prefill => <PrefillServer<PrefillService> as NamedService>::NAME,
        Role::Decode | Role::Combined => <DecodeServer<DecodeService> as NamedService>::NAME,
    });
    let grpc = server()
        .add_service(WorkerServer::new(info))
        .add_optional_service(prefill)
        .add_optional_service(decode)
        .add_service(health)
        .add_service(reflection(&services).build_v1()?)
        .add_service(reflection(&services).build_v1alpha()?)
        .serve_with_incoming_shutdown(incoming.grpc, closing.clone().cancelled_owned());
    if role.receives() {
        services.push(<KvTransferServer<Leased> as NamedService>::NAME);
    }
    let kv = async {
        if !role.receives() {
            closing.cancelled().await;
            return Ok(());
        }
        server()
            .max_frame_size(FRAME_BYTES)
            .add_service(KvTransferServer::new(shared.receiver.clone()))
            .serve_with_incoming_shutdown(incoming.kv, closing.clone().cancelled_owned())
            .await
    };
    let servers = async { tokio::try_join!(grpc, kv).map(drop) };
    tokio::pin!(servers);

    drain::report(&reporter, &services, ServingStatus::Serving).await;
    shared.health.advance(State::Ready);
    let identity = &shared.config.identity;
    info!(
        role = role.as_str(),
        unit = identity.unit,
        incarnation = identity.incarnation,
        "serving"
    );

    let asked = async {
        stop.cancelled().await;
        shared.begin_drain(v1::DrainRequest::default());
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        biased;
        ended = drain::run(&shared, &reporter, &services) => ended,
        result = &mut servers => {
            // The listeners ended by themselves: nobody can reach what still runs.
            result?;
            Ended::GaveUp { calls: shared.calls.len() }
        }
        () = asked => unreachable!("it never ends"),
        () = sweep(&shared) => unreachable!("it never ends"),
    };
    drop(leave);
    closing.cancel();
    shared.calls.abort();
    if let Ok(result) = tokio::time::timeout(CLOSE, servers).await {
        result?;
    }
    shared
        .engine
        .broken()
        .map_or(Ok(ended), |why| Err(Error::Engine(why)))
}

/// What has to happen once in a while.
async fn sweep(shared: &Shared) {
    loop {
        tokio::time::sleep(SWEEP).await;
        shared.receiver.sweep();
        shared
            .metrics
            .refresh(&*shared.engine, shared.receiver.leases());
        shared.leave_if_broken();
    }
}
