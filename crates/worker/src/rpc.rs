//! What every call has: who asks, until when, and a stream of answers whose end frees everything.

use std::{future::Future, pin::Pin, time::Duration};

use futures::{Stream, StreamExt, future, stream};
use proto::v1;
use telemetry::trace::{REQUEST_ID, TraceContext};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status, metadata::MetadataMap};
use tracing::{Instrument, Span, debug};
use transfer::Key;

/// No call lives longer.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How much later than the engine a call itself gives up, so that the engine's own words are heard.
const GRACE: Duration = Duration::from_secs(1);
/// Answers that wait for a slow reader.
const ANSWERS: usize = 32;

/// Who asks, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// One attempt at one request.
    pub(crate) key: Key,
    /// When it has to be over.
    pub(crate) deadline: Instant,
    /// What follows the request on to other processes.
    pub(crate) headers: http::HeaderMap,
}

impl Context {
    /// Reads it from a call about a sequence.
    pub(crate) fn new(
        key: Option<&v1::RequestKey>,
        deadline_ms: u32,
        metadata: &MetadataMap,
    ) -> Result<Self, Status> {
        let key = key
            .filter(|key| !key.request_id.is_empty())
            .ok_or_else(|| Status::invalid_argument("the call names no request"))?;
        if key.request_id.len() > 256 {
            return Err(Status::invalid_argument("the request's name is too long"));
        }
        if deadline_ms == 0 {
            return Err(Status::invalid_argument("deadline_ms is not set"));
        }
        let life = Duration::from_millis(u64::from(deadline_ms)).min(MAX_LIFE);
        let key = Key {
            request: key.request_id.clone(),
            attempt: key.attempt,
        };
        Ok(Self {
            deadline: Instant::now() + life,
            headers: headers(&key, metadata),
            key,
        })
    }

    /// The time that is left, as it goes on.
    pub(crate) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The trace it belongs to, for the span of its work.
    pub(crate) fn trace_id(&self) -> String {
        TraceContext::extract(&self.headers)
            .map_or_else(String::new, |trace| format!("{:032x}", trace.trace_id))
    }
}

/// The request's id and its place in a trace, one span further down.
fn headers(key: &Key, metadata: &MetadataMap) -> http::HeaderMap {
    let given: &http::HeaderMap = metadata.as_ref();
    let mut headers = http::HeaderMap::new();
    if let Some(id) = given.get(REQUEST_ID) {
        headers.insert(REQUEST_ID, id.clone());
    }
    if let Some(trace) = TraceContext::extract(given) {
        // The span's id comes from what it is about: no randomness, and another for each attempt.
        let name = format!("{:x}/{}/{}", trace.span_id, key.request, key.attempt);
        trace
            .child(transfer::checksum::layer(name.as_bytes()))
            .inject(&mut headers);
    }
    headers
}

/// Calls about sequences that run now: counted, so that a drain can wait for them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls {
    tasks: TaskTracker,
    abort: CancellationToken,
}

impl Calls {
    /// How many run.
    pub(crate) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Waits until none runs.
    pub(crate) async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Ends all of them.
    pub(crate) fn abort(&self) {
        self.abort.cancel();
    }
}

/// A stream of answers.
pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs `work` as a task that answers over the stream returned. The task ends when the work does, when its deadline
/// passes, or when the stream is dropped, and with it all that the work holds. An error is always the last answer.
pub(crate) fn answers<T, F>(
    calls: &Calls,
    span: Span,
    deadline: Instant,
    work: impl FnOnce(mpsc::Sender<Result<T, Status>>) -> F,
) -> Answers<T>
where
    T: Send + 'static,
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (answers, receiver) = mpsc::channel(ANSWERS);
    // Beside the channel, which may be full when the reader is slow.
    let (last, end) = oneshot::channel();
    let dropped = CancellationToken::new();
    let guard = dropped.clone().drop_guard();
    let work = work(answers);
    let abort = calls.abort.clone();
    let task = async move {
        let start = Instant::now();
        let late = Status::deadline_exceeded("the deadline passed");
        let result = tokio::select! {
            biased;
            () = dropped.cancelled() => Err(Status::cancelled("the caller left")),
            () = abort.cancelled() => Err(Status::unavailable("the worker is leaving")),
            result = tokio::time::timeout_at(deadline + GRACE, work) => result.unwrap_or(Err(late)),
        };
        let code = result.as_ref().map_or_else(Status::code, |()| Code::Ok);
        debug!(?code, took = ?start.elapsed(), "call ended");
        if let Err(status) = result {
            // Nobody listens where the stream was dropped.
            let _ = last.send(status);
        }
    };
    calls.tasks.spawn(task.instrument(span));
    let end = async move {
        // Dropped with the stream.
        let _guard = guard;
        end.await
    };
    let end = stream::once(end).filter_map(|status| future::ready(status.ok().map(Err)));
    Box::pin(ReceiverStream::new(receiver).chain(end))
}

/// Hands an answer to the stream.
pub(crate) async fn answer<T>(
    answers: &mpsc::Sender<Result<T, Status>>,
    answer: T,
) -> Result<(), Status> {
    let sent = answers.send(Ok(answer)).await;
    sent.map_err(|_| Status::cancelled("the caller left"))
}
