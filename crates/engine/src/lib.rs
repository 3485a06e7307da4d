//! Batch scheduler, sampler and the thread that runs the network.

pub mod api;
