//! Batch scheduler, sampler and the thread that runs the network.
//!
//! [`api`] is what a worker asks of an engine; [`start`] runs one over any [`Runner`], on a thread of its own, and
//! [`driver`] leaves it to the caller where it runs. Inside, `core` makes one step after the other out of pure decisions
//! (`schedule`, `sampler`) and the network's answers.

mod admission;
pub mod api;
mod compute;
mod core;
pub mod cpu;
pub mod driver;
mod experts;
pub mod memory;
pub mod network;
pub mod runner;
mod sampler;
mod schedule;
mod sequence;
mod thread;

pub use admission::validate;
pub use driver::Options;
pub use experts::ExpertLoad;
pub use runner::Runner;
pub use thread::{StartError, start};
