//! One sequence from its prompt to its last token, over as many attempts and workers as that takes.
//!
//! [`Sequence::next`] gives tokens with strictly growing index and then exactly one end. Tokens that were given are never
//! given again: a new attempt starts from the prompt and all tokens so far, so whatever a worker repeats or skips is
//! noticed by its index and ends the attempt. What an old attempt still sends is never read: its streams are dropped
//! before the next one begins, and its number is refused by the workers.

mod calls;
mod recovery;

use std::{collections::BTreeSet, sync::Arc};

use http::HeaderValue;
use openai::ApiError;
use parking_lot::Mutex;
use proto::v1::{
    self, DecodeResponse, FinishReason, ReserveRequest, RunRequest, RunResponse, TransferTarget,
    decode_response, run_response,
};
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::{
    Shared,
    attempt::{Decode, Ending, Failure, Prefill},
    lease::Lease,
    retry::{Reason, Verdict},
    route::Route,
};
use crate::fleet::Assignment;
use calls::millis;

/// After so many tokens without a failure, what failed before is forgotten: a long answer may outlive many workers, and
/// one that makes every worker fail still ends soon.
const PROGRESS_TOKENS: u32 = 256;

/// Workers that died while they ran a request, by incarnation: of all its answers together.
pub(crate) type Deaths = Arc<Mutex<BTreeSet<String>>>;

/// What a sequence needs, whichever worker runs it.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// Its name at the workers: made here, never the client's.
    pub(crate) id: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) sampling: v1::Sampling,
    pub(crate) stop: v1::Stop,
    pub(crate) cache_salt: Vec<u8>,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Instant,
    pub(crate) request_id: HeaderValue,
    pub(crate) traceparent: HeaderValue,
    pub(crate) deaths: Deaths,
}

/// What happens to a sequence.
#[derive(Debug)]
pub(crate) enum Step {
    /// The next token.
    Token(v1::Token),
    /// Its end. Nothing comes after it.
    Finished(FinishReason),
}

/// A sequence on its way.
pub(crate) struct Sequence {
    shared: Arc<Shared>,
    spec: Spec,
    prompt_tokens: usize,
    attempt: u32,
    failures: u32,
    /// Tokens given when the last attempt failed.
    failed_at: u32,
    refusals: u32,
    avoid: Vec<String>,
    cached_tokens: Option<u32>,
    stage: Stage,
}

enum Stage {
    /// The next attempt has not begun.
    Idle,
    /// A prefill worker computes the prompt.
    Prefill(Box<Prefill>),
    /// A decode worker generates.
    Decode(Box<Decode>),
    /// The token that was given was the last; only the prefill worker's count is missing.
    Ending(Box<Ending>),
    /// The end was given.
    Ended,
}

impl Sequence {
    pub(crate) fn new(shared: Arc<Shared>, spec: Spec) -> Self {
        Self {
            shared,
            prompt_tokens: spec.tokens.len(),
            spec,
            attempt: 1,
            failures: 0,
            failed_at: 0,
            refusals: 0,
            avoid: Vec::new(),
            cached_tokens: None,
            stage: Stage::Idle,
        }
    }

    pub(crate) fn prompt_tokens(&self) -> u32 {
        self.prompt_tokens as u32
    }

    /// Tokens given so far.
    pub(crate) fn produced(&self) -> u32 {
        (self.spec.tokens.len() - self.prompt_tokens) as u32
    }

    /// Prompt tokens whose KV came from a cache, as far as is known.
    pub(crate) fn cached_tokens(&self) -> u32 {
        self.cached_tokens.unwrap_or(0)
    }

    /// What happens next. Must not be called again after [`Step::Finished`] or an error.
    ///
    /// # Errors
    /// When no further attempt is worth while.
    pub(crate) async fn next(&mut self) -> Result<Step, ApiError> {
        loop {
            let step = match &mut self.stage {
                Stage::Idle => self.begin().await,
                Stage::Prefill(_) => self.await_first_token().await,
                Stage::Decode(_) => self.await_decode().await,
                Stage::Ending(_) => Ok(Some(self.await_count().await)),
                Stage::Ended => return Err(ApiError::internal("The answer is over.")),
            };
            match step {
                Ok(Some(step)) => return Ok(step),
                Ok(None) => {}
                Err(failure) => self.recover(failure).await?,
            }
        }
    }

