//! What chat and text completions have in common: running a request, measuring it, and answering it whole or as a
//! stream. How events are written is the endpoint's: a [`Format`].

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use bytes::{BufMut, BytesMut};
use futures::StreamExt;
use http::{HeaderValue, header};
use openai::{ApiError, Chunk, Usage, sse};
use proto::v1::FinishReason;
use serde::Serialize;
use telemetry::trace::REQUEST_ID;
use text::Piece;
use tokio::time::timeout;
use tracing::{Instrument, info, info_span};

use super::{ErrorResponse, stream::EventStream};
use crate::{
    front::Front,
    metrics::Account,
    pipeline::{
        Counts, Event, Generation,
        request::{Ask, Origin},
    },
};

/// How an endpoint writes its answers.
pub(super) trait Format: Send + 'static {
    /// Before the first piece of a choice.
    fn open(&mut self, choice: u32, out: &mut BytesMut);
    /// More of a choice.
    fn piece(&mut self, choice: u32, piece: Piece, out: &mut BytesMut);
    /// The end of a choice.
    fn end(&mut self, choice: u32, reason: &'static str, out: &mut BytesMut);
    /// The end of the stream, where token counts were asked for.
    fn usage(&mut self, usage: Usage, out: &mut BytesMut);
    /// A whole answer: the choices' text and log probabilities in order.
    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> String;
}

/// What all chunks of a stream, and the whole answer, say about themselves.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) includes_usage: bool,
}

impl Head {
    /// Writes a chunk as an event.
    pub(super) fn chunk<C: Serialize>(
        &self,
        object: &'static str,
        choices: &[C],
        usage: Option<Usage>,
        out: &mut BytesMut,
    ) {
        let chunk = Chunk {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            choices,
            usage: self.includes_usage.then_some(usage),
        };
        // Writing into memory cannot fail.
        let _ = sse::event(&mut out.writer(), &chunk);
    }
}

/// One choice of a whole answer.
#[derive(Debug, Default)]
pub(super) struct WholeChoice {
    pub(super) piece: Piece,
    pub(super) reason: &'static str,
}

/// How the answer is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    pub(super) is_streaming: bool,
    pub(super) includes_usage: bool,
    /// Answers to each prompt.
    pub(super) answers: u32,
}

/// Token counts of a request: prompts once, answers all.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    counts: Counts,
}

impl Totals {
    pub(super) fn add(&mut self, choice: u32, answers: u32, counts: Counts) {
        if choice.is_multiple_of(answers) {
            self.counts.prompt += counts.prompt;
            self.counts.cached += counts.cached;
        }
        self.counts.completion += counts.completion;
    }

    pub(super) fn usage(self) -> Usage {
        let Counts {
            prompt,
            cached,
            completion,
        } = self.counts;
        Usage::new(prompt, cached, completion)
    }
}

/// `finish_reason` of the API.
pub(super) fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Cancelled | FinishReason::Unspecified => "stop",
    }
}

/// Refuses a request.
pub(super) fn fail(mut account: Account, error: ApiError, request_id: HeaderValue) -> Response {
    account.close(error.status);
    if error.status >= 500 {
        info!(request.id = ?request_id, %error, "request failed");
    }
    ErrorResponse::new(error, request_id).into_response()
}

/// Runs a checked request and answers it.
pub(super) async fn respond(
    front: Arc<Front>,
    origin: Origin,
    account: Account,
    ask: Ask,
    format: impl Format,
    manner: Manner,
) -> Response {
    let request_id = origin.request_id.clone();
    let span = {
        let trace_id = format_args!("{:032x}", origin.trace.trace_id);
        info_span!("request", request.id = ?request_id, trace.id = trace_id)
    };
    let work = async {
        let generation = match front.pipeline.start(ask, &origin).await {
            Ok(generation) => generation,
            Err(error) => return fail(account, error, request_id),
        };
        let mut response = if manner.is_streaming {
            stream(&front, generation, account, format, manner, &request_id).await
        } else {
            whole(generation, account, format, manner, &request_id).await
        };
        response.headers_mut().insert(REQUEST_ID, request_id);
        response
    };
    work.instrument(span).await
}

async fn whole(
    mut generation: Generation,
    mut account: Account,
    mut format: impl Format,
    manner: Manner,
    request_id: &HeaderValue,
) -> Response {
    let mut choices: Vec<WholeChoice> = Vec::new();
    choices.resize_with(generation.choices as usize, WholeChoice::default);
    let mut totals = Totals::default();
    while let Some(event) = generation.next().await {
        match event {
            Ok(Event::Delta { choice, piece, .. }) => choices[choice as usize].add(piece),
            Ok(Event::Finished {
                choice,
                piece,
                reason,
                counts,
                ..
            }) => {
                let whole = &mut choices[choice as usize];
                whole.add(piece);
                whole.reason = self::reason(reason);
                totals.add(choice, manner.answers, counts);
            }
            Err(error) => return fail(account, error, request_id.clone()),
        }
    }
    account.close(200);
    let body = format.whole(choices, totals.usage());
    (
        [(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        )],
        body,
    )
        .into_response()
}

impl WholeChoice {
    fn add(&mut self, piece: Piece) {
        if self.piece.text.is_empty() {
            self.piece.text = piece.text;
        } else {
            self.piece.text.push_str(&piece.text);
        }
        self.piece.entries.extend(piece.entries);
    }
}

async fn stream(
    front: &Front,
    mut generation: Generation,
    account: Account,
    format: impl Format,
    manner: Manner,
    request_id: &HeaderValue,
) -> Response {
    // What goes wrong before the first token has a status of its own, unless the client has waited for so long that it
    // needs a sign of life.
    let first = match timeout(front.config.comment_interval, generation.next()).await {
        Ok(Some(Err(error))) => return fail(account, error, request_id.clone()),
        Ok(Some(Ok(event))) => Some(event),
        Ok(None) | Err(_) => None,
    };
    let interval = front.config.comment_interval;
    let events = EventStream::new(generation, first, account, format, manner, interval);
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (X_ACCEL_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, axum::body::Body::from_stream(events.into_stream())).into_response()
}

/// Tells nginx and its kin not to hold a stream back.
const X_ACCEL_BUFFERING: http::HeaderName = http::HeaderName::from_static("x-accel-buffering");
