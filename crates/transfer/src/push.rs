//! `KvTransfer.Push` at the sender: [`Sending`] over a gRPC stream whose payloads are views of the cache.

use std::{any::Any, convert::Infallible, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::StreamBody;
use kernels::{BlockMemory, backend::HostView};
use proto::v1::{PushRequest, PushResponse, TransferSeal, push_request::Message};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    body::Body,
    codec::Codec,
    transport::{Channel, Uri},
};
use tonic_prost::ProstCodec;
use tower::Service;
use tracing::debug;

use crate::{
    checksum,
    geometry::Piece,
    identity::Identity,
    protocol::{Next, Retry, Sending, Watermarks},
    server, wire,
};

/// Checksums of the cache's contents, kept beside the blocks: whoever fills or sends a layer of a block computes it once.
pub trait Sums: Send + Sync + 'static {
    /// [`checksum::layer`] of the first `tokens` tokens of `layer` of `block`, if it is known.
    fn get(&self, block: u32, layer: u32, tokens: u32) -> Option<u64>;
    /// Remembers it for as long as the contents stay.
    fn put(&self, block: u32, layer: u32, tokens: u32, sum: u64);
}

/// Where the bytes come from.
#[derive(Clone)]
pub struct Source {
    /// The cache.
    pub memory: Arc<dyn BlockMemory>,
    /// What is known of its contents.
    pub sums: Arc<dyn Sums>,
    /// Ids of the sequence's blocks in it, from its start.
    pub ids: Vec<u32>,
    /// Keeps the blocks alive while bytes of them are on their way.
    pub owner: Arc<dyn Any + Send + Sync>,
}

/// One transfer to make.
pub struct Transfer {
    /// The receiver, for messages.
    pub address: String,
    /// Who it is between and what it carries.
    pub identity: Identity,
    /// Where the bytes come from.
    pub source: Source,
    /// What of it is in the cache already; it has to reach the end before its sender is dropped.
    pub filled: watch::Receiver<Watermarks>,
    /// Sent along with every stream: whatever follows the request from process to process.
    pub headers: HeaderMap,
    /// When to give up.
    pub deadline: Instant,
    /// Called with the payload bytes of every piece that leaves, whatever becomes of the transfer.
    pub sent: Arc<dyn Fn(u64) + Send + Sync>,
}

/// How a transfer went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Payload bytes that left (those sent twice count twice).
    pub bytes: u64,
    /// Streams it took.
    pub streams: u32,
    /// From the first stream to the seal's acknowledgement.
    pub took: Duration,
}

/// Why a transfer failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The receiver does not want it, or the network did not let it through in several tries.
    #[error("pushing to {address}: {status}")]
    Peer {
        /// The receiver.
        address: String,
        /// The last thing it, or the transport, said.
        status: Status,
    },
    /// The deadline passed.
    #[error("pushing to {address}: the deadline passed")]
    Deadline {
        /// The receiver.
        address: String,
    },
    /// The sequence ended before all of it was filled.
    #[error("the sequence ended before its cache was filled")]
    Cancelled,
    /// The cache did not give the bytes.
    #[error("reading the cache: {0}")]
    Memory(#[from] kernels::Error),
}

impl Error {
    /// Short name for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Peer { status, .. } => match status.code() {
                Code::DataLoss => "data_loss",
                Code::Unavailable | Code::Unknown | Code::Internal => "unavailable",
                _ => "refused",
            },
            Self::Deadline { .. } => "deadline",
            Self::Cancelled => "cancelled",
            Self::Memory(_) => "memory",
        }
    }
}

/// Bytes of one piece that a sender aims at.
pub const PIECE_BYTES: usize = 512 * 1024;
/// Frames on their way to the connection: enough to keep it busy, few enough to stay in the processor's cache.
const FRAMES: usize = 8;
/// A receiver that says nothing for so long, while something is on its way, is given up.
const STALL: Duration = Duration::from_secs(10);

