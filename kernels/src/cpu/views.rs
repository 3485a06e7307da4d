//! Checked slices of tensors: between the trait's shapes and the kernels' loops.

use std::cell::RefCell;

use bytemuck::Pod;

use super::memory::Memory;
use super::pool::Split;
use super::simd::Isa;
use super::{fast, reference};
use crate::backend::{Columns, Error, Output, Quantised, Result, ScaleFormat, Sequences};
use crate::fp8;
use crate::tensor::{DType, Tensor};

/// A shape error of `op`.
pub(super) fn shape<T>(op: &'static str, detail: impl Into<String>) -> Result<T> {
    Err(Error::Shape {
        op,
        detail: detail.into(),
    })
}

/// An error found in the data of `op`, which a GPU would report at synchronisation.
pub(super) fn device<T>(op: &'static str, detail: impl Into<String>) -> Result<T> {
    Err(Error::Device {
        op,
        detail: detail.into(),
    })
}

/// Fails with `detail` unless `ok`.
pub(super) fn ensure(ok: bool, op: &'static str, detail: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { shape(op, detail()) }
}

fn typed<T: Pod>(op: &'static str, t: &Tensor<Memory>, dtype: DType, rows: usize) -> Result<usize> {
    ensure(t.dtype == dtype, op, || {
        format!("expected {dtype:?}, got {:?}", t.dtype)
    })?;
    let len = rows * t.cols;
    ensure(
        rows <= t.rows && len * size_of::<T>() <= t.mem.bytes(),
        op,
        || format!("{rows} rows of a tensor of [{}, {}]", t.rows, t.cols),
    )?;
    Ok(len)
}

/// `rows` rows of float32.
pub(super) fn f32s<'a>(op: &'static str, t: &'a Tensor<Memory>, rows: usize) -> Result<&'a [f32]> {
    let len = typed::<f32>(op, t, DType::F32, rows)?;
    Ok(&t.mem.slice()[..len])
}

/// `rows` rows of float32 to write.
pub(super) fn f32s_mut<'a>(
    op: &'static str,
    t: &'a mut Tensor<Memory>,
    rows: usize,
) -> Result<&'a mut [f32]> {
    let len = typed::<f32>(op, t, DType::F32, rows)?;
    Ok(&mut t.mem.slice_mut()[..len])
}

/// The first `len` integers.
pub(super) fn i32s<'a>(op: &'static str, t: &'a Tensor<Memory>, len: usize) -> Result<&'a [i32]> {
    let have = typed::<i32>(op, t, DType::I32, t.rows)?;
    ensure(len <= have, op, || format!("{len} integers of {have}"))?;
    Ok(&t.mem.slice()[..len])
}

/// The first `len` integers to write.
pub(super) fn i32s_mut<'a>(
    op: &'static str,
    t: &'a mut Tensor<Memory>,
    len: usize,
) -> Result<&'a mut [i32]> {
    let have = typed::<i32>(op, t, DType::I32, t.rows)?;
    ensure(len <= have, op, || format!("{len} integers of {have}"))?;
    Ok(&mut t.mem.slice_mut()[..len])
}

/// Checks that every index is in `0..end`.
pub(super) fn within(op: &'static str, index: &[i32], end: usize) -> Result<()> {
    match index.iter().find(|i| **i < 0 || **i as usize >= end) {
        Some(i) => device(op, format!("index {i} of {end}")),
        None => Ok(()),
    }
}

/// Rows of float32 that may be columns of wider rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    first: usize,
    pub(super) cols: usize,
    pub(super) count: usize,
}

impl<'a> Rows<'a> {
    pub(super) fn new(data: &'a [f32], cols: usize) -> Self {
        Self {
            data,
            stride: cols,
            first: 0,
            cols,
            count: data.len() / cols.max(1),
        }
    }

    pub(super) fn of(op: &'static str, t: &'a Tensor<Memory>, rows: usize) -> Result<Self> {
        Ok(Self {
            count: rows,
            ..Self::new(f32s(op, t, rows)?, t.cols)
        })
    }

