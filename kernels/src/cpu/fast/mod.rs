//! The fast path: vectors, threads, weights dequantised in registers. Every output value's sum has one order, so that
//! neither the threads nor the instruction set nor the other rows of a step change a bit of it.

#![expect(
    clippy::inline_always,
    reason = "only what is inlined into a kernel's `run` is compiled for its instruction set"
)]

mod packed;
mod product;

pub(super) use packed::{CHUNK, Packed};
pub(super) use product::{Part, Row, products};
