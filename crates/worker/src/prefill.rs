//! The prompt's half: compute, push layer by layer while computing, sample the first token.

use std::{pin::Pin, sync::Arc};

use engine::api::{Event, Finish, Phase};
use proto::v1::{self, prefill_server::Prefill, run_response};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tonic::{Request, Response, Status};
use tracing::info_span;
use transfer::{Identity, Plan, PushError, Report, Source, Transfer, protocol::Watermarks};

use crate::{
    convert,
    rpc::{self, Answers, Context, answer},
    shared::{PoolSums, Shared, geometry},
    status,
};

/// The `Prefill` service.
#[derive(Clone)]
pub(crate) struct PrefillService(pub(crate) Arc<Shared>);

#[tonic::async_trait]
impl Prefill for PrefillService {
    type RunStream = Answers<v1::RunResponse>;

    async fn run(
        &self,
        request: Request<v1::RunRequest>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let shared = Arc::clone(&self.0);
        if shared.drain.is_on() {
            return Err(status::draining());
        }
        let (metadata, _, request) = request.into_parts();
        let sequence = request.sequence.unwrap_or_default();
        let context = Context::new(sequence.key.as_ref(), sequence.deadline_ms, &metadata)?;
        let target = request
            .target
            .filter(|target| !target.kv_address.is_empty())
            .ok_or_else(|| Status::invalid_argument("the call names no target"))?;
        let span = info_span!(
            "prefill",
            request.id = context.key.request,
            request.attempt = context.key.attempt,
            trace.id = context.trace_id(),
            tokens = sequence.tokens.len(),
        );
        let job = convert::job(sequence, Phase::Prefill, &context, &shared.engine.limits())?;
        let plan = Plan {
            geometry: geometry(&*shared.engine),
            first_block: target.first_block,
            total_tokens: job.tokens.len() as u32,
        };
        if target.first_block > plan.total_blocks() {
            return Err(Status::invalid_argument(
                "target.first_block lies behind the prompt",
            ));
        }
        let running = shared.submit(job)?;
        let calls = shared.calls.clone();
        let deadline = context.deadline;
        let answers = rpc::answers(&calls, span, deadline, move |answers| {
            Run::new(shared, context, target, plan).run(running, answers)
        });
        Ok(Response::new(answers))
    }
}

type Pushing = Pin<Box<dyn Future<Output = Result<Report, PushError>> + Send>>;

/// One prompt on its way.
struct Run {
    shared: Arc<Shared>,
    context: Context,
    target: v1::TransferTarget,
    plan: Plan,
    filled: watch::Sender<Watermarks>,
    submitted: Instant,
    started: Option<Instant>,
    done: v1::PrefillDone,
}

impl Run {
    fn new(shared: Arc<Shared>, context: Context, target: v1::TransferTarget, plan: Plan) -> Self {
        Self {
            shared,
            context,
            target,
            plan,
            filled: watch::Sender::new(Watermarks::new(plan.geometry.layers)),
            submitted: Instant::now(),
            started: None,
            done: v1::PrefillDone::default(),
        }
    }

    async fn run(
        mut self,
        mut running: engine::api::Running,
        answers: mpsc::Sender<Result<v1::RunResponse, Status>>,
    ) -> Result<(), Status> {
        let outcome = self.shared.metrics.outcome();
        let mut pushing: Option<Pushing> = None;
        let mut finished: Option<Finish> = None;
        loop {
            match finished {
                // The first token ended the sequence: nobody needs its KV.
                Some(Finish::Stop | Finish::Length) => break,
                Some(Finish::HandOff) if pushing.is_none() => break,
                _ => {}
            }
            tokio::select! {
                biased;
                report = async { pushing.as_mut().expect("checked below").await },
                    if pushing.is_some() =>
                {
                    self.pushed(report)?;
                    pushing = None;
                }
                event = running.events.recv(), if finished.is_none() => {
                    match event.ok_or_else(status::gone)? {
                        Event::Started { cached_tokens, blocks } => {
                            pushing = Some(self.start(cached_tokens, blocks)?);
                        }
                        Event::Filled { end, layers, .. } => {
                            self.filled.send_modify(|marks| marks.raise(layers, end as u32));
                        }
                        Event::PromptLogprobs(logprobs) => self.done.prompt_logprobs =
                            logprobs.into_iter().map(convert::token).collect(),
                        Event::Token(token) => {
                            self.computed();
                            let event = run_response::Event::Token(convert::token(token));
                            answer(&answers, v1::RunResponse { event: Some(event) }).await?;
                        }
                        Event::Finished(finish) => finished = Some(finish),
                        Event::Failed(error) => return Err(outcome.failed(status::failed(&error))),
                    }
                }
            }
        }
        let finish = finished.expect("the loop ends with it");
        self.done.set_finish(convert::finish(finish));
        outcome.finished(finish);
        let event = run_response::Event::Done(self.done);
        answer(&answers, v1::RunResponse { event: Some(event) }).await
    }

    /// It left the queue: its blocks begin to move.
    fn start(
        &mut self,
        cached_tokens: usize,
        blocks: Option<Arc<kv::Blocks>>,
    ) -> Result<Pushing, Status> {
        let blocks = blocks.ok_or_else(|| Status::internal("a prefill without blocks"))?;
        let now = Instant::now();
        self.started = Some(now);
        let waited = now - self.submitted;
        self.done.queue_ms = waited.as_millis() as u32;
        self.done.cached_tokens = cached_tokens as u32;
        let metrics = &self.shared.metrics;
        metrics.queued(waited);
        metrics.prompt_tokens(
            self.plan.total_tokens as usize - cached_tokens,
            cached_tokens,
            0,
        );
        let layers = 0..self.plan.geometry.layers as usize;
        self.filled
            .send_modify(|marks| marks.raise(layers, cached_tokens as u32));

        let address = self.target.kv_address.clone();
        let channel = self.shared.channels.get(&address).map_err(|error| {
            Status::invalid_argument(format!("target.kv_address {address:?}: {error}"))
        })?;
        let transfer = Transfer {
            address,
            identity: Identity {
                key: self.context.key.clone(),
                lease: self.target.lease,
                receiver: self.target.incarnation.clone(),
                sender: self.shared.config.identity.incarnation.clone(),
                fingerprint: self.shared.engine.format().fingerprint().to_vec(),
                plan: self.plan,
            },
            source: Source {
                memory: self.shared.engine.memory(),
                sums: Arc::new(PoolSums(self.shared.engine.pool().clone())),
                ids: blocks.ids().iter().map(|id| id.0).collect(),
                owner: blocks,
            },
            filled: self.filled.subscribe(),
            headers: self.context.headers.clone(),
            deadline: self.context.deadline,
            sent: {
                let metrics = Arc::clone(&self.shared.metrics);
                Arc::new(move |bytes| metrics.sent(bytes))
            },
        };
        Ok(Box::pin(transfer::push(channel, transfer)))
    }

    fn computed(&mut self) {
        let took = self
            .started
            .map_or_else(Default::default, |started| started.elapsed());
        self.done.compute_ms = took.as_millis() as u32;
        self.shared.metrics.prefilled(took);
    }

    fn pushed(&mut self, report: Result<Report, PushError>) -> Result<(), Status> {
        let metrics = &self.shared.metrics;
        let report = report.map_err(|error| {
            metrics.push_failed(error.reason());
            status::push(&error)
        })?;
        metrics.pushed(&report);
        self.done.transferred_bytes = report.bytes;
        self.done.transfer_ms = report.took.as_millis() as u32;
        Ok(())
    }
}
