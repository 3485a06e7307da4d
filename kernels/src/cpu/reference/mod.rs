//! Every operation as plain loops with float32 sums: the oracle that the fast path, and a GPU, are compared with.
//! Read these first; they are never made faster.

mod attention;
mod linear;
mod moe;
mod rows;

pub(super) use attention::{attend_absorbed, attend_expanded, cache_read, cache_write};
pub(super) use linear::{matmul, round};
#[cfg(test)]
pub(super) use moe::choose;
pub(super) use moe::{combine, dispatch, gate};
pub(super) use rows::{
    add_norm, argmax, concat, copy_rows, norm, norm_row, quantise, quantise_row, rope, swiglu,
};
