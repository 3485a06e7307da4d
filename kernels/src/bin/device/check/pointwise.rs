//! Norms, activations, quantising, rotary embedding, cache writes and row moves.

use cudarc::driver::CudaSlice;
use kernels::cuda::pointwise::{self, CacheInputs, HeadColumns, Output, Quantised, Scale};
use kernels::cuda::probe::Kind;
use kernels::cuda::rows;
use kernels::fp8;

use super::{Case, Found};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16, e4m3};

/// One rounding to BF16.
const BOUND: f64 = 3e-3;
const EPS: f32 = 1e-6;

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for scale in [Scale::Float, Scale::PowerOfTwo] {
        for (rows, cols, delta) in [
            (1, 7168, true),
            (64, 7168, true),
            (130, 7168, false),
            (33, 1536, false),
            (7, 128, true),
            (5, 8192, true),
        ] {
            cases.push(Case::new(
                format!("add_norm rows {rows} cols {cols} delta {delta} {scale:?}"),
                move |h| add_norm(h, rows, cols, delta, scale),
            ));
        }
        for (rows, cols, masked) in [
            (1, 2048, false),
            (128, 2048, false),
            (96, 2048, true),
            (9, 18432, false),
            (3, 128, false),
        ] {
            cases.push(Case::new(
                format!("swiglu rows {rows} cols {cols} masked {masked} {scale:?}"),
                move |h| swiglu(h, rows, cols, masked, scale),
            ));
        }
        for (rows, cols) in [(1, 16384), (77, 1536)] {
            cases.push(Case::new(
                format!("quantise rows {rows} cols {cols} {scale:?}"),
                move |h| quantise(h, rows, cols, scale),
            ));
        }
    }
    cases.push(Case::new(
        "quantise NaN and infinity show".into(),
        quantise_broken,
    ));
    for (rows, heads) in [(1, 128), (37, 16)] {
        cases.push(Case::new(
            format!("rope rows {rows} heads {heads}"),
            move |h| rope(h, rows, heads),
        ));
        cases.push(Case::new(format!("cache_write rows {rows}"), move |h| {
            cache_write(h, rows)
        }));
        cases.push(Case::new(format!("gather scatter rows {rows}"), move |h| {
            row_moves(h, rows)
        }));
    }
    cases
}

/// Device memory of a quantised output with scales at a pitch of its own.
struct Target {
    data: CudaSlice<u8>,
    scales: CudaSlice<f32>,
    ld: usize,
}

impl Target {
    fn new(h: &Harness, rows: usize, cols: usize) -> Result<Self> {
        let ld = rows.next_multiple_of(4) + 4;
        Ok(Self {
            data: h.poisoned(rows * cols)?,
            scales: h.poisoned(cols / 128 * ld)?,
            ld,
        })
    }

    fn spans(&self, h: &Harness, scale: Scale) -> Quantised {
        Quantised {
            data: h.span(&self.data),
            scales: h.span(&self.scales),
            ld: self.ld,
            scale,
        }
    }

    /// Bytes and scales that differ from quantising `plain` on the host. `rows` says which rows count.
    fn differences(
        &self,
        h: &Harness,
        plain: &[u16],
        cols: usize,
        scale: Scale,
        rows: impl Iterator<Item = usize>,
    ) -> Result<usize> {
        let (data, scales) = (h.download(&self.data)?, h.download(&self.scales)?);
        let mut wrong = 0;
        for row in rows {
            for block in 0..cols / 128 {
                let at = row * cols + block * 128;
                let x: Vec<f32> = plain[at..at + 128]
                    .iter()
                    .map(|&v| bf16(v) as f32)
                    .collect();
                let amax = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let s = if scale == Scale::Float {
                    fp8::scale(amax)
                } else {
                    fp8::scale_ue8m0(amax)
                };
                wrong += usize::from(scales[block * self.ld + row] != s);
                wrong += (0..128)
                    .filter(|&i| data[at + i] != fp8::encode(x[i] / s))
                    .count();
            }
        }
        Ok(wrong)
    }
}