/// Pushes a sequence's blocks as its layers fill, over as many streams as it takes, until the receiver acknowledges the
/// seal.
pub async fn push(channel: Channel, transfer: Transfer) -> Result<Report, Error> {
    let deadline = transfer.deadline;
    let late = Error::Deadline {
        address: transfer.address.clone(),
    };
    let sending = Sending::new(transfer.identity.plan, transfer.identity.seed());
    let report = Report::default();
    let mut push = Push {
        channel,
        transfer,
        sending,
        report,
        sealed: false,
    };
    tokio::time::timeout_at(deadline, push.run())
        .await
        .map_err(|_| late)?
}

struct Push {
    channel: Channel,
    transfer: Transfer,
    sending: Sending,
    report: Report,
    /// A seal left on some stream: a lease that was used meanwhile was complete.
    sealed: bool,
}

/// Bytes of the cache on their way; the blocks are not reused before they have left.
struct Lent {
    view: HostView,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        (*self.view).as_ref()
    }
}

/// How one stream ended.
enum Broken {
    Status(Status),
    Error(Error),
}

impl From<Status> for Broken {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl Push {
    async fn run(&mut self) -> Result<Report, Error> {
        let start = Instant::now();
        loop {
            self.report.streams += 1;
            let status = match self.stream().await {
                Ok(()) => break,
                Err(Broken::Error(error)) => return Err(error),
                Err(Broken::Status(status)) => status,
            };
            if status.code() == Code::AlreadyExists && self.sealed {
                // The acknowledgement was lost, the lease was used.
                break;
            }
            let pause = if may_pass(&status) {
                self.sending.broken()
            } else {
                Retry::GiveUp
            };
            let Retry::After(pause) = pause else {
                return Err(Error::Peer {
                    address: self.transfer.address.clone(),
                    status,
                });
            };
            debug!(%status, ?pause, address = self.transfer.address, "kv stream broke, resuming");
            tokio::time::sleep(pause).await;
        }
        self.report.took = start.elapsed();
        Ok(self.report)
    }

    /// One stream, until the seal is acknowledged.
    async fn stream(&mut self) -> Result<(), Broken> {
        let (frames, body) = mpsc::channel::<Result<Frame<Bytes>, Infallible>>(FRAMES);
        let open = PushRequest {
            message: Some(Message::Open(self.transfer.identity.to_open())),
        };
        let first = frames.try_send(Ok(Frame::data(wire::frame(&open))));
        first.map_err(|_| Status::internal("the stream closed before it began"))?;
        let mut answers = call(&mut self.channel, &self.transfer.headers, body).await?;

        let opened = answer(&mut answers).await?;
        if !self.sending.opened(&opened.have) {
            return Err(Status::data_loss("the receiver claims to have what was not sent").into());
        }
        let mut waiting_since = Instant::now();
        loop {
            let next = {
                let filled = self.transfer.filled.borrow_and_update();
                self.sending.next(&filled, PIECE_BYTES)
            };
            tokio::select! {
                biased;
                acknowledged = answers.next() => match acknowledged {
                    Some(Ok(PushResponse { sealed: true, .. })) => return Ok(()),
                    Some(Ok(_)) => waiting_since = Instant::now(),
                    Some(Err(status)) => return Err(status.into()),
                    None => return Err(Status::unavailable("the stream ended early").into()),
                },
                permits = frames.reserve_many(2), if next != Next::Wait => {
                    let Ok(mut permits) = permits else {
                        // The connection is gone; why, the answers say.
                        return Err(reason(&mut answers).await.into());
                    };
                    waiting_since = Instant::now();
                    let mut send = |bytes: Bytes| {
                        permits.next().expect("two were reserved").send(Ok(Frame::data(bytes)));
                    };
                    match next {
                        Next::Piece(piece) => {
                            let (head, payload) = self.piece(&piece)?;
                            send(head);
                            send(payload);
                        }
                        Next::Seal(checksum) => {
                            let pieces = self.transfer.identity.plan.parts() as u32;
                            let seal = Message::Seal(TransferSeal { checksum, pieces });
                            send(wire::frame(&PushRequest { message: Some(seal) }));
                            self.sending.sealing();
                            self.sealed = true;
                        }
                        Next::Wait => {}
                    }
                }
                changed = self.transfer.filled.changed(), if next == Next::Wait && !self.sending.is_sealing() => {
                    changed.map_err(|_| Error::Cancelled)?;
                }
                () = tokio::time::sleep_until(waiting_since + STALL),
                    if next != Next::Wait || self.sending.is_sealing() =>
                {
                    return Err(Status::unavailable("the receiver does not answer").into());
                }
            }
        }
    }

