//! The generation's half: leases, and sequences that go on from them or are computed here whole.

use std::{sync::Arc, time::Duration};

use engine::api::{Event, Phase, Running};
use proto::v1::{self, decode_response, decode_server::Decode};
use tokio::{sync::mpsc, time::Instant};
use tonic::{Request, Response, Status};
use tracing::info_span;
use transfer::{Claim, Plan};

use crate::{
    convert,
    rpc::{self, Answers, Context, answer},
    shared::{Leased, Shared, geometry},
    status,
};

/// A lease lives at most so long without a sign of life, whatever the router asks for.
const MAX_LEASE: Duration = Duration::from_secs(60);

/// The `Decode` service.
#[derive(Clone)]
pub(crate) struct DecodeService(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl Decode for DecodeService {
    async fn reserve(
        &self,
        request: Request<v1::ReserveRequest>,
    ) -> Result<Response<v1::ReserveResponse>, Status> {
        let shared = &self.0;
        if shared.drain.is_on() {
            return Err(status::draining());
        }
        let (metadata, _, request) = request.into_parts();
        let context = Context::new(request.key.as_ref(), request.deadline_ms, &metadata)?;
        convert::tokens(&request.tokens, &shared.engine.limits())?;
        if request.tokens.is_empty() {
            return Err(Status::invalid_argument(
                "there are no tokens to reserve for",
            ));
        }
        if request.kv_fingerprint != shared.engine.format().fingerprint() {
            return Err(Status::failed_precondition("the KV format differs"));
        }
        let prompt = match request.prompt_tokens as usize {
            0 => &request.tokens[..],
            count => request.tokens.get(..count).ok_or_else(|| {
                Status::invalid_argument("prompt_tokens is larger than the number of tokens")
            })?,
        };
        let reservation = shared
            .engine
            .pool()
            .reserve_beyond(prompt, request.tokens.len(), &request.cache_salt)
            .map_err(|full| Status::resource_exhausted(full.to_string()))?;
        let cached_blocks = reservation.cached_blocks() as u32;
        let plan = Plan {
            geometry: geometry(&*shared.engine),
            first_block: cached_blocks,
            total_tokens: request.tokens.len() as u32,
        };
        let leased = Leased {
            reservation,
            tokens: request.tokens,
            cache_salt: request.cache_salt,
        };
        let ttl = context.left().min(MAX_LEASE);
        let lease = shared.receiver.reserve(context.key, plan, ttl, leased)?;
        Ok(Response::new(v1::ReserveResponse {
            lease,
            incarnation: shared.config.identity.incarnation.clone(),
            cached_blocks,
            total_blocks: plan.total_blocks(),
        }))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let request = request.into_inner();
        // A lease of a former life ended with it.
        let released = request.incarnation == self.0.config.identity.incarnation
            && self.0.receiver.release(request.lease);
        Ok(Response::new(v1::ReleaseResponse { released }))
    }

    type GenerateStream = Answers<v1::DecodeResponse>;

    async fn generate(
        &self,
        request: Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let shared = Arc::clone(&self.0);
        let (metadata, _, request) = request.into_parts();
        let sequence = request.sequence.unwrap_or_default();
        let context = Context::new(sequence.key.as_ref(), sequence.deadline_ms, &metadata)?;
        let span = info_span!(
            "decode",
            request.id = context.key.request,
            request.attempt = context.key.attempt,
            trace.id = context.trace_id(),
            tokens = sequence.tokens.len(),
            lease = request.lease,
        );
        // A lease given before the drain began is kept.
        let claim = if request.lease == 0 {
            if shared.drain.is_on() {
                return Err(status::draining());
            }
            None
        } else {
            if request.incarnation != shared.config.identity.incarnation {
                let message = "the lease is of another incarnation of this worker";
                return Err(Status::failed_precondition(message));
            }
            Some(shared.receiver.claim(request.lease, &context.key)?)
        };
        // Before anything is waited for: what can never run is refused at once.
        convert::job(
            sequence.clone(),
            Phase::Whole,
            &context,
            &shared.engine.limits(),
        )?;
        let calls = shared.calls.clone();
        let deadline = context.deadline;
        let answers = rpc::answers(&calls, span, deadline, move |answers| {
            Generate {
                shared,
                context,
                answers,
            }
            .run(sequence, claim)
        });
        Ok(Response::new(answers))
    }
}

/// One sequence.
struct Generate {
    shared: Arc<Shared>,
    context: Context,
    answers: mpsc::Sender<Result<v1::DecodeResponse, Status>>,
}

impl Generate {
    async fn run(self, sequence: v1::Sequence, claim: Option<Claim<Leased>>) -> Result<(), Status> {
        let outcome = self.shared.metrics.outcome();
        let phase = match claim {
            None => Phase::Whole,
            Some(claim) => {
                let blocks = self.receive(claim, &sequence).await;
                Phase::Decode(blocks.map_err(|status| outcome.failed(status))?)
            }
        };
        let transferred = matches!(phase, Phase::Decode(_));
        let mut finished = v1::Finished {
            prompt_tokens: sequence.prompt_tokens,
            completion_tokens: (sequence.tokens.len() as u32)
                .saturating_sub(sequence.prompt_tokens),
            ..v1::Finished::default()
        };
        let prompt = sequence.tokens.len();
        let limits = self.shared.engine.limits();
        let job = convert::job(sequence, phase, &self.context, &limits)?;
        let submitted = Instant::now();
        let running = self.shared.submit(job);
        let Running {
            mut events,
            guard: _guard,
        } = running.map_err(|status| outcome.failed(status))?;
        loop {
            let event = events
                .recv()
                .await
                .ok_or_else(|| outcome.failed(status::gone()))?;
            match event {
                Event::Started { cached_tokens, .. } => {
                    let metrics = &self.shared.metrics;
                    metrics.queued(submitted.elapsed());
                    if !transferred {
                        finished.cached_tokens = cached_tokens as u32;
                        metrics.prompt_tokens(prompt - cached_tokens, cached_tokens, 0);
                    }
                }
                Event::Token(token) => {
                    finished.completion_tokens = token.index as u32 + 1;
                    self.answer(decode_response::Event::Token(convert::token(token)))
                        .await?;
                }
                Event::Finished(finish) => {
                    outcome.finished(finish);
                    finished.set_reason(convert::finish(finish));
                    return self
                        .answer(decode_response::Event::Finished(finished))
                        .await;
                }
                Event::Failed(error) => return Err(outcome.failed(status::failed(&error))),
                Event::PromptLogprobs(tokens) => {
                    let tokens = tokens.into_iter().map(convert::token).collect();
                    let logprobs = v1::PromptLogprobs { tokens };
                    self.answer(decode_response::Event::PromptLogprobs(logprobs))
                        .await?;
                }
                // Reported to senders only.
                Event::Filled { .. } => {}
            }
        }
    }

    async fn answer(&self, event: decode_response::Event) -> Result<(), Status> {
        answer(&self.answers, v1::DecodeResponse { event: Some(event) }).await
    }

    /// Waits until the whole KV is here and verified, and takes it over.
    async fn receive(
        &self,
        mut claim: Claim<Leased>,
        sequence: &v1::Sequence,
    ) -> Result<kv::Blocks, Status> {
        let start = Instant::now();
        let metrics = &self.shared.metrics;
        let sealed = tokio::time::timeout_at(self.context.deadline, claim.sealed()).await;
        let sealed = sealed.map_err(|_| Status::deadline_exceeded("the KV did not arrive in time"));
        let ready = sealed.and_then(|sealed| Ok(sealed?));
        let (leased, bytes) = match ready.and_then(|()| Ok(claim.commit()?)) {
            Ok(committed) => committed,
            Err(status) => {
                metrics.receive_failed(status.code());
                return Err(status);
            }
        };
        // The KV of all tokens but the last, which is the first thing to compute here.
        let known = sequence.tokens.split_last().map(|(_, known)| known);
        if known != Some(&leased.tokens[..]) || sequence.cache_salt != leased.cache_salt {
            return Err(Status::invalid_argument(
                "the lease was given for other tokens",
            ));
        }
        let waited = start.elapsed();
        let cached = leased.reservation.cached_blocks() * kv::BLOCK_TOKENS;
        let cached = cached.min(leased.tokens.len());
        metrics.received(waited);
        metrics.prompt_tokens(0, cached, leased.tokens.len() - cached);
        let blocks = leased.reservation.commit();
        let wait_ms = waited.as_millis() as u32;
        let committed = v1::Committed {
            received_bytes: bytes,
            wait_ms,
        };
        self.answer(decode_response::Event::Committed(committed))
            .await?;
        Ok(blocks)
    }
}
