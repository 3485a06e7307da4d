//! Products: arguments checked, grouped by weights, then the reference or the fast path.

use std::mem;

use crate::backend::{Dispatch, Input, Result};
use crate::cpu::memory::Memory;
use crate::cpu::multiply::{Group, Weights, multiply};
use crate::cpu::views::{Acts, Rows, device, ensure, f32s, f32s_mut, i32s, within};
use crate::cpu::{Expert, Experts, Heads, Linear, Stream, fast, reference};
use crate::tensor::Tensor;

/// [`crate::Backend::matmul`].
pub(in crate::cpu) fn matmul(
    stream: &mut Stream,
    x: &Input<'_, Memory>,
    weight: &Linear,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "matmul";
    let Linear(weight) = weight;
    let stride = out.cols;
    let out = f32s_mut(op, out, rows)?;
    with_input(op, stream, x, rows, |stream, x| {
        fits(op, weight, x.cols(), stride)?;
        let group = Group {
            weight,
            rows: 0..rows,
            x_first: 0,
            out_first: 0,
        };
        // SAFETY: one group.
        unsafe { multiply(op, stream, x, &|t| t, &[group], out, stride) }
    })
}

/// [`crate::Backend::absorb_query`].
pub(in crate::cpu) fn absorb_query(
    stream: &mut Stream,
    q: &Tensor<Memory>,
    w_uk: &Heads,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "absorb_query";
    let (heads, latent, nope) = (w_uk.matrices.len(), w_uk.out, w_uk.inp);
    let width = out.cols / heads;
    let (q, per_head) = (Rows::of(op, q, rows)?, q.cols / heads);
    let rope = width.saturating_sub(latent);
    ensure(
        out.cols == heads * (latent + rope) && q.cols == heads * (nope + rope),
        op,
        || {
            format!(
                "{} to {} columns by {heads} of [{latent}, {nope}]",
                q.cols, out.cols
            )
        },
    )?;
    let stride = out.cols;
    let out = f32s_mut(op, out, rows)?;
    for t in 0..rows {
        let heads = q.row(t).chunks_exact(per_head);
        for (h, head) in heads.enumerate() {
            let to = t * stride + h * width + latent;
            out[to..][..rope].copy_from_slice(&head[nope..]);
        }
    }
    let groups = per_head_groups(w_uk, rows, per_head, width);
    // SAFETY: heads write columns of their own.
    unsafe { multiply(op, stream, Acts::Plain(q), &|t| t, &groups, out, stride) }
}

/// [`crate::Backend::absorb_value`].
pub(in crate::cpu) fn absorb_value(
    stream: &mut Stream,
    x: &Tensor<Memory>,
    w_uv: &Heads,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "absorb_value";
    let (heads, value, latent) = (w_uv.matrices.len(), w_uv.out, w_uv.inp);
    ensure(
        x.cols == heads * latent && out.cols == heads * value,
        op,
        || {
            format!(
                "{} to {} columns by {heads} of [{value}, {latent}]",
                x.cols, out.cols
            )
        },
    )?;
    let (x, stride) = (Rows::of(op, x, rows)?, out.cols);
    let out = f32s_mut(op, out, rows)?;
    let groups = per_head_groups(w_uv, rows, latent, value);
    // SAFETY: heads write columns of their own.
    unsafe { multiply(op, stream, Acts::Plain(x), &|t| t, &groups, out, stride) }
}

/// [`crate::Backend::experts_gate_up`].
pub(in crate::cpu) fn experts_gate_up(
    stream: &mut Stream,
    x: &Input<'_, Memory>,
    experts: &Experts,
    dispatch: &Dispatch<Memory>,
    copies: usize,
    top_k: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "experts_gate_up";
    ensure(top_k > 0 && copies.is_multiple_of(top_k), op, || {
        format!("{copies} copies of top {top_k}")
    })?;
    let copy_of_row = i32s(op, &dispatch.copy_of_row, copies)?;
    within(op, copy_of_row, copies)?;
    let token = |row: usize| copy_of_row[row] as usize / top_k;
    let stride = out.cols;
    let out = f32s_mut(op, out, copies)?;
    with_input(op, stream, x, copies / top_k, |stream, x| {
        let shape = (x.cols(), stride);
        let groups = slot_groups(op, experts, |e| &e.gate_up, dispatch, copies, shape)?;
        // SAFETY: slots have rows of their own.
        unsafe { multiply(op, stream, x, &token, &groups, out, stride) }
    })
}