    /// Header and payload of a piece.
    fn piece(&mut self, piece: &Piece) -> Result<(Bytes, Bytes), Error> {
        let geometry = &self.transfer.identity.plan.geometry;
        let id = self.transfer.source.ids[piece.block as usize];
        let block = id as usize;
        let range = piece.range(geometry);
        let memory = &self.transfer.source.memory;
        let payload = if let Some(view) = Arc::clone(memory).view(block, range.clone()) {
            Bytes::from_owner(Lent {
                view,
                _owner: Arc::clone(&self.transfer.source.owner),
            })
        } else {
            // The cache is not in host memory.
            let mut copy = BytesMut::with_capacity(range.len());
            memory.read(block, range, &mut |bytes| copy.extend_from_slice(bytes))?;
            copy.freeze()
        };
        let layers = payload
            .chunks(piece.layer_bytes(geometry))
            .zip(piece.layer_range());
        let sums: Vec<u64> = layers
            .map(|(bytes, layer)| {
                let known = &self.transfer.source.sums;
                known.get(id, layer, piece.tokens).unwrap_or_else(|| {
                    let sum = checksum::layer(bytes);
                    known.put(id, layer, piece.tokens, sum);
                    sum
                })
            })
            .collect();
        let checksum = self.sending.sent(piece, &sums);
        self.report.bytes += payload.len() as u64;
        (self.transfer.sent)(payload.len() as u64);
        Ok((wire::piece_head(piece, checksum, payload.len()), payload))
    }
}

/// Whether another stream may do better.
fn may_pass(status: &Status) -> bool {
    matches!(
        status.code(),
        // Transport errors arrive as `Unknown`, `Internal` or `Cancelled`; `DataLoss` is a piece that changed on its way.
        Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DataLoss
    )
}

type Answers = Streaming<PushResponse>;

/// Starts the stream. The request's body is handed to HTTP/2 as it is: no codec, no copy.
async fn call(
    channel: &mut Channel,
    headers: &HeaderMap,
    frames: mpsc::Receiver<Result<Frame<Bytes>, Infallible>>,
) -> Result<Answers, Status> {
    let mut request = http::Request::builder()
        .method(http::Method::POST)
        .version(http::Version::HTTP_2)
        .uri(Uri::from_static(server::PATH))
        .header(
            http::header::CONTENT_TYPE,
            tonic::metadata::GRPC_CONTENT_TYPE,
        )
        .header(http::header::TE, "trailers")
        .body(Body::new(StreamBody::new(ReceiverStream::new(frames))))
        .expect("all parts are constants");
    request.headers_mut().extend(headers.clone());
    let unavailable = |error: tonic::transport::Error| Status::from_error(Box::new(error));
    futures::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .map_err(unavailable)?;
    let response = tokio::time::timeout(STALL, channel.call(request))
        .await
        .map_err(|_| Status::unavailable("the receiver does not answer"))?
        .map_err(unavailable)?;
    let code = response.status();
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(status);
    }
    let decoder = ProstCodec::<(), PushResponse>::default().decoder();
    Ok(Streaming::new_response(
        decoder,
        response.into_body(),
        code,
        None,
        None,
    ))
}

async fn answer(answers: &mut Answers) -> Result<PushResponse, Status> {
    let answer = tokio::time::timeout(STALL, answers.message()).await;
    answer
        .map_err(|_| Status::unavailable("the receiver does not answer"))??
        .ok_or_else(|| Status::unavailable("the stream ended early"))
}

/// Why a stream ended, once its request body is closed.
async fn reason(answers: &mut Answers) -> Status {
    let read = async {
        loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::unavailable("the stream ended early"),
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(STALL, read)
        .await
        .unwrap_or_else(|_| Status::unavailable("the connection broke"))
}
