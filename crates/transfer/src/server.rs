//! `KvTransfer.Push` at the receiver, as a tower service beside tonic's own: it reads the request's body frame by frame
//! and places each at once, instead of collecting whole messages first.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt, Stream, future::BoxFuture, stream};
use http_body_util::BodyExt;
use proto::v1::PushResponse;
use tonic::{
    Status,
    body::Body,
    codec::{Codec, EncodeBody, SingleMessageCompressionOverride},
    server::NamedService,
};
use tonic_prost::ProstCodec;

use crate::{
    identity::Identity,
    receive::{Error, Receiver, Reserved, Session},
    wire::{self, Event, Reader},
};

/// The path of `Push`.
pub(crate) const PATH: &str = "/hadal.v1.KvTransfer/Push";
/// DATA frames of at most so many bytes are asked for. HTTP/2's default of 16 KiB halves the rate; a MiB and more
/// leaves the processor's cache (docs/benchmarks/transfer.md).
pub const FRAME_BYTES: u32 = 256 * 1024;
/// An acknowledgement at least every so many bytes, so that a sender sees that its bytes arrive.
const ACK_BYTES: u64 = 8 << 20;

/// The service. Register it with `Server::add_service` on a server of its own with
/// `max_frame_size(FRAME_BYTES)` and without delay (`TCP_NODELAY`) on accepted sockets.
pub struct KvTransferServer<B>(Receiver<B>);

impl<B: Reserved> KvTransferServer<B> {
    /// Serves `receiver`.
    pub fn new(receiver: Receiver<B>) -> Self {
        Self(receiver)
    }
}

impl<B> Clone for KvTransferServer<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B> NamedService for KvTransferServer<B> {
    const NAME: &'static str = "hadal.v1.KvTransfer";
}

impl<B: Reserved> tower::Service<http::Request<Body>> for KvTransferServer<B> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let session = self.0.session();
        async move {
            if request.uri().path() != PATH {
                let unknown = Status::unimplemented("no such method of hadal.v1.KvTransfer");
                return Ok(unknown.into_http());
            }
            let encoder = ProstCodec::<PushResponse, ()>::default().encoder();
            let none = SingleMessageCompressionOverride::default();
            let answers = answers(session, request.into_body());
            let body = EncodeBody::new_server(encoder, answers, None, none, None);
            let mut response = http::Response::new(Body::new(body));
            response.headers_mut().insert(
                http::header::CONTENT_TYPE,
                tonic::metadata::GRPC_CONTENT_TYPE,
            );
            Ok(response)
        }
        .boxed()
    }
}

struct Push<B: Reserved> {
    session: Session<B>,
    body: Body,
    reader: Reader,
    pieces: u32,
    bytes: u64,
    acknowledged: u64,
}

/// Reads the stream as its answers are asked for. Dropping it ends the session.
fn answers<B: Reserved>(
    session: Session<B>,
    body: Body,
) -> impl Stream<Item = Result<PushResponse, Status>> + Send {
    let reader = Reader::new(session.settings().max_piece_bytes);
    let push = Push {
        session,
        body,
        reader,
        pieces: 0,
        bytes: 0,
        acknowledged: 0,
    };
    stream::unfold(Some(push), |push| async move {
        let mut push = push?;
        match push.answer().await {
            Ok(Some(answer)) => Some((Ok(answer), Some(push))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    })
}

impl<B: Reserved> Push<B> {
    /// Reads on until there is something to answer; `None` at the end of the stream.
    async fn answer(&mut self) -> Result<Option<PushResponse>, Status> {
        loop {
            while let Some(event) = self.reader.read().map_err(status_of_wire)? {
                if let Some(answer) = self.on(event).await? {
                    return Ok(Some(answer));
                }
            }
            let Some(data) = self.frame().await? else {
                self.reader.finish().map_err(status_of_wire)?;
                return Ok(None);
            };
            self.reader.feed(data);
        }
    }

    /// The next DATA frame.
    async fn frame(&mut self) -> Result<Option<Bytes>, Status> {
        let stopped = self.session.stopped();
        let idle = self.session.settings().idle;
        tokio::select! {
            biased;
            frame = self.body.frame() => match frame {
                None => Ok(None),
                // Trailers of a request mean nothing in gRPC.
                Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
                Some(Err(status)) => Err(status),
            },
            () = stopped.cancelled() => {
                Err(Status::aborted("the lease ended, or a newer stream carries this transfer"))
            }
            () = tokio::time::sleep(idle) => {
                // Not the transfer's end: the sender may open another when it has something to say.
                Err(Status::unavailable("the stream said nothing for too long"))
            }
        }
    }

    async fn on(&mut self, event: Event) -> Result<Option<PushResponse>, Status> {
        let session = &mut self.session;
        let refused = |session: &Session<B>, error: Error| {
            if let Error::Refused(refusal) = error {
                session.refused(refusal);
            }
            Status::from(error)
        };
        match event {
            Event::Open(open) => {
                let identity = Identity::from_open(open, &session.settings().geometry)
                    .ok_or_else(|| Status::invalid_argument("the opening contradicts itself"))?;
                let have = session
                    .open(&identity)
                    .await
                    .map_err(|e| refused(session, e.into()))?;
                Ok(Some(PushResponse {
                    have,
                    ..self.progress(false)
                }))
            }
            Event::Piece(piece, checksum, bytes) => {
                session
                    .piece(piece, checksum, bytes)
                    .map_err(|e| refused(session, e.into()))?;
                Ok(None)
            }
            Event::Bytes(data, last) => {
                let placed = session
                    .bytes(&data, last)
                    .map_err(|e| refused(session, e))?;
                let Some(bytes) = placed else { return Ok(None) };
                self.pieces += 1;
                self.bytes += bytes;
                if self.bytes - self.acknowledged < ACK_BYTES {
                    return Ok(None);
                }
                self.acknowledged = self.bytes;
                Ok(Some(self.progress(false)))
            }
            Event::Seal(seal) => {
                session
                    .seal(seal.checksum)
                    .map_err(|e| refused(session, e.into()))?;
                Ok(Some(self.progress(true)))
            }
        }
    }

    fn progress(&self, sealed: bool) -> PushResponse {
        PushResponse {
            pieces: self.pieces,
            bytes: self.bytes,
            have: Vec::new(),
            sealed,
        }
    }
}

fn status_of_wire(error: wire::Error) -> Status {
    Status::invalid_argument(error.to_string())
}