fn add_norm(
    h: &Harness,
    rows: usize,
    cols: usize,
    with_delta: bool,
    scale: Scale,
) -> Result<Found> {
    let ld = cols + 64;
    let before = h.random::<u16>(rows * ld, Kind::Bf16Normal, 2.0, 1)?;
    let delta = h.random::<u16>(rows * cols, Kind::Bf16Normal, 1.0, 2)?;
    let weight = h.random::<f32>(cols, Kind::F32Scale, 1.0, 3)?;
    let (plain, target) = (h.poisoned::<u16>(rows * cols)?, Target::new(h, rows, cols)?);
    let host_before = h.download(&before)?;
    let mut digests = [0; 2];
    let mut residual = h.upload(&host_before)?;
    for digest in &mut digests {
        residual = h.upload(&host_before)?;
        let out = Output {
            plain: Some(h.span(&plain)),
            quantised: Some(target.spans(h, scale)),
        };
        let delta = with_delta.then(|| h.span(&delta));
        pointwise::add_norm(
            &h.gpu,
            &h.stream,
            h.span(&residual),
            ld,
            delta,
            h.span(&weight),
            EPS,
            rows,
            cols,
            out,
            false,
        )?;
        *digest = h.digest(&plain)?;
    }
    let (delta, weight) = (h.download(&delta)?, h.download(&weight)?);
    let (after, plain) = (h.download(&residual)?, h.download(&plain)?);
    let mut error = Error::default();
    let mut wrong = 0;
    for r in 0..rows {
        let sums: Vec<f64> = (0..cols)
            .map(|c| {
                let sum = bf16(host_before[r * ld + c])
                    + if with_delta {
                        bf16(delta[r * cols + c])
                    } else {
                        0.0
                    };
                error.add(bf16(after[r * ld + c]), sum);
                bf16(after[r * ld + c])
            })
            .collect();
        wrong += (cols..ld)
            .filter(|&c| after[r * ld + c] != host_before[r * ld + c])
            .count();
        let mean = sums.iter().map(|s| s * s).sum::<f64>() / cols as f64;
        for c in 0..cols {
            error.add(
                bf16(plain[r * cols + c]),
                sums[c] / (mean + f64::from(EPS)).sqrt() * f64::from(weight[c]),
            );
        }
    }
    wrong += target.differences(h, &plain, cols, scale, 0..rows)?;
    Ok(Found::new(&error, BOUND, digests[0] == digests[1], wrong))
}

fn swiglu(h: &Harness, rows: usize, cols: usize, masked: bool, scale: Scale) -> Result<Found> {
    const GROUP: usize = 24;
    let x = h.random::<u16>(rows * 2 * cols, Kind::Bf16Normal, 2.0, 1)?;
    let (plain, target) = (h.poisoned::<u16>(rows * cols)?, Target::new(h, rows, cols)?);
    let counts: Vec<i32> = (0..rows.div_ceil(GROUP))
        .map(|g| [24, 0, 1, 13][g % 4])
        .collect();
    let device_counts = h.upload(&counts)?;
    let used = |r: &usize| !masked || r % GROUP < counts[r / GROUP] as usize;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&plain)?;
        let out = Output {
            plain: Some(h.span(&plain)),
            quantised: Some(target.spans(h, scale)),
        };
        let masked = masked.then(|| (h.span(&device_counts), GROUP));
        pointwise::swiglu(
            &h.gpu,
            &h.stream,
            h.span(&x),
            rows,
            cols,
            masked,
            out,
            false,
        )?;
        *digest = h.digest(&plain)?;
    }
    let (x, plain) = (h.download(&x)?, h.download(&plain)?);
    let mut error = Error::default();
    let mut wrong = 0;
    for r in 0..rows {
        for c in 0..cols {
            let out = plain[r * cols + c];
            if used(&r) {
                let (gate, up) = (bf16(x[r * 2 * cols + c]), bf16(x[r * 2 * cols + cols + c]));
                error.add(bf16(out), gate / (1.0 + (-gate).exp()) * up);
            } else {
                wrong += usize::from(out != 0xffff);
            }
        }
    }
    wrong += target.differences(h, &plain, cols, scale, (0..rows).filter(used))?;
    Ok(Found::new(&error, BOUND, digests[0] == digests[1], wrong))
}

