//! Routing: arguments checked, then the reference or the fast path.

use crate::backend::{Dispatch, GateShape, Result, Routing};
use crate::cpu::memory::Memory;
use crate::cpu::views::{Rows, ensure, f32s, f32s_mut, i32s, i32s_mut, within};
use crate::cpu::{Stream, fast, reference};
use crate::tensor::Tensor;

/// [`crate::Backend::gate`].
pub(in crate::cpu) fn gate(
    stream: &mut Stream,
    x: &Tensor<Memory>,
    weight: &Tensor<Memory>,
    bias: &Tensor<Memory>,
    shape: &GateShape,
    rows: usize,
    out: &mut Routing<Memory>,
    counts: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "gate";
    let (n, k) = (shape.experts, shape.top_k);
    ensure(
        shape.groups > 0
            && n.is_multiple_of(shape.groups)
            && (1..=shape.groups).contains(&shape.top_groups)
            && (1..=n / shape.groups * shape.top_groups).contains(&k),
        op,
        || format!("impossible {shape:?}"),
    )?;
    ensure(
        weight.rows >= n && weight.cols == x.cols && out.experts.cols == k && out.weights.cols == k,
        op,
        || {
            format!(
                "x of {}, weight [{}, {}], top {k} into {} and {}",
                x.cols, weight.rows, weight.cols, out.experts.cols, out.weights.cols
            )
        },
    )?;
    let bias_rows = bias.rows;
    let bias = f32s(op, bias, bias_rows)?;
    ensure(bias.len() >= n, op, || {
        format!("{} biases for {n} experts", bias.len())
    })?;
    let (x, weight, bias) = (Rows::of(op, x, rows)?, f32s(op, weight, n)?, &bias[..n]);
    let experts = i32s_mut(op, &mut out.experts, rows * k)?;
    let weights = f32s_mut(op, &mut out.weights, rows)?;
    let counts = i32s_mut(op, counts, n)?;
    match stream.isa {
        None => reference::gate(x, weight, bias, shape, experts, weights, counts),
        Some(isa) => fast::gate(
            &mut stream.pool,
            isa,
            x,
            weight,
            bias,
            shape,
            experts,
            weights,
            counts,
        ),
    }
    Ok(())
}

/// [`crate::Backend::dispatch`].
pub(in crate::cpu) fn dispatch(
    routing: &Routing<Memory>,
    slot_of_expert: &Tensor<Memory>,
    rows: usize,
    slots: usize,
    out: &mut Dispatch<Memory>,
) -> Result<()> {
    let op = "dispatch";
    let (top_k, width) = (routing.experts.cols, slot_of_expert.cols);
    ensure(top_k > 0 && width > 1, op, || {
        format!("top {top_k}, {width} columns of slots")
    })?;
    let copies = rows * top_k;
    reference::dispatch(
        i32s(op, &routing.experts, copies)?,
        top_k,
        i32s(op, slot_of_expert, slot_of_expert.rows * width)?,
        width,
        i32s_mut(op, &mut out.offsets, slots + 1)?,
        i32s_mut(op, &mut out.copy_of_row, copies)?,
        i32s_mut(op, &mut out.row_of_copy, copies)?,
    )
}

/// [`crate::Backend::combine`].
pub(in crate::cpu) fn combine(
    stream: &mut Stream,
    y: &Tensor<Memory>,
    routing: &Routing<Memory>,
    dispatch: &Dispatch<Memory>,
    shared: Option<&Tensor<Memory>>,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "combine";
    let top_k = routing.weights.cols;
    let copies = rows * top_k;
    let shared = shared.map(|s| Rows::of(op, s, rows)).transpose()?;
    let widths = [out.cols, shared.map_or(out.cols, |s| s.cols)];
    ensure(widths == [y.cols, y.cols], op, || {
        format!("y of {}, output and shared of {widths:?}", y.cols)
    })?;
    let row_of_copy = i32s(op, &dispatch.row_of_copy, copies)?;
    within(op, row_of_copy, copies)?;
    let y = Rows::of(op, y, copies)?;
    let weights = f32s(op, &routing.weights, rows)?;
    let out = f32s_mut(op, out, rows)?;
    match stream.isa {
        None => reference::combine(y, weights, row_of_copy, top_k, shared, out),
        Some(isa) => {
            let pool = &mut stream.pool;
            fast::combine(pool, isa, y, weights, row_of_copy, top_k, shared, out);
        }
    }
    Ok(())
}
