//! The wire contracts of Hadal (`hadal.v1`) and their generated tonic code. Conversions to a crate's own types live
//! in that crate, at its edge.

mod codec;

pub use codec::Codec;

/// Messages, clients and servers of package `hadal.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("hadal.v1");
}

/// The encoded file descriptor set, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hadal.v1.bin"));
