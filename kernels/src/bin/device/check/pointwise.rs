//! Norms, activations, quantising, rotary embedding, cache writes and row moves.

use cudarc::driver::CudaSlice;
use kernels::cases::cache::{CacheWrite, Rope, table as rotary_table};
use kernels::cases::rows::{AddNorm, EPS, Normed, Quantise, Rows, Swiglu};
use kernels::cases::{Error, Random, floats};
use kernels::cuda::pointwise::{self, CacheInputs, HeadColumns, Output, Quantised, ScaleFormat};
use kernels::cuda::probe::Kind;
use kernels::cuda::rows;
use kernels::fp8;

use super::{Case, Found, Ran};
use crate::harness::{Harness, Result};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols, delta, format) in AddNorm::list() {
        cases.push(Case::shared(
            format!("add_norm rows {rows} cols {cols} delta {delta} {format:?}"),
            move || AddNorm::new(rows, cols, delta, format),
            add_norm,
        ));
    }
    for (rows, cols, masked, format) in Swiglu::list() {
        cases.push(Case::shared(
            format!("swiglu rows {rows} cols {cols} masked {masked} {format:?}"),
            move || Swiglu::new(rows, cols, masked, format),
            swiglu,
        ));
    }
    for (rows, cols, format) in Quantise::list() {
        cases.push(Case::shared(
            format!("quantise rows {rows} cols {cols} {format:?}"),
            move || Quantise::new(rows, cols, format),
            quantise,
        ));
    }
    cases.push(Case::new(
        "quantise NaN and infinity show".into(),
        quantise_broken,
    ));
    for (rows, heads) in Rope::SIZES {
        cases.push(Case::shared(
            format!("rope rows {rows} heads {heads}"),
            move || Rope::new(rows, heads),
            rope,
        ));
        cases.push(Case::shared(
            format!("cache_write rows {rows}"),
            move || CacheWrite::new(rows),
            cache_write,
        ));
        cases.push(Case::new(format!("gather scatter rows {rows}"), move |h| {
            row_moves(h, rows)
        }));
    }
    cases
}

/// Device memory of an operation's output, with scales at a pitch of their own.
struct Target {
    plain: CudaSlice<u16>,
    data: CudaSlice<u8>,
    scales: CudaSlice<f32>,
    rows: usize,
    cols: usize,
    ld: usize,
}

impl Target {
    fn new(h: &Harness, rows: usize, cols: usize) -> Result<Self> {
        let ld = rows.next_multiple_of(4) + 4;
        Ok(Self {
            plain: h.poisoned(rows * cols)?,
            data: h.poisoned(rows * cols)?,
            scales: h.poisoned(cols / 128 * ld)?,
            rows,
            cols,
            ld,
        })
    }

    fn quantised(&self, h: &Harness, scale: ScaleFormat) -> Quantised {
        Quantised {
            data: h.span(&self.data),
            scales: h.span(&self.scales),
            ld: self.ld,
            scale,
        }
    }

    fn output(&self, h: &Harness, scale: ScaleFormat) -> Output {
        Output {
            plain: Some(h.span(&self.plain)),
            quantised: Some(self.quantised(h, scale)),
        }
    }

    /// What was written, the scales row by row.
    fn rows(&self, h: &Harness) -> Result<Rows> {
        let scales = h.download(&self.scales)?;
        let blocks = self.cols / 128;
        let scale = |at: usize| scales[at % blocks * self.ld + at / blocks];
        Ok(Rows {
            plain: floats(&h.download(&self.plain)?),
            data: h.download(&self.data)?,
            scales: (0..self.rows * blocks).map(scale).collect(),
        })
    }
}

