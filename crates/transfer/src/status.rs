//! Refusals as gRPC statuses: the one place that maps them.

use tonic::{Code, Status};

use crate::{
    protocol::{Ended, Refusal},
    receive::Error,
};

impl Refusal {
    /// The status code a peer sees.
    pub fn code(self) -> Code {
        match self {
            Self::Unknown => Code::NotFound,
            Self::Ended(ended) => match ended {
                Ended::Released | Ended::Expired => Code::NotFound,
                Ended::Superseded => Code::Aborted,
                Ended::Corrupt => Code::DataLoss,
                Ended::Draining => Code::Unavailable,
            },
            Self::Committed | Self::Claimed => Code::AlreadyExists,
            Self::WrongReceiver | Self::WrongFormat | Self::OtherSender | Self::NotSealed => {
                Code::FailedPrecondition
            }
            Self::WrongRequest | Self::WrongPlan | Self::Outside | Self::Repeated => {
                Code::InvalidArgument
            }
            Self::Superseded | Self::StaleStream => Code::Aborted,
            Self::Busy => Code::Unavailable,
            Self::Corrupt | Self::Incomplete | Self::SealMismatch => Code::DataLoss,
            Self::TooMany => Code::ResourceExhausted,
        }
    }

    /// Short name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown_lease",
            Self::Ended(ended) => ended.as_str(),
            Self::Committed => "committed",
            Self::Claimed => "claimed",
            Self::WrongReceiver => "wrong_receiver",
            Self::WrongFormat => "wrong_format",
            Self::WrongRequest => "wrong_request",
            Self::WrongPlan => "wrong_plan",
            Self::OtherSender => "other_sender",
            Self::Superseded => "superseded",
            Self::StaleStream => "stale_stream",
            Self::Busy => "busy",
            Self::Outside => "outside",
            Self::Repeated => "repeated",
            Self::Corrupt => "corrupt",
            Self::Incomplete => "incomplete",
            Self::SealMismatch => "seal_mismatch",
            Self::NotSealed => "not_sealed",
            Self::TooMany => "too_many",
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.code(), refusal.to_string())
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused(refusal) => refusal.into(),
            Error::Memory(error) => Self::internal(error.to_string()),
        }
    }
}