/// [`crate::Backend::experts_down`].
pub(in crate::cpu) fn experts_down(
    stream: &mut Stream,
    x: &Input<'_, Memory>,
    experts: &Experts,
    dispatch: &Dispatch<Memory>,
    copies: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "experts_down";
    let stride = out.cols;
    let out = f32s_mut(op, out, copies)?;
    with_input(op, stream, x, copies, |stream, x| {
        let shape = (x.cols(), stride);
        let groups = slot_groups(op, experts, |e| &e.down, dispatch, copies, shape)?;
        // SAFETY: slots have rows of their own.
        unsafe { multiply(op, stream, x, &|row| row, &groups, out, stride) }
    })
}

/// Checks a product's inputs and gives it them as it reads them.
fn with_input(
    op: &'static str,
    stream: &mut Stream,
    x: &Input<'_, Memory>,
    rows: usize,
    product: impl FnOnce(&mut Stream, Acts<'_>) -> Result<()>,
) -> Result<()> {
    match x {
        Input::Plain(x) => product(stream, Acts::Plain(Rows::of(op, x, rows)?)),
        Input::Quantised(x) => product(stream, Acts::quantised(op, x, rows)?),
        Input::Rounded(x) => {
            let values = f32s(op, x, rows)?;
            let mut rounded = mem::take(&mut stream.rounded);
            rounded.resize(values.len(), 0.0);
            match stream.isa {
                None => reference::round(values, &mut rounded),
                Some(isa) => fast::round(&mut stream.pool, isa, values, &mut rounded),
            }
            let result = product(stream, Acts::Plain(Rows::new(&rounded, x.cols)));
            stream.rounded = rounded;
            result
        }
    }
}

/// Checks a product's inputs and outputs.
fn fits(op: &'static str, weight: &Weights, inputs: usize, outputs: usize) -> Result<()> {
    ensure(
        weight.cols() == inputs && weight.rows() == outputs,
        op,
        || {
            format!(
                "{inputs} to {outputs} columns by [{}, {}]",
                weight.rows(),
                weight.cols()
            )
        },
    )
}

/// One product per head: inputs from column `h * x_width` on, outputs from `h * out_width` on.
fn per_head_groups(heads: &Heads, rows: usize, x_width: usize, out_width: usize) -> Vec<Group<'_>> {
    let group = |(h, weight)| Group {
        weight,
        rows: 0..rows,
        x_first: h * x_width,
        out_first: h * out_width,
    };
    heads.matrices.iter().enumerate().map(group).collect()
}

/// One product per slot that has rows, of the matrix that `pick` takes, checked to be of `shape` (inputs, outputs).
fn slot_groups<'a>(
    op: &'static str,
    experts: &'a Experts,
    pick: impl Fn(&Expert) -> &Weights,
    dispatch: &Dispatch<Memory>,
    copies: usize,
    shape: (usize, usize),
) -> Result<Vec<Group<'a>>> {
    let offsets = i32s(op, &dispatch.offsets, experts.slots.len() + 1)?;
    let mut groups = Vec::new();
    for (slot, expert) in experts.slots.iter().enumerate() {
        let (start, end) = (offsets[slot], offsets[slot + 1]);
        if start < 0 || end < start || end as usize > copies {
            return device(
                op,
                format!("slot {slot} has rows {start}..{end} of {copies}"),
            );
        }
        if start == end {
            continue;
        }
        let Some(expert) = expert else {
            return device(op, format!("slot {slot} is empty"));
        };
        let weight = pick(expert);
        fits(op, weight, shape.0, shape.1)?;
        groups.push(Group {
            weight,
            rows: start as usize..end as usize,
            x_first: 0,
            out_first: 0,
        });
    }
    Ok(groups)
}
