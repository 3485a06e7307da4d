//! The whole router over a network in memory, with fake workers behind it and a client in front. Time is paused: what
//! waits for a deadline waits no real time.

#![expect(clippy::unwrap_used, reason = "tests")]

mod answers;
mod client;
mod failures;
mod harness;
mod inference;
mod limits;
mod python;
