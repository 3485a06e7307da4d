//! One answer: a sequence's tokens as text, until its end or a stop string.

use std::sync::Arc;

use openai::ApiError;
use proto::v1::{FinishReason, Token};
use text::{Answer, Entry, Found, Piece};
use tokio::time::Instant;

use super::{
    Event, Shared,
    sequence::{Sequence, Step},
};

/// An answer on its way.
pub(crate) struct Choice {
    shared: Arc<Shared>,
    index: u32,
    sequence: Sequence,
    answer: Answer,
    stop_ids: Vec<u32>,
    arrived: Instant,
    last_token: Option<Instant>,
    is_over: bool,
}

impl Choice {
    pub(crate) fn new(
        shared: Arc<Shared>,
        index: u32,
        sequence: Sequence,
        stops: Vec<String>,
        stop_ids: Vec<u32>,
        arrived: Instant,
    ) -> Self {
        let answer = Answer::new(stops);
        Self {
            shared,
            index,
            sequence,
            answer,
            stop_ids,
            arrived,
            last_token: None,
            is_over: false,
        }
    }

    /// The next event; `None` after the last one or an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Event, ApiError>> {
        if self.is_over {
            return None;
        }
        match self.sequence.next().await {
            Ok(Step::Token(token)) => Some(Ok(self.on_token(token))),
            Ok(Step::Finished(reason)) => {
                let mut piece = Piece::default();
                let found = self.answer.finish(&mut piece);
                let reason = if found == Found::Stop {
                    FinishReason::Stop
                } else {
                    reason
                };
                Some(Ok(self.finish(piece, None, reason)))
            }
            Err(error) => {
                self.is_over = true;
                Some(Err(error))
            }
        }
    }

    fn on_token(&mut self, token: Token) -> Event {
        self.measure();
        let mut piece = Piece::default();
        // The token that ends an answer is no part of its text.
        if self.stop_ids.contains(&token.token) {
            return Event::Delta {
                choice: self.index,
                piece,
                token,
            };
        }
        let entry = token.logprob.map(|logprob| Entry {
            token: token.token,
            logprob,
            top: token
                .top_logprobs
                .iter()
                .map(|top| (top.token, top.logprob))
                .collect(),
        });
        let tokenizer = self.shared.text.tokenizer();
        match self.answer.push(tokenizer, token.token, entry, &mut piece) {
            Found::Nothing => Event::Delta {
                choice: self.index,
                piece,
                token,
            },
            Found::Stop => self.finish(piece, Some(token), FinishReason::Stop),
        }
    }

    fn finish(&mut self, piece: Piece, token: Option<Token>, reason: FinishReason) -> Event {
        self.is_over = true;
        let completion = self.sequence.produced();
        self.shared
            .metrics
            .completion_tokens
            .observe(f64::from(completion));
        Event::Finished {
            choice: self.index,
            piece,
            token,
            reason,
            counts: Counts {
                prompt: self.sequence.prompt_tokens(),
                cached: self.sequence.cached_tokens(),
                completion,
            },
        }
    }

    fn measure(&mut self) {
        let now = Instant::now();
        let metrics = &self.shared.metrics;
        match self.last_token.replace(now) {
            None => metrics
                .time_to_first_token
                .observe((now - self.arrived).as_secs_f64()),
            Some(last) => metrics
                .inter_token_latency
                .observe((now - last).as_secs_f64()),
        }
    }
}

/// Tokens of one answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) prompt: u32,
    /// Of the prompt, those whose KV came from a cache.
    pub(crate) cached: u32,
    pub(crate) completion: u32,
}
