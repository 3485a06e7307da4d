//! What a sequence sends to workers, and how long it waits for them.

use std::time::Duration;

use planted::Bug;
use proto::v1::{self, DecodeRequest, RequestKey};
use telemetry::trace::{REQUEST_ID, TRACEPARENT};
use tokio::time::Instant;
use tonic::Request;

use super::Sequence;
use crate::{
    fleet::Worker,
    pipeline::{attempt::Call, lease::Lease},
};

impl Sequence {
    /// Calls a decode worker; the call goes out when it is first awaited.
    pub(super) fn start_decode(&self, worker: &Worker, lease: Option<&Lease>) -> Call {
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

    pub(super) fn key(&self) -> RequestKey {
        RequestKey {
            request_id: self.spec.id.clone(),
            attempt: self.attempt,
        }
    }

    pub(super) fn sequence(&self) -> v1::Sequence {
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

    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut().as_mut();
        // No two requests share these: they have no place in the table of headers that a connection remembers.
        for (name, value) in [
            (REQUEST_ID, &self.spec.request_id),
            (TRACEPARENT, &self.spec.traceparent),
        ] {
            let mut value = value.clone();
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        request
    }

    /// How long a worker may take to a prompt's first token.
    pub(super) fn first_token_limit(&self, worker: &Worker) -> Duration {
        let timeouts = self.shared.config.timeouts;
        let tokens = u32::try_from(worker.pending_tokens()).unwrap_or(u32::MAX);
        timeouts.first_token + timeouts.prompt_token.saturating_mul(tokens)
    }

    /// `limit` from now, but not past the request's deadline.
    pub(super) fn bound(&self, limit: Duration) -> Instant {
        (Instant::now() + limit).min(self.spec.deadline)
    }
}

pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
