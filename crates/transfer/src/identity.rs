//! Who a transfer is between and what it carries: everything that a checksum binds beside the bytes.

use proto::v1;

use crate::{
    checksum,
    geometry::{Geometry, Plan},
};

/// One attempt at one request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The request.
    pub request: String,
    /// Raised each time the request starts over.
    pub attempt: u32,
}

impl From<v1::RequestKey> for Key {
    fn from(key: v1::RequestKey) -> Self {
        Self {
            request: key.request_id,
            attempt: key.attempt,
        }
    }
}

/// Everything both ends must agree on before a byte moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Whose KV it is.
    pub key: Key,
    /// The receiver's lease.
    pub lease: u64,
    /// Incarnation of the receiver.
    pub receiver: String,
    /// Incarnation of the sender.
    pub sender: String,
    /// What the bytes of a block mean.
    pub fingerprint: Vec<u8>,
    /// What is moved.
    pub plan: Plan,
}

impl Identity {
    /// What an opening message says, for a receiver whose blocks have the shape `geometry`. `None`: it contradicts
    /// itself, or names no request.
    pub fn from_open(open: v1::TransferOpen, geometry: &Geometry) -> Option<Self> {
        let geometry = Geometry {
            layers: open.layers,
            ..*geometry
        };
        let plan = Plan {
            geometry,
            first_block: open.first_block,
            total_tokens: open.total_tokens,
        };
        (open.total_blocks == plan.total_blocks()).then_some(())?;
        Some(Self {
            key: open.key?.into(),
            lease: open.lease,
            receiver: open.receiver,
            sender: open.sender,
            fingerprint: open.kv_fingerprint,
            plan,
        })
    }

    /// The message that opens a stream for this transfer.
    pub fn to_open(&self) -> v1::TransferOpen {
        v1::TransferOpen {
            key: Some(v1::RequestKey {
                request_id: self.key.request.clone(),
                attempt: self.key.attempt,
            }),
            lease: self.lease,
            receiver: self.receiver.clone(),
            sender: self.sender.clone(),
            kv_fingerprint: self.fingerprint.clone(),
            first_block: self.plan.first_block,
            total_blocks: self.plan.total_blocks(),
            total_tokens: self.plan.total_tokens,
            layers: self.plan.geometry.layers,
        }
    }

    /// A checksum over all of it: the start of every piece's checksum, so that a piece of another request, attempt,
    /// life, lease or format never fits.
    pub fn seed(&self) -> u64 {
        let mut sum = checksum::Sum::new();
        for text in [
            self.key.request.as_bytes(),
            self.receiver.as_bytes(),
            self.sender.as_bytes(),
            &self.fingerprint,
        ] {
            // With its length, so that no two different lists of fields give the same bytes.
            sum.update(&(text.len() as u64).to_le_bytes());
            sum.update(text);
        }
        let plan = &self.plan;
        sum.update(&self.lease.to_le_bytes());
        for number in [
            self.key.attempt,
            plan.first_block,
            plan.total_tokens,
            plan.geometry.layers,
            plan.geometry.block_tokens,
            plan.geometry.token_bytes,
        ] {
            sum.update(&number.to_le_bytes());
        }
        sum.finish()
    }
}
