//! The fast path: vectors, threads, weights dequantised in registers. Every output value's sum has one order, so that
//! neither the threads nor the instruction set nor the other rows of a step change a bit of it.

#![expect(
    clippy::inline_always,
    reason = "only what is inlined into a kernel's `run` is compiled for its instruction set"
)]

mod attention;
mod gate;
mod packed;
mod product;
mod round;
mod rows;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod tiles;

pub(super) use attention::{attend_absorbed, attend_expanded};
pub(super) use gate::gate;
pub(super) use packed::{CHUNK, Packed};
pub(super) use product::{Part, Row, products};
pub(super) use round::round;
pub(super) use rows::{add_norm, combine, norm, norm_row, quantise, quantise_row, rope, swiglu};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use tiles::tile_products;
