//! Moving KV blocks from one worker's cache to another's.
//!
//! [`protocol`] is the hand-off as pure state machines. [`Receiver`] runs it over a cache and [`KvTransferServer`]
//! serves it; [`push()`] is the other end. Checksums are always on, over every byte and every header; any flaw fails
//! closed.

pub mod checksum;
mod dial;
mod geometry;
mod identity;
pub mod protocol;
mod push;
mod receive;
mod server;
mod status;
pub mod wire;

pub use dial::{Channels, Dial, tcp};
pub use geometry::{Geometry, Piece, Plan};
pub use identity::{Identity, Key};
pub use push::{Error as PushError, PIECE_BYTES, Report, Source, Sums, Transfer, push};
pub use receive::{
    Claim, Error as ReceiveError, MAX_PIECE_BYTES, Observer, Receiver, Reserved, Session, Settings,
};
pub use server::{FRAME_BYTES, KvTransferServer};

#[cfg(test)]
mod tests;
