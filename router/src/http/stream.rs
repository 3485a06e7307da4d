//! A streamed answer's body. Events that are ready together leave in one piece, which is one write to the socket.

use std::{convert::Infallible, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, Stream, StreamExt, stream};
use openai::sse;
use tokio::time::timeout;
use tracing::info;

use super::answer::{Format, Manner, Totals};
use crate::{
    metrics::Account,
    pipeline::{Event, Generation},
};

/// A piece is closed once it is this large.
const MAX_PIECE_BYTES: usize = 64 << 10;

/// The events of a generation, written in an endpoint's format.
pub(super) struct EventStream<F> {
    generation: Generation,
    first: Option<Event>,
    account: Account,
    format: F,
    manner: Manner,
    interval: Duration,
    totals: Totals,
    opened: Vec<bool>,
    is_over: bool,
    buffer: BytesMut,
}

impl<F: Format> EventStream<F> {
    pub(super) fn new(
        generation: Generation,
        first: Option<Event>,
        account: Account,
        format: F,
        manner: Manner,
        interval: Duration,
    ) -> Self {
        Self {
            opened: vec![false; generation.choices as usize],
            generation,
            first,
            account,
            format,
            manner,
            interval,
            totals: Totals::default(),
            is_over: false,
            buffer: BytesMut::with_capacity(4096),
        }
    }

    pub(super) fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        stream::unfold(self, |mut events| async {
            Some((Ok(events.next().await?), events))
        })
    }

    /// Everything that is ready, as soon as something is.
    async fn next(&mut self) -> Option<Bytes> {
        if let Some(event) = self.first.take() {
            self.write(event);
        }
        while !self.is_over && self.buffer.len() < MAX_PIECE_BYTES {
            let event = if self.buffer.is_empty() {
                match timeout(self.interval, self.generation.next()).await {
                    Ok(event) => event,
                    Err(_) => return Some(Bytes::from_static(sse::COMMENT)),
                }
            } else {
                match self.generation.next().now_or_never() {
                    Some(event) => event,
                    None => break,
                }
            };
            match event {
                Some(Ok(event)) => self.write(event),
                Some(Err(error)) => {
                    info!(%error, "stream broke off");
                    self.account.close(error.status);
                    self.is_over = true;
                    // Writing into memory cannot fail.
                    let _ = sse::error(&mut (&mut self.buffer).writer(), &error);
                }
                None => {
                    self.is_over = true;
                    if self.manner.includes_usage {
                        self.format.usage(self.totals.usage(), &mut self.buffer);
                    }
                    self.buffer.put_slice(sse::DONE);
                    self.account.close(200);
                }
            }
        }
        (!self.buffer.is_empty()).then(|| self.buffer.split().freeze())
    }

    fn write(&mut self, event: Event) {
        let (Event::Delta { choice, .. } | Event::Finished { choice, .. }) = event;
        if !std::mem::replace(&mut self.opened[choice as usize], true) {
            self.format.open(choice, &mut self.buffer);
        }
        match event {
            Event::Delta { piece, .. } => self.write_piece(choice, piece),
            Event::Finished {
                piece,
                reason,
                counts,
                ..
            } => {
                self.write_piece(choice, piece);
                self.totals.add(choice, self.manner.answers, counts);
                self.format
                    .end(choice, super::answer::reason(reason), &mut self.buffer);
            }
        }
    }

    fn write_piece(&mut self, choice: u32, piece: text::Piece) {
        if !piece.text.is_empty() || !piece.entries.is_empty() {
            self.format.piece(choice, piece, &mut self.buffer);
        }
    }
}