    /// Chooses workers and starts an attempt.
    async fn begin(&mut self) -> Result<Option<Step>, Failure> {
        // The worker was lost between the last token and saying so.
        if let Some(&last) = self
            .spec
            .tokens
            .get(self.prompt_tokens..)
            .and_then(<[u32]>::last)
            && let Some(reason) = self.end_after(last)
        {
            return Ok(Some(self.end(reason)));
        }
        match self.route().await? {
            Route::Whole(worker) => {
                let decode = Assignment::new(worker, self.spec.tokens.len() as u64);
                let call = self.start_decode(decode.worker(), None);
                let limit = self.first_token_limit(decode.worker());
                let stage = Decode {
                    call,
                    worker: decode,
                    lease: None,
                    transfer: None,
                    first_until: Some(self.bound(limit)),
                };
                self.stage = Stage::Decode(Box::new(stage));
                Ok(None)
            }
            Route::Pair {
                prefill,
                decode,
                cached_tokens,
            } => {
                let prompt = self.spec.tokens.len() as u64;
                self.shared
                    .metrics
                    .prefix_cache_hit
                    .observe(cached_tokens as f64 / prompt as f64);
                let prefill = Assignment::new(prefill, prompt.saturating_sub(cached_tokens));
                self.begin_pair(prefill, Assignment::new(decode, 0)).await
            }
        }
    }

    async fn begin_pair(
        &mut self,
        mut prefill: Assignment,
        mut decode: Assignment,
    ) -> Result<Option<Step>, Failure> {
        let timeouts = self.shared.config.timeouts;
        let limit = self.first_token_limit(prefill.worker());
        let request = self.request(ReserveRequest {
            key: Some(self.key()),
            tokens: self.spec.tokens.clone(),
            kv_fingerprint: prefill.worker().facts.kv_fingerprint.clone(),
            deadline_ms: millis(limit),
            cache_salt: self.spec.cache_salt.clone(),
            prompt_tokens: self.prompt_tokens(),
        });
        let worker = Arc::clone(decode.worker());
        let lease = Lease::reserve(worker, request, timeouts.answer, &self.shared.tasks).await;
        let lease = lease.map_err(|status| Failure::of_call(&status, &mut [&mut decode]))?;
        let grant = &lease.grant;
        let request = self.request(RunRequest {
            sequence: Some(self.sequence()),
            target: Some(TransferTarget {
                kv_address: decode.worker().facts.kv_address.clone(),
                incarnation: grant.incarnation.clone(),
                lease: grant.lease,
                first_block: grant.cached_blocks,
            }),
        });
        let until = self.bound(limit);
        let mut client = prefill.worker().prefill();
        let answers = tokio::time::timeout_at(until, client.run(request)).await;
        let answers = answers
            .map_err(|_| Failure::slow("answer from prefill", &mut prefill))?
            .map_err(|status| Failure::of_prefill(&status, &mut prefill, &mut decode))?
            .into_inner();
        self.stage = Stage::Prefill(Box::new(Prefill {
            answers,
            worker: prefill,
            decode,
            lease,
            until,
        }));
        Ok(None)
    }

    /// Waits for the token that the prefill worker samples.
    async fn await_first_token(&mut self) -> Result<Option<Step>, Failure> {
        let Stage::Prefill(mut stage) = std::mem::replace(&mut self.stage, Stage::Idle) else {
            return Ok(None);
        };
        let answer = tokio::time::timeout_at(stage.until, stage.answers.message()).await;
        let Prefill {
            answers,
            worker: mut prefill,
            mut decode,
            lease,
            ..
        } = *stage;
        let answer = answer
            .map_err(|_| Failure::slow("first token", &mut prefill))?
            .map_err(|status| Failure::of_prefill(&status, &mut prefill, &mut decode))?;
        let Some(run_response::Event::Token(token)) = answer.and_then(|answer| answer.event) else {
            let detail = "prefill ended without a token".to_string();
            return Err(Failure::protocol(detail, &mut prefill));
        };
        self.accept(&token, &mut prefill)?;
        if let Some(reason) = self.end_after(token.token) {
            let ending = Ending {
                reason,
                answers,
                prefill,
                _lease: lease,
            };
            self.stage = Stage::Ending(Box::new(ending));
            return Ok(Some(Step::Token(token)));
        }
        let call = self.start_decode(decode.worker(), Some(&lease));
        let (lease, transfer) = (Some(lease), Some((answers, prefill)));
        self.stage = Stage::Decode(Box::new(Decode {
            call,
            worker: decode,
            lease,
            transfer,
            first_until: Some(self.bound(self.shared.config.timeouts.first_token)),
        }));
        Ok(Some(Step::Token(token)))
    }

    /// The first token was the last one. How it came about is known when the prefill worker is done, or not at all.
    async fn await_count(&mut self) -> Step {
        let Stage::Ending(mut stage) = std::mem::replace(&mut self.stage, Stage::Ended) else {
            return self.end(FinishReason::Stop);
        };
        let limit = self.shared.config.timeouts.answer;
        if let Ok(Ok(Some(answer))) = timeout(limit, stage.answers.message()).await
            && let Some(run_response::Event::Done(done)) = answer.event
        {
            self.cached_tokens.get_or_insert(done.cached_tokens);
            stage.prefill.succeed();
        }
        self.end(stage.reason)
    }

    fn end(&mut self, reason: FinishReason) -> Step {
        self.stage = Stage::Ended;
        Step::Finished(reason)
    }

