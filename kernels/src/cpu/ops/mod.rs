//! The trait's operations on the CPU: every argument is checked here, so that the loops only compute.

mod attention;
mod linear;
mod moe;
mod rows;

pub(super) use attention::{attend_absorbed, attend_expanded, cache_read, cache_write};
pub(super) use linear::{absorb_query, absorb_value, experts_down, experts_gate_up, matmul};
pub(super) use moe::{combine, dispatch, gate};
pub(super) use rows::{add_norm, argmax, concat, gather, norm, quantise, rope, scatter, swiglu};
