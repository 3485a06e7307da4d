//! A gRPC channel that is one connection and nothing more: when the connection ends, every call on it ends, and nothing
//! reconnects behind the caller's back to what may be another process. The calls of tonic's generated clients go straight
//! into the `h2` connection, without a queue or a task for each.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use h2::{Ping, PingPong, RecvStream, client::SendRequest};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tonic::Status;

use crate::seams::BoxIo;

/// Window of one stream: more than any answer that a worker streams.
const STREAM_WINDOW: u32 = 1 << 20;
/// Window of all streams of a connection together.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Streams of a connection that were cancelled and that the peer may still send on.
const MAX_RESET_STREAMS: usize = 4096;

/// One connection to one worker process.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    send: SendRequest<Bytes>,
}

/// What drives a connection. Runs until the connection ends and says why.
pub(crate) struct Driver {
    connection: h2::client::Connection<BoxIo, Bytes>,
    keepalive: Keepalive,
}

/// How a connection that went silent is found out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keepalive {
    /// Time between an answer and the next ping.
    pub(crate) interval: Duration,
    /// Time that an answer may take.
    pub(crate) timeout: Duration,
}

impl Channel {
    /// Shakes hands on a fresh connection. The driver must be polled from then on.
    pub(crate) async fn open(io: BoxIo, keepalive: Keepalive) -> Result<(Self, Driver), Status> {
        let handshake = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_reset_streams(MAX_RESET_STREAMS)
            .enable_push(false)
            .handshake(io);
        let (send, connection) = handshake.await.map_err(lost)?;
        Ok((
            Self { send },
            Driver {
                connection,
                keepalive,
            },
        ))
    }
}

impl Driver {
    /// Runs the connection to its end.
    pub(crate) async fn run(mut self) -> Status {
        let silence = match self.connection.ping_pong() {
            Some(pings) => find_silence(pings, self.keepalive).boxed_send(),
            None => std::future::pending().boxed_send(),
        };
        tokio::select! {
            biased;
            end = &mut self.connection => match end {
                Ok(()) => Status::unavailable("the worker closed the connection"),
                Err(error) => lost(error),
            },
            silent = silence => silent,
        }
    }
}

trait BoxedSend: Future + Send + Sized + 'static {
    fn boxed_send(self) -> BoxFuture<'static, Self::Output> {
        Box::pin(self)
    }
}

impl<F: Future + Send + 'static> BoxedSend for F {}

async fn find_silence(mut pings: PingPong, keepalive: Keepalive) -> Status {
    loop {
        tokio::time::sleep(keepalive.interval).await;
        match tokio::time::timeout(keepalive.timeout, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return lost(error),
            Err(_) => return Status::unavailable("the worker does not answer"),
        }
    }
}

/// The connection broke under a call that the worker had taken: it died, or the network did.
///
/// A worker sends an answer's headers when it takes a call, before it computes anything. A connection that breaks
/// earlier may have been dead for long, and says nothing about the call. Where the computing kills the worker before
/// its headers are on the wire, a death goes uncounted, and such a call needs one more to be found out.
#[derive(Debug, thiserror::Error)]
#[error("the connection broke while the worker ran the call")]
pub(crate) struct Died;

/// What happened to a call that the worker had taken. A stream that the peer reset or a connection that it said goodbye
/// on is no death.
fn broke(error: h2::Error) -> Status {
    let is_death = error.is_io();
    let mut status = lost(error);
    if is_death {
        status.set_source(std::sync::Arc::new(Died));
    }
    status
}

/// Whatever happened to the connection, the worker cannot be reached over it.
#[expect(clippy::needless_pass_by_value, reason = "handed to map_err")]
fn lost(error: h2::Error) -> Status {
    Status::unavailable(format!("connection to the worker: {error}"))
}

impl tower::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<ResponseBody>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.send.poll_ready(cx).map_err(lost)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let mut send = self.send.clone();
        Box::pin(async move {
            poll_fn(|cx| send.poll_ready(cx)).await.map_err(lost)?;
            let (head, mut body) = request.into_parts();
            let head = http::Request::from_parts(head, ());
            let (response, mut stream) = send.send_request(head, false).map_err(lost)?;
            // A unary body is one frame; the look ahead saves an empty one that would only end the stream.
            let mut next = next_data(&mut body).await?;
            while let Some(data) = next {
                next = next_data(&mut body).await?;
                stream.send_data(data, next.is_none()).map_err(lost)?;
            }
            let response = response.await.map_err(lost)?;
            Ok(response.map(|stream| ResponseBody {
                stream,
                is_data_over: false,
            }))
        })
    }
}

async fn next_data(body: &mut tonic::body::Body) -> Result<Option<Bytes>, Status> {
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// An answer as it comes. Dropping it resets the stream, which cancels the call at the worker.
#[derive(Debug)]
pub(crate) struct ResponseBody {
    stream: RecvStream,
    is_data_over: bool,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.is_data_over {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.stream
                        .flow_control()
                        .release_capacity(data.len())
                        .map_err(lost)?;
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(broke(error)))),
                None => self.is_data_over = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx)).map_err(broke)?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}