    pub(super) fn columns(op: &'static str, c: &Columns<'a, Memory>, rows: usize) -> Result<Self> {
        let all = Self::of(op, c.tensor, rows)?;
        ensure(
            c.first
                .checked_add(c.cols)
                .is_some_and(|end| end <= all.cols),
            op,
            || format!("columns {}..+{} of {}", c.first, c.cols, all.cols),
        )?;
        Ok(all.part(c.first, c.cols))
    }

    /// Some columns of these rows.
    pub(super) fn part(self, first: usize, cols: usize) -> Self {
        assert!(first + cols <= self.cols);
        Self {
            first: self.first + first,
            cols,
            ..self
        }
    }

    pub(super) fn row(&self, t: usize) -> &'a [f32] {
        let start = t * self.stride + self.first;
        &self.data[start..start + self.cols]
    }
}

/// Input of a product: rows as they are, or quantised 1x128.
#[derive(Clone, Copy, Debug)]
pub(super) enum Acts<'a> {
    Plain(Rows<'a>),
    Quantised {
        /// `[rows, cols]`
        data: &'a [u8],
        /// `[rows, ceil(cols / 128)]`
        scales: &'a [f32],
        cols: usize,
    },
}

impl<'a> Acts<'a> {
    /// Rows that an operation before quantised.
    pub(super) fn quantised(
        op: &'static str,
        x: &'a Quantised<Memory>,
        rows: usize,
    ) -> Result<Self> {
        let len = typed::<u8>(op, &x.data, DType::Fp8, rows)?;
        let cols = x.data.cols;
        ensure(x.scales.cols == cols.div_ceil(fp8::BLOCK), op, || {
            format!("{} scales for rows of {cols}", x.scales.cols)
        })?;
        Ok(Self::Quantised {
            data: &x.data.mem.slice()[..len],
            scales: f32s(op, &x.scales, rows)?,
            cols,
        })
    }

    pub(super) fn cols(&self) -> usize {
        match self {
            Self::Plain(rows) => rows.cols,
            Self::Quantised { cols, .. } => *cols,
        }
    }
}

/// Where an operation's rows go; rows may be put by several threads, each row by one.
pub(super) struct Sink<'a> {
    isa: Option<Isa>,
    cols: usize,
    plain: Option<Split<'a, f32>>,
    quantised: Option<(Split<'a, u8>, Split<'a, f32>, ScaleFormat)>,
}

impl<'a> Sink<'a> {
    pub(super) fn of(
        op: &'static str,
        out: Output<'a, Memory>,
        cols: usize,
        rows: usize,
        isa: Option<Isa>,
    ) -> Result<Self> {
        let mut sink = Self {
            isa,
            cols,
            plain: None,
            quantised: None,
        };
        if let Some(t) = out.plain {
            ensure(t.cols == cols, op, || {
                format!("output of {} columns for {cols}", t.cols)
            })?;
            sink.plain = Some(Split::new(f32s_mut(op, t, rows)?));
        }
        if let Some((q, format)) = out.quantised {
            let blocks = cols.div_ceil(fp8::BLOCK);
            ensure(q.data.cols == cols && q.scales.cols == blocks, op, || {
                format!(
                    "quantised output of {} columns and {} scales for {cols}",
                    q.data.cols, q.scales.cols
                )
            })?;
            let len = typed::<u8>(op, &q.data, DType::Fp8, rows)?;
            sink.quantised = Some((
                Split::new(&mut q.data.mem.slice_mut()[..len]),
                Split::new(f32s_mut(op, &mut q.scales, rows)?),
                format,
            ));
        }
        Ok(sink)
    }

    /// Stores row `t`.
    ///
    /// # Safety
    /// No two threads put the same row at once.
    pub(super) unsafe fn put(&self, t: usize, row: &[f32]) {
        assert_eq!(row.len(), self.cols);
        if let Some(plain) = &self.plain {
            // SAFETY: row `t` is this caller's by contract.
            unsafe { plain.part(t * self.cols, self.cols) }.copy_from_slice(row);
        }
        // SAFETY: row `t` is this caller's by contract.
        unsafe { self.quantise(t, row) };
    }

