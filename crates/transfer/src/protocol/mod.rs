//! The hand-off as state machines: no I/O, no clock, no randomness. Time comes in as an argument.
//!
//! ```text
//! receiver:  reserve -> open -> pieces -> seal (verified) -> commit
//!               \________\________\_________\-> abort -> (the writer stops) -> free
//! sender:    connect -> open -> (have) -> pieces as layers fill -> seal -> done
//!               ^_______________________________________/ broken: again after a pause
//! ```
//!
//! What always holds (the tests enumerate it): nothing is used before it is whole and verified; nothing is freed while
//! somebody writes it; each reservation ends in exactly one commit or abort; what an older stream, attempt or life
//! sends is refused.
//!
//! [`Lease`] is one reservation, [`Leases`] all of a receiver, [`Sending`] the other end.

mod lease;
mod leases;
mod sending;

pub use lease::{Lease, Phase, Refusal, Ticket};
pub use leases::{Ended, Leases};
pub use sending::{Next, Retry, Sending, Watermarks};

#[cfg(test)]
mod tests;
