//! The engine over a toy network that checks its KV, and over a small random DeepSeek: driven step by step, so every test
//! is deterministic.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    unreachable_pub,
    reason = "helpers of tests"
)]

mod cancel;
mod network;
mod phases;
mod rig;
mod sampling;
mod scheduling;
