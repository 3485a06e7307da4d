//! The gRPC front: `hadal.v1.Inference` over the same pipeline as HTTP, with health and reflection beside it.

mod inference;

use std::{io, time::Duration};

use futures::{Stream, StreamExt};
use proto::v1::inference_server::InferenceServer;
use telemetry::health::{Health, State};
use tokio_util::sync::CancellationToken;
use tonic::{
    server::NamedService,
    transport::{Server, server::Connected},
};

pub(crate) use inference::Inference;

use crate::seams::{Io, Kept};

/// Largest request: a prompt of a million token ids takes five.
const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Requests that one connection may have at once.
const MAX_STREAMS: u32 = 1024;

/// Serves the API on every connection of `incoming` until `stop`; then lets running requests end.
///
/// # Errors
/// When the server cannot be built or its listener breaks.
pub(crate) async fn serve<IO: Io>(
    incoming: impl Stream<Item = io::Result<IO>> + Send,
    inference: Inference,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let follow_health = async {
        let mut states = health.subscribe();
        loop {
            let is_ready = *states.borrow_and_update() == State::Ready;
            if is_ready {
                reporter.set_serving::<InferenceServer<Inference>>().await;
            } else {
                reporter
                    .set_not_serving::<InferenceServer<Inference>>()
                    .await;
            }
            if states.changed().await.is_err() {
                return;
            }
        }
    };
    // Some tools know only the older version of reflection.
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name(<InferenceServer<Inference> as NamedService>::NAME)
            .with_service_name(tonic_health::pb::health_server::SERVICE_NAME)
    };
    let server = Server::builder()
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(InferenceServer::new(inference).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(
            incoming.map(|io| io.map(|io| Kept::new(io, ()))),
            stop.cancelled_owned(),
        );
    tokio::select! {
        biased;
        served = server => Ok(served?),
        () = follow_health => Ok(()),
    }
}

impl<IO> Connected for Kept<IO, ()> {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}