fn add_norm(h: &Harness, case: &AddNorm) -> Result<Ran<Normed>> {
    let (rows, cols) = (case.rows, case.cols);
    let ld = cols + 64;
    let mut before = vec![0x7fc0u16; rows * ld];
    for (to, from) in before
        .chunks_exact_mut(ld)
        .zip(case.residual.chunks_exact(cols))
    {
        to[..cols].copy_from_slice(from);
    }
    let delta = case.delta.as_ref().map(|d| h.upload(d)).transpose()?;
    let (weight, target) = (h.upload(&case.weight)?, Target::new(h, rows, cols)?);
    let mut digests = [0; 2];
    let mut after = Vec::new();
    for digest in &mut digests {
        let residual = h.upload(&before)?;
        pointwise::add_norm(
            &h.gpu,
            &h.stream,
            h.span(&residual),
            ld,
            delta.as_ref().map(|d| h.span(d)),
            h.span(&weight),
            EPS,
            rows,
            cols,
            target.output(h, case.format),
            false,
        )?;
        *digest = h.digest(&target.plain)?;
        after = h.download(&residual)?;
    }
    let residual: Vec<u16> = after
        .chunks_exact(ld)
        .flat_map(|row| row[..cols].iter().copied())
        .collect();
    let beside = after.chunks_exact(ld).flat_map(|row| &row[cols..]);
    Ok(Ran {
        out: Normed {
            residual: floats(&residual),
            out: target.rows(h)?,
        },
        repeats: digests[0] == digests[1],
        wrong: beside.filter(|&&v| v != 0x7fc0).count(),
    })
}

fn swiglu(h: &Harness, case: &Swiglu) -> Result<Ran<Rows>> {
    let x = h.upload(&case.x)?;
    let counts = case.counts.as_ref().map(|c| h.upload(c)).transpose()?;
    let target = Target::new(h, case.rows, case.cols)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&target.plain)?;
        pointwise::swiglu(
            &h.gpu,
            &h.stream,
            h.span(&x),
            case.rows,
            case.cols,
            counts.as_ref().map(|c| (h.span(c), Swiglu::GROUP)),
            target.output(h, case.format),
            false,
        )?;
        *digest = h.digest(&target.plain)?;
    }
    let plain = h.download(&target.plain)?;
    let wrong = (0..plain.len())
        .filter(|i| (plain[*i] == 0xffff) == case.used(i / case.cols))
        .count();
    Ok(Ran {
        out: target.rows(h)?,
        repeats: digests[0] == digests[1],
        wrong,
    })
}

fn quantise(h: &Harness, case: &Quantise) -> Result<Ran<Rows>> {
    let x = h.upload(&case.x)?;
    let target = Target::new(h, case.rows, case.cols)?;
    pointwise::quantise(
        &h.gpu,
        &h.stream,
        h.span(&x),
        case.rows,
        case.cols,
        target.quantised(h, case.format),
        false,
    )?;
    let out = Rows {
        plain: floats(&case.x),
        ..target.rows(h)?
    };
    Ok(Ran {
        out,
        repeats: true,
        wrong: 0,
    })
}

fn quantise_broken(h: &Harness) -> Result<Found> {
    let mut x = vec![0x3f80u16; 3 * 256];
    x[5] = 0x7fc0; // NaN in row 0
    x[256 + 130] = 0x7f80; // infinity in row 1, second block
    let (x, target) = (h.upload(&x)?, Target::new(h, 3, 256)?);
    pointwise::quantise(
        &h.gpu,
        &h.stream,
        h.span(&x),
        3,
        256,
        target.quantised(h, ScaleFormat::F32),
        false,
    )?;
    let (data, scales) = (h.download(&target.data)?, h.download(&target.scales)?);
    let value = |row: usize, col: usize| {
        f64::from(fp8::decode(data[row * 256 + col]) * scales[col / 128 * target.ld + row])
    };
    let shows = !value(0, 5).is_finite() && !value(1, 130).is_finite();
    let spreads =
        (0..128).any(|c| (value(1, c) - 1.0).abs() > 0.1 || (value(2, c) - 1.0).abs() > 0.1);
    Ok(Found::new(
        &Error::default(),
        0.0,
        true,
        usize::from(!shows) + usize::from(spreads),
    ))
}

