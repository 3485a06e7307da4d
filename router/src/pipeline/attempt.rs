//! What one attempt at a sequence holds at each of its stages, and how it fails. Dropping any of it cancels the attempt
//! at the workers.

use std::{future::Future, pin::Pin};

use openai::ApiError;
use proto::v1::{DecodeResponse, FinishReason, RunResponse};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::{
    lease::Lease,
    retry::{Reason, Verdict, judge},
};
use crate::fleet::Assignment;

/// A prefill worker computes the prompt.
pub(super) struct Prefill {
    pub(super) answers: Streaming<RunResponse>,
    pub(super) worker: Assignment,
    pub(super) decode: Assignment,
    pub(super) lease: Lease,
    pub(super) until: Instant,
}

/// A decode worker generates.
pub(super) struct Decode {
    pub(super) call: Call,
    pub(super) worker: Assignment,
    /// Set until the worker has committed it.
    pub(super) lease: Option<Lease>,
    /// The transfer that still runs: dropping it would cancel it.
    pub(super) transfer: Option<(Streaming<RunResponse>, Assignment)>,
    /// When its first token is due; none once that came.
    pub(super) first_until: Option<Instant>,
}

/// The first token was the last.
pub(super) struct Ending {
    pub(super) reason: FinishReason,
    pub(super) answers: Streaming<RunResponse>,
    pub(super) prefill: Assignment,
    /// Given back once the transfer into it is over.
    pub(super) _lease: Lease,
}

pub(super) type Starting =
    Pin<Box<dyn Future<Output = Result<Streaming<DecodeResponse>, Status>> + Send>>;

/// A call to a decode worker, which goes out when it is first awaited.
pub(super) enum Call {
    Starting(Starting),
    Running(Box<Streaming<DecodeResponse>>),
}

impl Call {
    pub(super) async fn message(&mut self) -> Result<Option<DecodeResponse>, Status> {
        loop {
            match self {
                Self::Starting(starting) => {
                    let stream = starting.as_mut().await?;
                    *self = Self::Running(Box::new(stream));
                }
                Self::Running(stream) => return stream.message().await,
            }
        }
    }
}

/// Metadata in which a prefill worker names what failed, if it was not itself.
const FAILED_PART: &str = "hadal-failed";

/// Why an attempt ended early.
pub(super) struct Failure {
    pub(super) verdict: Verdict,
    pub(super) detail: String,
    /// Incarnations to stay away from.
    pub(super) avoid: Vec<String>,
}

impl Failure {
    pub(super) fn of_call(status: &Status, assignments: &mut [&mut Assignment]) -> Self {
        Self::new(
            judge(status),
            format!("{:?}: {}", status.code(), status.message()),
            assignments,
        )
    }

    /// A prefill worker says when it is its target that failed.
    pub(super) fn of_prefill(
        status: &Status,
        prefill: &mut Assignment,
        decode: &mut Assignment,
    ) -> Self {
        let failed = status.metadata().get(FAILED_PART);
        if failed.is_some_and(|part| part == "transfer") {
            Self::of_call(status, &mut [decode])
        } else {
            Self::of_call(status, &mut [prefill])
        }
    }

    pub(super) fn protocol(detail: String, assignment: &mut Assignment) -> Self {
        Self::new(Verdict::Retry(Reason::Protocol), detail, &mut [assignment])
    }

    pub(super) fn slow(what: &str, assignment: &mut Assignment) -> Self {
        Self::new(
            Verdict::Retry(Reason::Slow),
            format!("no {what} in time"),
            &mut [assignment],
        )
    }

    /// The first assignment is the one that the failure speaks against.
    pub(super) fn new(
        verdict: Verdict,
        detail: String,
        assignments: &mut [&mut Assignment],
    ) -> Self {
        if let (Verdict::Retry(reason), Some(first)) = (&verdict, assignments.first_mut())
            && reason.is_blame()
        {
            first.fail();
        }
        let avoid = assignments
            .iter()
            .map(|a| a.worker().incarnation().to_string())
            .collect();
        Self {
            verdict,
            detail,
            avoid,
        }
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self {
            verdict: Verdict::Fatal(Box::new(error)),
            detail: String::new(),
            avoid: Vec::new(),
        }
    }
}

impl Decode {
    /// The worker has taken the lease over, or given a token, which says the same.
    pub(super) fn commit(&mut self) {
        self.first_until = None;
        if let Some(mut lease) = self.lease.take() {
            lease.set_used();
        }
    }
}
