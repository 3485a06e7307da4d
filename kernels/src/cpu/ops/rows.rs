//! Operations on single rows: arguments checked, then the reference or the fast path.

use crate::backend::{Columns, Output, Quantised, Result, ScaleFormat};
use crate::cpu::memory::Memory;
use crate::cpu::views::{Rows, Sink, ensure, f32s, f32s_mut, i32s, i32s_mut, within};
use crate::cpu::{Stream, fast, reference};
use crate::tensor::Tensor;

/// [`crate::Backend::add_norm`].
pub(in crate::cpu) fn add_norm(
    stream: &mut Stream,
    residual: &mut Tensor<Memory>,
    delta: Option<&Tensor<Memory>>,
    weight: &Tensor<Memory>,
    eps: f32,
    rows: usize,
    out: Output<'_, Memory>,
) -> Result<()> {
    let op = "add_norm";
    let hidden = residual.cols;
    let delta = delta.map(|d| Rows::of(op, d, rows)).transpose()?;
    let widths = [weight.cols, delta.map_or(hidden, |d| d.cols)];
    ensure(widths == [hidden, hidden], op, || {
        format!("residual of {hidden}, weight and delta of {widths:?}")
    })?;
    let out = Sink::of(op, out, hidden, rows, stream.isa)?;
    let residual = f32s_mut(op, residual, rows)?;
    let weight = f32s(op, weight, 1)?;
    match stream.isa {
        None => reference::add_norm(residual, delta, weight, eps, rows, &out),
        Some(isa) => {
            fast::add_norm(
                &mut stream.pool,
                isa,
                residual,
                delta,
                weight,
                eps,
                rows,
                &out,
            );
        }
    }
    Ok(())
}

/// [`crate::Backend::norm`].
pub(in crate::cpu) fn norm(
    stream: &mut Stream,
    x: &Columns<'_, Memory>,
    weight: &Tensor<Memory>,
    eps: f32,
    rows: usize,
    out: Output<'_, Memory>,
) -> Result<()> {
    let op = "norm";
    let x = Rows::columns(op, x, rows)?;
    ensure(weight.cols == x.cols, op, || {
        format!("{} columns, weight of {}", x.cols, weight.cols)
    })?;
    let out = Sink::of(op, out, x.cols, rows, stream.isa)?;
    let weight = f32s(op, weight, 1)?;
    match stream.isa {
        None => reference::norm(x, weight, eps, rows, &out),
        Some(isa) => fast::norm(&mut stream.pool, isa, x, weight, eps, rows, &out),
    }
    Ok(())
}

/// [`crate::Backend::quantise`].
pub(in crate::cpu) fn quantise(
    stream: &mut Stream,
    x: &Tensor<Memory>,
    rows: usize,
    scale: ScaleFormat,
    out: &mut Quantised<Memory>,
) -> Result<()> {
    let x = Rows::of("quantise", x, rows)?;
    let out = Output {
        plain: None,
        quantised: Some((out, scale)),
    };
    let out = Sink::of("quantise", out, x.cols, rows, stream.isa)?;
    match stream.isa {
        None => reference::quantise(x, rows, &out),
        Some(_) => fast::quantise(&mut stream.pool, x, rows, &out),
    }
    Ok(())
}

/// [`crate::Backend::swiglu`].
pub(in crate::cpu) fn swiglu(
    stream: &mut Stream,
    gate_up: &Tensor<Memory>,
    rows: usize,
    out: Output<'_, Memory>,
) -> Result<()> {
    let op = "swiglu";
    let gate_up = Rows::of(op, gate_up, rows)?;
    ensure(gate_up.cols.is_multiple_of(2), op, || {
        format!("{} columns are no gate and up", gate_up.cols)
    })?;
    let out = Sink::of(op, out, gate_up.cols / 2, rows, stream.isa)?;
    match stream.isa {
        None => reference::swiglu(gate_up, rows, &out),
        Some(isa) => fast::swiglu(&mut stream.pool, isa, gate_up, rows, &out),
    }
    Ok(())
}

/// [`crate::Backend::gather`].
pub(in crate::cpu) fn gather(
    x: &Tensor<Memory>,
    index: &Tensor<Memory>,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "gather";
    let index = i32s(op, index, rows)?;
    within(op, index, x.rows)?;
    same_width(op, x, out)?;
    let pairs = index
        .iter()
        .enumerate()
        .map(|(i, from)| (*from as usize, i));
    reference::copy_rows(
        f32s(op, x, x.rows)?,
        f32s_mut(op, out, rows)?,
        x.cols,
        pairs,
    );
    Ok(())
}

/// [`crate::Backend::scatter`].
pub(in crate::cpu) fn scatter(
    x: &Tensor<Memory>,
    index: &Tensor<Memory>,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "scatter";
    let index = i32s(op, index, rows)?;
    within(op, index, out.rows)?;
    same_width(op, x, out)?;
    let (all, cols) = (out.rows, out.cols);
    let pairs = index.iter().enumerate().map(|(i, to)| (i, *to as usize));
    reference::copy_rows(f32s(op, x, rows)?, f32s_mut(op, out, all)?, cols, pairs);
    Ok(())
}

/// [`crate::Backend::concat`].
pub(in crate::cpu) fn concat(
    a: &Tensor<Memory>,
    b: &Tensor<Memory>,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "concat";
    ensure(out.cols == a.cols + b.cols, op, || {
        format!("{} + {} columns into {}", a.cols, b.cols, out.cols)
    })?;
    let (a, b) = (Rows::of(op, a, rows)?, Rows::of(op, b, rows)?);
    reference::concat(a, b, rows, f32s_mut(op, out, rows)?);
    Ok(())
}

/// [`crate::Backend::rope`].
pub(in crate::cpu) fn rope(
    stream: &mut Stream,
    q: &mut Tensor<Memory>,
    heads: usize,
    nope: usize,
    rope: usize,
    table: &Tensor<Memory>,
    positions: &Tensor<Memory>,
    rows: usize,
) -> Result<()> {
    let op = "rope";
    ensure(
        q.cols == heads * (nope + rope)
            && table.cols == rope
            && rope.is_multiple_of(2)
            && heads > 0,
        op,
        || {
            format!(
                "rows of {} for {heads} heads of {nope} + {rope}, table of {}",
                q.cols, table.cols
            )
        },
    )?;
    let positions = i32s(op, positions, rows)?;
    within(op, positions, table.rows)?;
    let table = f32s(op, table, table.rows)?;
    let q = f32s_mut(op, q, rows)?;
    match stream.isa {
        None => reference::rope(q, heads, nope, rope, table, positions),
        Some(_) => fast::rope(&mut stream.pool, q, heads, nope, rope, table, positions),
    }
    Ok(())
}

/// [`crate::Backend::argmax`].
pub(in crate::cpu) fn argmax(
    logits: &Tensor<Memory>,
    rows: usize,
    out: &mut Tensor<Memory>,
) -> Result<()> {
    let op = "argmax";
    ensure(logits.cols > 0, op, || "rows of nothing".into())?;
    reference::argmax(Rows::of(op, logits, rows)?, i32s_mut(op, out, rows)?);
    Ok(())
}

fn same_width(op: &'static str, a: &Tensor<Memory>, b: &Tensor<Memory>) -> Result<()> {
    ensure(a.cols == b.cols, op, || {
        format!("{} and {} columns", a.cols, b.cols)
    })
}