fn quantise(h: &Harness, rows: usize, cols: usize, scale: Scale) -> Result<Found> {
    let x = h.random::<u16>(rows * cols, Kind::Bf16Normal, 3.0, 1)?;
    let target = Target::new(h, rows, cols)?;
    pointwise::quantise(
        &h.gpu,
        &h.stream,
        h.span(&x),
        rows,
        cols,
        target.spans(h, scale),
        false,
    )?;
    let x = h.download(&x)?;
    let wrong = target.differences(h, &x, cols, scale, 0..rows)?;
    Ok(Found::new(&Error::default(), 0.0, true, wrong))
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
        target.spans(h, Scale::Float),
        false,
    )?;
    let (data, scales) = (h.download(&target.data)?, h.download(&target.scales)?);
    let value = |row: usize, col: usize| {
        e4m3(data[row * 256 + col]) * f64::from(scales[col / 128 * target.ld + row])
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

/// Cosines and sines of DeepSeek-V3's first frequencies, without YaRN.
fn table(positions: usize) -> Vec<f32> {
    let entry = |p: usize, i: usize| {
        let angle = p as f64 * 10_000f64.powf(-((i / 2 * 2) as f64) / 64.0);
        (if i.is_multiple_of(2) {
            angle.cos()
        } else {
            angle.sin()
        }) as f32
    };
    (0..positions * 64)
        .map(|at| entry(at / 64, at % 64))
        .collect()
}

fn rotated(x: &[u16], turn: &[f32], i: usize) -> f64 {
    let (a, b) = (bf16(x[i / 2 * 2]), bf16(x[i / 2 * 2 + 1]));
    let (cos, sin) = (f64::from(turn[i / 2 * 2]), f64::from(turn[i / 2 * 2 + 1]));
    if i.is_multiple_of(2) {
        a * cos - b * sin
    } else {
        a * sin + b * cos
    }
}

fn rope(h: &Harness, rows: usize, heads: usize) -> Result<Found> {
    const POSITIONS: usize = 500;
    let mut random = Random(6);
    let table = table(POSITIONS);
    let positions: Vec<i32> = (0..rows).map(|_| random.below(POSITIONS) as i32).collect();
    let q = h.random::<u16>(rows * heads * 192, Kind::Bf16Normal, 1.0, 1)?;
    let before = h.download(&q)?;
    let to = h.poisoned::<u16>(rows * heads * 576)?;
    let (device_table, device_positions) = (h.upload(&table)?, h.upload(&positions)?);
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
        let (table, positions) = (h.span(&device_table), h.span(&device_positions));
        pointwise::rope(
            &h.gpu, &h.stream, from, target, table, positions, rows, heads, 64, false,
        )?;
    }
    let (q, to) = (h.download(&q)?, h.download(&to)?);
    let mut error = Error::default();
    let mut wrong = 0;
    for head in 0..rows * heads {
        let turn = &table[positions[head / heads] as usize * 64..][..64];
        wrong += (0..128)
            .filter(|c| q[head * 192 + c] != before[head * 192 + c])
            .count();
        wrong += (0..512).filter(|c| to[head * 576 + c] != 0xffff).count();
        for i in 0..64 {
            error.add(
                bf16(q[head * 192 + 128 + i]),
                rotated(&before[head * 192 + 128..], turn, i),
            );
            wrong += usize::from(to[head * 576 + 512 + i] != q[head * 192 + 128 + i]);
        }
    }
    Ok(Found::new(&error, BOUND, true, wrong))
}

fn cache_write(h: &Harness, rows: usize) -> Result<Found> {
    const POSITIONS: usize = 500;
    let (blocks, layers, layer, ld) = (4, 3, 1, 2112);
    let mut random = Random(7);
    let table = table(POSITIONS);
    let positions: Vec<i32> = (0..rows).map(|_| random.below(POSITIONS) as i32).collect();
    let slots: Vec<i32> = (0..rows)
        .map(|r| {
            if r == 3 {
                -1
            } else {
                ((r * 7) % (blocks * 64)) as i32
            }
        })
        .collect();
    let kv = h.random::<u16>(rows * ld, Kind::Bf16Normal, 1.5, 1)?;
    let weight = h.random::<f32>(512, Kind::F32Scale, 1.0, 2)?;
    let cache = h.poisoned::<u16>(blocks * layers * 64 * 576)?;
    let (device_table, device_positions, device_slots) =
        (h.upload(&table)?, h.upload(&positions)?, h.upload(&slots)?);
    let inputs = CacheInputs {
        kv: h.span(&kv),
        ld,
        latent: 512,
        rope: 64,
        weight: h.span(&weight),
        table: h.span(&device_table),
        positions: h.span(&device_positions),
        slots: h.span(&device_slots),
    };
    pointwise::cache_write(
        &h.gpu,
        &h.stream,
        inputs,
        EPS,
        rows,
        h.span(&cache),
        layers,
        layer,
        false,
    )?;
    let (kv, weight, cache) = (h.download(&kv)?, h.download(&weight)?, h.download(&cache)?);
    let mut error = Error::default();
    let mut written = vec![false; blocks * layers * 64];
    for r in 0..rows {
        let Ok(slot) = usize::try_from(slots[r]) else {
            continue;
        };
        let entry = (slot / 64 * layers + layer) * 64 + slot % 64;
        written[entry] = true;
        let (x, out) = (&kv[r * ld..], &cache[entry * 576..]);
        let mean = x[..512].iter().map(|&v| bf16(v).powi(2)).sum::<f64>() / 512.0;
        for c in 0..512 {
            error.add(
                bf16(out[c]),
                bf16(x[c]) / (mean + f64::from(EPS)).sqrt() * f64::from(weight[c]),
            );
        }
        let turn = &table[positions[r] as usize * 64..][..64];
        for i in 0..64 {
            error.add(bf16(out[512 + i]), rotated(&x[512..], turn, i));
        }
    }
    let wrong = (0..cache.len())
        .filter(|&i| (cache[i] == 0xffff) == written[i / 576])
        .count();
    Ok(Found::new(&error, BOUND, true, wrong))
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