fn rope(h: &Harness, case: &Rope) -> Result<Ran<Vec<f32>>> {
    let (rows, heads) = (case.rows, case.heads);
    let (q, to) = (h.upload(&case.q)?, h.poisoned::<u16>(rows * heads * 576)?);
    let (table, positions) = (h.upload(&rotary_table())?, h.upload(&case.positions)?);
    let from = HeadColumns {
        data: h.span(&q),
        width: 192,
        first: 128,
    };
    let absorbed = HeadColumns {
        data: h.span(&to),
        width: 576,
        first: 512,
    };
    for target in [absorbed, from] {
        let (table, positions) = (h.span(&table), h.span(&positions));
        pointwise::rope(
            &h.gpu, &h.stream, from, target, table, positions, rows, heads, 64, false,
        )?;
    }
    let (q, to) = (h.download(&q)?, h.download(&to)?);
    let mut wrong = 0;
    for (q, to) in q.chunks_exact(192).zip(to.chunks_exact(576)) {
        wrong += to[..512].iter().filter(|&&v| v != 0xffff).count();
        wrong += usize::from(to[512..] != q[128..]);
    }
    Ok(Ran {
        out: floats(&q),
        repeats: true,
        wrong,
    })
}

fn cache_write(h: &Harness, case: &CacheWrite) -> Result<Ran<Vec<u16>>> {
    let cache = h.poisoned::<u16>(CacheWrite::BLOCKS * CacheWrite::LAYERS * 64 * 576)?;
    let (kv, weight, table) = (
        h.upload(&case.kv)?,
        h.upload(&case.weight)?,
        h.upload(&rotary_table())?,
    );
    let (positions, slots) = (h.upload(&case.positions)?, h.upload(&case.slots)?);
    let inputs = CacheInputs {
        kv: h.span(&kv),
        ld: CacheWrite::LD,
        latent: 512,
        rope: 64,
        weight: h.span(&weight),
        table: h.span(&table),
        positions: h.span(&positions),
        slots: h.span(&slots),
    };
    pointwise::cache_write(
        &h.gpu,
        &h.stream,
        inputs,
        EPS,
        case.rows,
        h.span(&cache),
        CacheWrite::LAYERS,
        CacheWrite::LAYER,
        false,
    )?;
    Ok(Ran {
        out: h.download(&cache)?,
        repeats: true,
        wrong: 0,
    })
}

fn row_moves(h: &Harness, count: usize) -> Result<Found> {
    const BYTES: usize = 7168 * 2;
    let mut random = Random(8);
    let mut index: Vec<i32> = (0..100).collect();
    for i in (1..index.len()).rev() {
        index.swap(i, random.below(i + 1));
    }
    index.truncate(count);
    let table = h.random::<u8>(100 * BYTES, Kind::Fp8Normal, 100.0, 1)?;
    let (picked, back) = (
        h.poisoned::<u8>(count * BYTES)?,
        h.poisoned::<u8>(100 * BYTES)?,
    );
    let device_index = h.upload(&index)?;
    let (index_span, picked_span) = (h.span(&device_index), h.span(&picked));
    rows::gather(
        &h.gpu,
        &h.stream,
        h.span(&table),
        picked_span,
        index_span,
        count,
        BYTES,
        false,
    )?;
    rows::scatter(
        &h.gpu,
        &h.stream,
        picked_span,
        h.span(&back),
        index_span,
        count,
        BYTES,
        false,
    )?;
    let (table, picked, back) = (
        h.download(&table)?,
        h.download(&picked)?,
        h.download(&back)?,
    );
    let row = |data: &[u8], r: usize| data[r * BYTES..(r + 1) * BYTES].to_vec();
    let mut wrong = 0;
    for r in 0..100 {
        match index.iter().position(|&i| i as usize == r) {
            Some(at) => {
                let expected = row(&table, r);
                wrong += usize::from(row(&picked, at) != expected || row(&back, r) != expected);
            }
            None => wrong += usize::from(row(&back, r) != vec![0xff; BYTES]),
        }
    }
    Ok(Found::new(&Error::default(), 0.0, true, wrong))
}
