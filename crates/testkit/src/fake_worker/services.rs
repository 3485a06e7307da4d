//! The gRPC services of a fake worker.

use std::time::Duration;

use futures::StreamExt;
use proto::v1::{
    Committed, DecodeRequest, DecodeResponse, DescribeRequest, DescribeResponse, DrainRequest,
    DrainResponse, Finished, Identity, Load, PrefillDone, ReleaseRequest, ReleaseResponse,
    ReserveRequest, ReserveResponse, RunRequest, RunResponse, WatchRequest, WatchResponse,
    decode_response, decode_server, prefill_server, run_response, worker_server,
};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::{Answers, FakeWorker, Fault};

#[tonic::async_trait]
impl worker_server::Worker for FakeWorker {
    type WatchStream = Answers<WatchResponse>;

    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        let options = &self.0.options;
        Ok(Response::new(DescribeResponse {
            identity: Some(Identity {
                deployment: "test".into(),
                role: options.role.into(),
                unit: options.incarnation.clone(),
                rank: 0,
                incarnation: options.incarnation.clone(),
                revision: options.revision.clone(),
            }),
            kv_address: format!("{}:kv", options.incarnation),
            kv_fingerprint: b"kv".to_vec(),
            block_tokens: 64,
            total_blocks: 1024,
            max_model_len: options.max_model_len,
            max_running: 64,
            model: "fake".into(),
            precision: "f32".into(),
            vocab_size: 1 << 17,
        }))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut told = 0;
        let shown = WatchStream::new(self.0.status.subscribe()).enumerate();
        let messages = shown.map(move |(sequence, shown)| {
            let stored = shown.stored[told..].to_vec();
            told = shown.stored.len();
            let load = Load {
                free_blocks: 1024,
                total_blocks: 1024,
                ..Load::default()
            };
            Ok(WatchResponse {
                sequence: sequence as u64 + 1,
                load: Some(load),
                stored,
                evicted: Vec::new(),
                draining: shown.is_draining,
            })
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Self::drain(self);
        Ok(Response::new(DrainResponse { running: 0 }))
    }
}

#[tonic::async_trait]
impl prefill_server::Prefill for FakeWorker {
    type RunStream = Answers<RunResponse>;

    async fn run(
        &self,
        request: Request<RunRequest>,
    ) -> Result<Response<Answers<RunResponse>>, Status> {
        self.0.held.lock().counts.prefills += 1;
        let fault = self.take(|faults| &mut faults.run).await?;
        let request = request.into_inner();
        let target = request
            .target
            .ok_or_else(|| Status::invalid_argument("no target"))?;
        if target.lease == 0 || target.incarnation.is_empty() {
            return Err(Status::invalid_argument("no lease to write to"));
        }
        let (sequence, (answer, _)) = self.check(request.sequence)?;
        let index = sequence.tokens.len() - sequence.prompt_tokens as usize;
        let Some(id) = answer.get(index).copied() else {
            return Err(Status::invalid_argument("the answer is over"));
        };
        let token = Self::token(&sequence, index as u32, id);
        let done = PrefillDone {
            transferred_bytes: 1,
            ..PrefillDone::default()
        };
        let events = [
            run_response::Event::Token(token),
            run_response::Event::Done(done),
        ];
        let messages = events
            .map(|event| RunResponse { event: Some(event) })
            .to_vec();
        Ok(Response::new(self.play(
            messages,
            fault,
            |counts| &mut counts.prefilling,
            0,
        )))
    }
}

#[tonic::async_trait]
impl decode_server::Decode for FakeWorker {
    type GenerateStream = Answers<DecodeResponse>;

    async fn reserve(
        &self,
        request: Request<ReserveRequest>,
    ) -> Result<Response<ReserveResponse>, Status> {
        let fault = self.take(|faults| &mut faults.reserve).await?;
        if matches!(fault, Fault::Hang(_)) {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        let total_blocks = request.into_inner().tokens.len().div_ceil(64) as u32;
        let mut held = self.0.held.lock();
        held.last_lease += 1;
        let lease = held.last_lease;
        held.leases.insert(lease);
        let incarnation = self.0.options.incarnation.clone();
        Ok(Response::new(ReserveResponse {
            lease,
            incarnation,
            cached_blocks: 0,
            total_blocks,
        }))
    }

    async fn release(
        &self,
        request: Request<ReleaseRequest>,
    ) -> Result<Response<ReleaseResponse>, Status> {
        let released = self
            .0
            .held
            .lock()
            .leases
            .remove(&request.into_inner().lease);
        Ok(Response::new(ReleaseResponse { released }))
    }

    async fn generate(
        &self,
        request: Request<DecodeRequest>,
    ) -> Result<Response<Answers<DecodeResponse>>, Status> {
        self.0.held.lock().counts.generations += 1;
        let fault = self.take(|faults| &mut faults.generate).await?;
        let request = request.into_inner();
        if request.incarnation != self.0.options.incarnation {
            return Err(Status::failed_precondition("meant for another life"));
        }
        if request.lease != 0 && !self.0.held.lock().leases.contains(&request.lease) {
            return Err(Status::not_found("no such lease"));
        }
        let (sequence, (answer, reason)) = self.check(request.sequence)?;
        let (prompt, produced) = sequence.tokens.split_at(sequence.prompt_tokens as usize);
        let mut events = Vec::with_capacity(answer.len() + 2);
        if request.lease != 0 {
            events.push(decode_response::Event::Committed(Committed::default()));
        }
        let rest = answer.iter().enumerate().skip(produced.len());
        events.extend(rest.map(|(index, id)| {
            decode_response::Event::Token(Self::token(&sequence, index as u32, *id))
        }));
        events.push(decode_response::Event::Finished(Finished {
            reason: reason.into(),
            prompt_tokens: prompt.len() as u32,
            cached_tokens: 0,
            completion_tokens: answer.len() as u32,
        }));
        let messages = events
            .into_iter()
            .map(|event| DecodeResponse { event: Some(event) });
        let messages = messages.collect();
        Ok(Response::new(self.play(
            messages,
            fault,
            |counts| &mut counts.generating,
            request.lease,
        )))
    }
}