    /// Stores row `t` as `write` fills it.
    ///
    /// # Safety
    /// No two threads fill the same row at once.
    pub(super) unsafe fn fill(&self, t: usize, write: impl FnOnce(&mut [f32])) {
        thread_local! {
            /// A row that is only kept quantised.
            static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        if let Some(plain) = &self.plain {
            // SAFETY: row `t` is this caller's by contract.
            let row = unsafe { plain.part(t * self.cols, self.cols) };
            write(row);
            // SAFETY: as above.
            unsafe { self.quantise(t, row) };
        } else {
            ROW.with_borrow_mut(|row| {
                row.resize(self.cols, 0.0);
                write(row);
                // SAFETY: row `t` is this caller's by contract.
                unsafe { self.quantise(t, row) };
            });
        }
    }

    /// Stores row `t` quantised, if asked for.
    ///
    /// # Safety
    /// No two threads quantise the same row at once.
    unsafe fn quantise(&self, t: usize, row: &[f32]) {
        let Some((data, scales, format)) = &self.quantised else {
            return;
        };
        let blocks = self.cols.div_ceil(fp8::BLOCK);
        // SAFETY: row `t` is this caller's by contract.
        let (data, scales) = unsafe {
            (
                data.part(t * self.cols, self.cols),
                scales.part(t * blocks, blocks),
            )
        };
        match self.isa {
            None => reference::quantise_row(row, *format, data, scales),
            Some(isa) => fast::quantise_row(isa, row, *format, data, scales),
        }
    }
}

/// Checked sequences: every query token has a place in its context, every block of a context is in the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seqs<'a> {
    query_start: &'a [i32],
    context_len: &'a [i32],
    block_table: &'a [i32],
    max_blocks: usize,
    pub(super) count: usize,
}

impl<'a> Seqs<'a> {
    pub(super) fn of(
        op: &'static str,
        seqs: &'a Sequences<Memory>,
        rows: usize,
        blocks: usize,
        block_tokens: usize,
    ) -> Result<Self> {
        let count = seqs.count;
        let max_blocks = seqs.block_table.cols;
        let this = Self {
            query_start: i32s(op, &seqs.query_start, count + 1)?,
            context_len: i32s(op, &seqs.context_len, count)?,
            block_table: i32s(op, &seqs.block_table, count * max_blocks)?,
            max_blocks,
            count,
        };
        let mut end = 0;
        for (s, start) in this.query_start.iter().enumerate() {
            if *start < end || *start as usize > rows {
                return device(op, format!("query_start[{s}] = {start} of {rows} rows"));
            }
            end = *start;
        }
        for s in 0..count {
            let (queries, context) = (this.queries(s).len(), this.context_len[s]);
            if context < queries as i32 || context as usize > max_blocks * block_tokens {
                return device(
                    op,
                    format!(
                        "sequence {s}: {queries} queries, {context} tokens, {max_blocks} blocks"
                    ),
                );
            }
            let used = (context as usize).div_ceil(block_tokens);
            for block in &this.block_table[s * max_blocks..][..used] {
                if *block < 0 || *block as usize >= blocks {
                    return device(op, format!("sequence {s}: block {block} of {blocks}"));
                }
            }
        }
        Ok(this)
    }

    /// Rows of sequence `s`.
    pub(super) fn queries(&self, s: usize) -> std::ops::Range<usize> {
        self.query_start[s] as usize..self.query_start[s + 1] as usize
    }

    /// Tokens in the cache of sequence `s`.
    pub(super) fn context(&self, s: usize) -> usize {
        self.context_len[s] as usize
    }

    /// Tokens that row `t` of sequence `s` attends to: its own and all before.
    pub(super) fn visible(&self, s: usize, t: usize) -> usize {
        self.context(s) - (self.queries(s).end - 1 - t)
    }

    /// Block `i` of sequence `s`.
    pub(super) fn block(&self, s: usize, i: usize) -> usize {
        self.block_table[s * self.max_blocks + i] as usize
    }
}
