//! Batch scheduler, sampler and the thread that runs the network.
//!
//! [`api`] is what a worker asks of an engine.

pub mod api;
mod experts;

pub use experts::ExpertLoad;
