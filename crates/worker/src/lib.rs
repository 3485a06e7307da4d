//! What prefill and decode workers share: an engine behind gRPC.
//!
//! [`serve`] assembles the services over an [`Engine`](engine::api::Engine), a listener and a way to connect that all
//! come from outside, so that the same code runs over TCP and in a simulator. [`cli`] is the way from flags to a running
//! process.

pub mod cli;
mod config;
mod convert;
mod decode;
mod drain;
mod info;
mod load;
mod metrics;
mod prefill;
mod rpc;
mod serve;
mod shared;
mod start;
mod status;

pub use config::{Config, Identity, Role};
pub use drain::Ended;
pub use serve::{Error, Incoming, serve};
pub use shared::Outside;

#[cfg(test)]
mod tests;
