//! The DeepSeek-V3 network, once, over [`kernels::Backend`]: configuration, checkpoint, weights, forward pass.

pub mod checkpoint;
pub mod config;
pub mod rope;

pub use checkpoint::Checkpoint;
pub use config::Config;
