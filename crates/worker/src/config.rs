//! What a worker is told, validated.

use std::time::Duration;

use proto::v1;

/// Which part of a request's life a worker serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Prompts.
    Prefill,
    /// Generation, of sequences whose KV arrives or is computed here.
    Decode,
    /// Both, without a transfer.
    Combined,
}

impl Role {
    /// One lower-case word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Combined => "combined",
        }
    }

    /// Whether KV is pushed to it.
    pub fn receives(self) -> bool {
        self != Self::Prefill
    }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Prefill => Self::Prefill,
            Role::Decode => Self::Decode,
            Role::Combined => Self::Combined,
        }
    }
}

/// Who a worker is: one life of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The deployment it belongs to.
    pub deployment: String,
    /// Its part.
    pub role: Role,
    /// The unit (replica of the pool).
    pub unit: String,
    /// The rank within the unit.
    pub rank: u32,
    /// Differs for every life of the process.
    pub incarnation: String,
    /// Workers of different revisions never meet.
    pub revision: String,
}

/// A worker's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Who it is.
    pub identity: Identity,
    /// Name under which the model is served.
    pub model: String,
    /// Name of the precision it computes with.
    pub precision: String,
    /// Where peers reach `KvTransfer` ("host:port"). Unused where nothing is received.
    pub kv_address: String,
    /// How long a drain waits for what runs.
    pub drain: Duration,
}
