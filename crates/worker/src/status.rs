//! The engine's errors as gRPC statuses: the one place that maps them.

use engine::api::{Error, Refused};
use tonic::{Code, Status, metadata::MetadataValue};
use transfer::PushError;

/// Names the part that failed where it is not the worker itself.
const FAILED_KEY: &str = "hadal-failed";

pub(crate) fn refused(refused: &Refused) -> Status {
    let code = match refused {
        Refused::QueueFull { .. } => Code::ResourceExhausted,
        Refused::Draining | Refused::Broken(_) => Code::Unavailable,
        Refused::Invalid(_) => Code::InvalidArgument,
    };
    Status::new(code, refused.to_string())
}

pub(crate) fn failed(error: &Error) -> Status {
    let code = match error {
        Error::Deadline => Code::DeadlineExceeded,
        Error::Draining => Code::Unavailable,
        Error::OutOfBlocks { .. } => Code::ResourceExhausted,
        Error::Network(_) => Code::Internal,
    };
    Status::new(code, error.to_string())
}

/// The push to the receiver failed: the prefill worker itself is well.
pub(crate) fn push(error: &PushError) -> Status {
    let code = match error {
        PushError::Peer { status, .. } => status.code(),
        PushError::Deadline { .. } => Code::DeadlineExceeded,
        PushError::Cancelled => Code::Cancelled,
        PushError::Memory(_) => Code::Internal,
    };
    let mut status = Status::new(code, error.to_string());
    status
        .metadata_mut()
        .insert(FAILED_KEY, MetadataValue::from_static("transfer"));
    status
}

pub(crate) fn draining() -> Status {
    Status::unavailable("the worker is draining")
}

pub(crate) fn gone() -> Status {
    Status::internal("the engine stopped")
}
