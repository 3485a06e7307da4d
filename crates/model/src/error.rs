//! What can go wrong between a checkpoint directory and logits.

use crate::checkpoint;

/// Why a network cannot be loaded or a step cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// The backend.
    #[error(transparent)]
    Kernel(#[from] kernels::Error),
    /// A step that breaks a rule of [`crate::step::Sequence`] or a limit.
    #[error("step: {0}")]
    Step(String),
    /// Limits that no step could keep.
    #[error("limits: {0}")]
    Limits(String),
}

/// Result of the network's calls.
pub type Result<T> = std::result::Result<T, Error>;