    async fn await_decode(&mut self) -> Result<Option<Step>, Failure> {
        let timeouts = self.shared.config.timeouts;
        let (deadline, now) = (self.spec.deadline, Instant::now());
        let Stage::Decode(stage) = &mut self.stage else {
            return Ok(None);
        };
        let until = stage.first_until.unwrap_or(now + timeouts.token);
        let message = async {
            match &mut stage.transfer {
                None => Ok(stage.call.message().await),
                Some((answers, _)) => tokio::select! {
                    biased;
                    message = stage.call.message() => Ok(message),
                    message = answers.message() => Err(message),
                },
            }
        };
        match tokio::time::timeout_at(until.min(deadline), message).await {
            Ok(Ok(message)) => self.on_decode(message),
            Ok(Err(message)) => self.on_transfer(message),
            Err(_) => Err(Failure::slow("token", &mut stage.worker)),
        }
    }

    fn on_decode(
        &mut self,
        message: Result<Option<DecodeResponse>, Status>,
    ) -> Result<Option<Step>, Failure> {
        let Stage::Decode(mut stage) = std::mem::replace(&mut self.stage, Stage::Idle) else {
            return Ok(None);
        };
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => {
                let lost = Verdict::Retry(Reason::Lost);
                let detail = "decode's answer broke off".to_string();
                return Err(Failure::new(lost, detail, &mut [&mut stage.worker]));
            }
            Err(status) => return Err(Failure::of_call(&status, &mut [&mut stage.worker])),
        };
        match message.event {
            Some(decode_response::Event::Token(token)) => {
                self.accept(&token, &mut stage.worker)?;
                stage.commit();
                self.stage = Stage::Decode(stage);
                Ok(Some(Step::Token(token)))
            }
            Some(decode_response::Event::Committed(_)) => {
                stage.commit();
                self.stage = Stage::Decode(stage);
                Ok(None)
            }
            Some(decode_response::Event::Finished(finished)) => {
                stage.commit();
                self.on_finished(&finished, &mut stage.worker).map(Some)
            }
            // Log probabilities of prompts are not asked for.
            Some(decode_response::Event::PromptLogprobs(_)) | None => {
                self.stage = Stage::Decode(stage);
                Ok(None)
            }
        }
    }

    fn on_finished(
        &mut self,
        finished: &v1::Finished,
        decode: &mut Assignment,
    ) -> Result<Step, Failure> {
        let produced = self.produced();
        if finished.completion_tokens != produced {
            let detail = format!(
                "{} tokens counted, {produced} came",
                finished.completion_tokens
            );
            return Err(Failure::protocol(detail, decode));
        }
        let reason = finished.reason();
        if !matches!(reason, FinishReason::Stop | FinishReason::Length) {
            // The worker gave it up (a drain): somebody else goes on.
            let detail = "decode gave the sequence up".to_string();
            return Err(Failure::new(
                Verdict::Retry(Reason::Lost),
                detail,
                &mut [decode],
            ));
        }
        decode.succeed();
        self.cached_tokens.get_or_insert(finished.cached_tokens);
        Ok(self.end(reason))
    }

    fn on_transfer(
        &mut self,
        message: Result<Option<RunResponse>, Status>,
    ) -> Result<Option<Step>, Failure> {
        let Stage::Decode(mut stage) = std::mem::replace(&mut self.stage, Stage::Idle) else {
            return Ok(None);
        };
        let Some((_, mut prefill)) = stage.transfer.take() else {
            return Ok(None);
        };
        match message {
            Ok(Some(RunResponse {
                event: Some(run_response::Event::Done(done)),
            })) => {
                prefill.succeed();
                self.cached_tokens.get_or_insert(done.cached_tokens);
                if matches!(done.finish(), FinishReason::Stop | FinishReason::Length) {
                    return Ok(Some(self.end(done.finish())));
                }
            }
            // From the commit on the decode worker alone answers for the sequence.
            _ if stage.lease.is_none() => {}
            Ok(_) => {
                let detail = "prefill did not say that it is done".to_string();
                return Err(Failure::protocol(detail, &mut prefill));
            }
            Err(status) => {
                return Err(Failure::of_prefill(
                    &status,
                    &mut prefill,
                    &mut stage.worker,
                ));
            }
        }
        self.stage = Stage::Decode(stage);
        Ok(None)
    }

    /// Takes a token over, if it is the next one.
    fn accept(&mut self, token: &v1::Token, from: &mut Assignment) -> Result<(), Failure> {
        let expected = self.produced();
        if token.index != expected {
            let detail = format!("token {} came where {expected} was due", token.index);
            return Err(Failure::protocol(detail, from));
        }
        self.spec.tokens.push(token.token);
        Ok(())
    }

    /// Whether the sequence ends by itself with `token`, the last one that was accepted.
    fn end_after(&self, token: u32) -> Option<FinishReason> {
        if self.spec.stop.token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if self.produced() >= self.spec.stop.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
