//! One sequence from its prompt to its last token, over as many attempts and workers as that takes.
//!
//! [`Sequence::next`] gives tokens with strictly growing index and then exactly one end. Tokens that were given are never
//! given again: a new attempt starts from the prompt and all tokens so far, so whatever a worker repeats or skips is
//! noticed by its index and ends the attempt. What an old attempt still sends is never read: its streams are dropped
//! before the next one begins, and its number is refused by the workers.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use openai::ApiError;
use planted::Bug;
use proto::v1::{
    self, DecodeRequest, DecodeResponse, FinishReason, RequestKey, ReserveRequest, RunRequest,
    RunResponse, TransferTarget, decode_response, run_response,
};
use telemetry::trace::{REQUEST_ID, TRACEPARENT};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Request, Status};
use tracing::{debug, info};

use super::{
    Shared,
    attempt::{Call, Decode, Ending, Failure, Prefill},
    lease::Lease,
    retry::{Reason, Verdict, pause},
    route::{Route, Wish, choose},
};
use crate::fleet::{Assignment, Worker};

/// After so many tokens without a failure, what failed before is forgotten: a long answer may outlive many workers, and
/// one that makes every worker fail still ends soon.
const PROGRESS_TOKENS: u32 = 256;

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

    /// Prepares the next attempt, or says why there is none.
    async fn recover(&mut self, failure: Failure) -> Result<(), ApiError> {
        // Drops the attempt's streams and lease, which cancels it at the workers.
        self.stage = Stage::Idle;
        if planted::is(Bug::TokenTwice) && self.produced() > 0 {
            self.spec.tokens.pop();
        }
        let Failure {
            verdict,
            detail,
            avoid,
        } = failure;
        let reason = match verdict {
            Verdict::Fatal(error) => return Err(*error),
            Verdict::Full => None,
            Verdict::Retry(reason) => Some(reason),
        };
        if Instant::now() >= self.spec.deadline {
            return Err(ApiError::deadline(
                "The request did not end within its time limit.",
            ));
        }
        let (config, random) = (self.shared.config.retry, self.shared.seams.entropy.u64());
        debug!(attempt = self.attempt, %detail, "attempt failed");
        self.attempt += 1;
        let wait = if let Some(reason) = reason {
            let produced = self.produced();
            if produced - self.failed_at >= PROGRESS_TOKENS {
                self.failures = 0;
                self.avoid.clear();
            }
            self.failed_at = produced;
            self.failures += 1;
            self.avoid.extend(avoid);
            self.permit_retry(reason)?;
            info!(attempt = self.attempt, reason = reason.as_str(), %detail, "starting over");
            pause(config, self.failures, random)
        } else {
            self.refusals += 1;
            let queue_timeout = self.shared.config.admission.queue_timeout;
            if self.produced() == 0 && self.spec.arrived.elapsed() > queue_timeout {
                let message = "The server is overloaded: no worker had room in time.";
                return Err(ApiError::overloaded(message, 1));
            }
            pause(config, self.refusals + 1, random)
        };
        let left = self.spec.deadline.saturating_duration_since(Instant::now());
        sleep(wait.min(left)).await;
        Ok(())
    }

    fn permit_retry(&self, reason: Reason) -> Result<(), ApiError> {
        let metrics = &self.shared.metrics;
        let is_migration = self.produced() > 0;
        if self.failures > self.shared.config.retry.max_failures {
            return Err(ApiError::unavailable("The workers failed repeatedly.", 1));
        }
        if is_migration {
            metrics
                .migrations
                .with_label_values(&[reason.as_str()])
                .inc();
        } else {
            if !self.shared.budget.withdraw() {
                return Err(ApiError::unavailable(
                    "Too many requests fail at the workers.",
                    1,
                ));
            }
            metrics.retries.with_label_values(&[reason.as_str()]).inc();
        }
        Ok(())
    }

    /// Chooses workers; waits a while if there are none.
    async fn route(&mut self) -> Result<Route, ApiError> {
        let shared = &self.shared;
        let mut changes = shared.fleet.subscribe();
        let until = self.bound(shared.config.timeouts.no_worker);
        let mut is_counted = false;
        loop {
            changes = changes.resubscribe();
            let wish = Wish {
                mode: shared.config.mode,
                policy: shared.config.policy,
                avoid: &self.avoid,
                tokens: &self.spec.tokens,
                salt: &self.spec.cache_salt,
            };
            let random = shared.seams.entropy.u64();
            match choose(&shared.fleet.workers(), &wish, random, Instant::now()) {
                Ok(route) => return Ok(route),
                Err(none) if !is_counted => {
                    shared
                        .metrics
                        .no_pair
                        .with_label_values(&[none.reason()])
                        .inc();
                    is_counted = true;
                }
                Err(_) => {}
            }
            // A breaker that may be tried again makes no change: look again now and then.
            let soon = Instant::now() + Duration::from_millis(500);
            if tokio::time::timeout_at(until.min(soon), changes.recv())
                .await
                .is_err()
                && Instant::now() >= until
            {
                return Err(ApiError::unavailable(
                    "No worker can take the request now.",
                    1,
                ));
            }
        }
    }

    /// Calls a decode worker; the call goes out when it is first awaited.
    fn start_decode(&self, worker: &Worker, lease: Option<&Lease>) -> Call {
        let (lease, incarnation) = match lease {
            Some(lease) => (lease.grant.lease, lease.grant.incarnation.clone()),
            None => (0, worker.incarnation().to_string()),
        };
        let sequence = Some(self.sequence());
        let request = self.request(DecodeRequest {
            sequence,
            lease,
            incarnation,
        });
        let mut client = worker.decode();
        Call::Starting(Box::pin(async move {
            client
                .generate(request)
                .await
                .map(tonic::Response::into_inner)
        }))
    }

    fn key(&self) -> RequestKey {
        RequestKey {
            request_id: self.spec.id.clone(),
            attempt: self.attempt,
        }
    }

    fn sequence(&self) -> v1::Sequence {
        let mut sampling = self.spec.sampling.clone();
        if planted::is(Bug::SeedLost) && self.attempt > 1 {
            sampling.seed ^= 1;
        }
        v1::Sequence {
            key: Some(self.key()),
            tokens: self.spec.tokens.clone(),
            prompt_tokens: self.prompt_tokens(),
            sampling: Some(sampling),
            stop: Some(self.spec.stop.clone()),
            deadline_ms: millis(self.spec.deadline.saturating_duration_since(Instant::now())),
            prompt_logprobs: false,
            cache_salt: self.spec.cache_salt.clone(),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut().as_mut();
        headers.insert(REQUEST_ID, self.spec.request_id.clone());
        headers.insert(TRACEPARENT, self.spec.traceparent.clone());
        request
    }

    /// How long a worker may take to a prompt's first token.
    fn first_token_limit(&self, worker: &Worker) -> Duration {
        let timeouts = self.shared.config.timeouts;
        let tokens = u32::try_from(worker.pending_tokens()).unwrap_or(u32::MAX);
        timeouts.first_token + timeouts.prompt_token.saturating_mul(tokens)
    }

    /// `limit` from now, but not past the request's deadline.
    fn bound(&self, limit: Duration) -> Instant {
        (Instant::now() + limit).min(self.spec.deadline)
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
