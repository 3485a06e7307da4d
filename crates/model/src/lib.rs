//! The DeepSeek-V3 network, once, over [`kernels::Backend`]: configuration, checkpoint, weights, forward pass.
//!
//! [`Checkpoint`] opens and checks a released-format directory; [`Network`] loads it into a backend and computes steps.

pub mod checkpoint;
pub mod config;
mod error;
mod layer;
mod mtp;
mod network;
pub mod rope;
mod scratch;
pub mod step;
mod weights;

pub use checkpoint::Checkpoint;
pub use config::Config;
pub use error::{Error, Result};
pub use network::{LayerDone, Network};
pub use scratch::Scratch;
pub use step::{EXPANDED_FROM, Form, Limits, Pending, Sequence, State};
pub use weights::Progress;
