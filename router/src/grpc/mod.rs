//! The gRPC front: `hadal.v1.Inference` over the same pipeline as HTTP, with health and reflection beside it.

mod inference;

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt};
use proto::v1::inference_server::InferenceServer;
use telemetry::health::{Health, State};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Server, server::Connected};

pub(crate) use inference::Inference;

use crate::seams::Io;

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
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let server = Server::builder()
        .max_concurrent_streams(Some(MAX_STREAMS))
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .add_service(health_service)
        .add_service(reflection)
        .add_service(InferenceServer::new(inference).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(incoming.map(|io| io.map(Accepted)), stop.cancelled_owned());
    tokio::select! {
        biased;
        served = server => Ok(served?),
        () = follow_health => Ok(()),
    }
}

/// A connection about which tonic knows nothing more.
struct Accepted<IO>(IO);

impl<IO> Connected for Accepted<IO> {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl<IO: AsyncRead + Unpin> AsyncRead for Accepted<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Accepted<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}
