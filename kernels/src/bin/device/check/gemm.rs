//! FP8 GEMM: dense and grouped.

use std::collections::BTreeMap;

use kernels::cases::gemm::{Gemm, Grouped, Operands};
use kernels::cases::{self, Operation, floats, sample};
use kernels::cuda::Span;
use kernels::cuda::gemm::{self, Activations, Groups, Instance, Weights};
use kernels::cuda::probe::Kind;

use super::{Case, Found, Ran};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16};

/// BF16 output and the tensor cores' 14-bit sums inside a block.
const BOUND: f64 = Gemm::BOUND;

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, k) in Gemm::SHAPES {
        for m in Gemm::ROWS {
            cases.push(shared(format!("fp8_gemm m {m} n {n} k {k}"), None, m, n, k));
        }
    }
    // Too large for the CPU to follow.
    for (n, k) in [(24576, 1536), (7168, 16384), (4096, 7168)] {
        for m in Gemm::ROWS {
            cases.push(Case::new(format!("fp8_gemm m {m} n {n} k {k}"), move |h| {
                dense(h, m, n, k)
            }));
        }
    }
    for (n, k) in [
        (2112, 7168),
        (24576, 1536),
        (7168, 16384),
        (4096, 7168),
        (7168, 2048),
    ] {
        cases.push(Case::new(
            format!("fp8_gemm m 4096 n {n} k {k}"),
            move |h| dense(h, 4096, n, k),
        ));
    }
    for (n, k) in [(2112, 7168), (320, 384)] {
        cases.push(Case::new(
            format!("{} pinned n {n} k {k}", gemm::PINNED),
            move |h| pinned(h, n, k),
        ));
    }
    for instance in Instance::all().iter().filter(|i| !i.grouped) {
        let m = instance.tokens as usize;
        for (m, n, k) in [
            (m - 3, 2112, 7168),
            (m - 3, 320, 1024),
            (2 * m + 37, 576, 384),
        ] {
            // A cluster that shares K works on one tile.
            if instance.split_k as usize > k / 128 {
                continue;
            }
            let name = format!("{} m {m} n {n} k {k}", instance.name);
            cases.push(shared(name, Some(instance.name), m, n, k));
        }
    }
    for instance in Instance::all().iter().filter(|i| i.grouped) {
        for masked in [true, false] {
            let kind = if masked { "masked" } else { "contiguous" };
            for (n, k) in [(4096, 7168), (7168, 2048)] {
                cases.push(Case::new(
                    format!("{} {kind} 8 groups n {n} k {k}", instance.name),
                    move |h| grouped(h, instance.name, masked, n, k),
                ));
            }
            let (n, k) = (512, 256);
            cases.push(Case::shared(
                format!("{} {kind} 8 groups n {n} k {k}", instance.name),
                move || Grouped::new(n, k),
                move |h, case| experts(h, instance.name, masked, case),
            ));
        }
    }
    cases
}

/// A case that the CPU computes too.
fn shared(name: String, instance: Option<&'static str>, m: usize, n: usize, k: usize) -> Case {
    let gpu = move |h: &Harness, case: &Gemm| product(h, instance, case);
    Case::shared(name, move || Gemm::new(m, n, k), gpu)
}

/// Scales `[rows][k / 128]` as the kernels take them, `[k / 128][ld]`, row `i` at `place(i)`.
fn by_block(scales: &[f32], rows: usize, ld: usize, place: impl Fn(usize) -> usize) -> Vec<f32> {
    let blocks = scales.len() / rows;
    let mut out = vec![f32::NAN; blocks * ld];
    for row in 0..rows {
        for block in 0..blocks {
            out[block * ld + place(row)] = scales[row * blocks + block];
        }
    }
    out
}

fn product(h: &Harness, instance: Option<&str>, case: &Gemm) -> Result<Ran<Vec<f32>>> {
    let Operands { m, n, k, .. } = case.0;
    let ld = m.next_multiple_of(4);
    let x = h.upload(&case.0.x)?;
    let x_scale = h.upload(&by_block(&case.0.x_scale, m, ld, |row| row))?;
    let (w, w_scale) = (h.upload(&case.0.w)?, h.upload(&case.0.w_scale)?);
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows: m,
        ld,
    };
    let weights = Weights {
        data: h.span(&w),
        scales: h.span(&w_scale),
        n,
        k,
        groups: 1,
    };
    let (out, repeats) = twice(h, m * n, |out| {
        enqueue(h, instance, activations, weights, out)
    })?;
    Ok(Ran {
        wrong: out.iter().filter(|&&v| v == 0xffff).count(),
        out: floats(&out),
        repeats,
    })
}

fn experts(h: &Harness, instance: &str, masked: bool, case: &Grouped) -> Result<Ran<Vec<f32>>> {
    let Operands { m, n, k, .. } = case.0;
    let (starts, groups, stride) = (Grouped::starts(), Grouped::COUNTS.len(), 168);
    // Where a row lies: experts one after the other, or each with room for `stride` rows.
    let place = |row: usize| {
        let group = starts.iter().rposition(|&s| s <= row).unwrap_or(0);
        if masked {
            group * stride + row - starts[group]
        } else {
            row
        }
    };
    let rows = if masked { groups * stride } else { m };
    let ld = rows.next_multiple_of(4);
    let mut x = vec![0x7f; rows * k];
    for (row, data) in case.0.x.chunks_exact(k).enumerate() {
        x[place(row) * k..][..k].copy_from_slice(data);
    }
    let list: Vec<i32> = if masked {
        Grouped::COUNTS.iter().map(|&c| c as i32).collect()
    } else {
        starts.iter().map(|&s| s as i32).collect()
    };
    let (x, list) = (h.upload(&x)?, h.upload(&list)?);
    let x_scale = h.upload(&by_block(&case.0.x_scale, m, ld, place))?;
    let (w, w_scale) = (h.upload(&case.0.w)?, h.upload(&case.0.w_scale)?);
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows,
        ld,
    };
    let weights = Weights {
        data: h.span(&w),
        scales: h.span(&w_scale),
        n,
        k,
        groups,
    };
    let layout = if masked {
        Groups::Masked(h.span(&list), stride)
    } else {
        Groups::Contiguous(h.span(&list))
    };
    let (all, repeats) = twice(h, rows * n, |out| {
        let (gpu, stream) = (&h.gpu, &h.stream);
        Ok(gemm::grouped_with(
            gpu,
            stream,
            instance,
            activations,
            weights,
            layout,
            out,
            n,
            false,
        )?)
    })?;
    let mut used = vec![false; rows];
    let mut out = Vec::with_capacity(m * n);
    for row in 0..m {
        used[place(row)] = true;
        out.extend(floats(&all[place(row) * n..][..n]));
    }
    let wrong = (0..rows * n).filter(|&i| (all[i] == 0xffff) == used[i / n]);
    Ok(Ran {
        wrong: wrong.count(),
        out,
        repeats,
    })
}

/// Runs `enqueue` twice over poisoned memory of `len` values: the values, and whether both runs left the same bits.
fn twice(
    h: &Harness,
    len: usize,
    enqueue: impl Fn(Span<u16>) -> Result<()>,
) -> Result<(Vec<u16>, bool)> {
    let out = h.poisoned::<u16>(len)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&out)?;
        enqueue(h.span(&out))?;
        *digest = h.digest(&out)?;
    }
    Ok((h.download(&out)?, digests[0] == digests[1]))
}

fn enqueue(
    h: &Harness,
    instance: Option<&str>,
    x: Activations,
    w: Weights,
    out: Span<u16>,
) -> Result<()> {
    let (gpu, stream) = (&h.gpu, &h.stream);
    match instance {
        Some(name) => gemm::dense_with(gpu, stream, name, x, w, out, w.n, false)?,
        None => gemm::dense(gpu, stream, x, w, out, w.n, false)?,
    }
    Ok(())
}

fn dense(h: &Harness, m: usize, n: usize, k: usize) -> Result<Found> {
    let ld = m.next_multiple_of(4);
    let x = h.random::<u8>(m * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k / 128 * ld, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(n.div_ceil(128) * (k / 128), Kind::F32Scale, 0.001, 4)?;
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows: m,
        ld,
    };
    let weights = Weights {
        data: h.span(&w),
        scales: h.span(&w_scale),
        n,
        k,
        groups: 1,
    };
    let (out, repeats) = twice(h, m * n, |out| enqueue(h, None, activations, weights, out))?;
    let unwritten = out.iter().filter(|&&v| v == 0xffff).count();
    let mut error = Error::default();
    let mut random = Random(5);
    let (tokens, rows) = (sample(&mut random, m, 24), sample(&mut random, n, 48));
    let host = Host {
        x: h.download_rows(&x, k, tokens.iter().copied())?,
        x_scale: h.download(&x_scale)?,
        w: h.download_rows(&w, k, rows.iter().copied())?,
        w_scale: h.download(&w_scale)?,
        ld,
        n,
        k,
    };
    for &t in &tokens {
        for &row in &rows {
            error.add(bf16(out[t * n + row]), host.product(t, 0, row));
        }
    }
    Ok(Found::new(&error, BOUND, repeats, unwritten))
}

/// The first tokens of a batch have the same bits alone: `wrong` counts outputs that differ.
fn pinned(h: &Harness, n: usize, k: usize) -> Result<Found> {
    const ROWS: usize = 300;
    let x = h.random::<u8>(ROWS * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k / 128 * ROWS, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(n.div_ceil(128) * (k / 128), Kind::F32Scale, 0.001, 4)?;
    let weights = Weights {
        data: h.span(&w),
        scales: h.span(&w_scale),
        n,
        k,
        groups: 1,
    };
    let run = |rows: usize| -> Result<Vec<u16>> {
        let out = h.poisoned::<u16>(rows * n)?;
        let activations = Activations {
            data: h.span(&x),
            scales: h.span(&x_scale),
            rows,
            ld: ROWS,
        };
        let out_span = h.span(&out);
        gemm::dense_with(
            &h.gpu,
            &h.stream,
            gemm::PINNED,
            activations,
            weights,
            out_span,
            n,
            false,
        )?;
        h.download(&out)
    };
    let all = run(ROWS)?;
    let mut wrong = all.iter().filter(|&&v| v == 0xffff).count();
    for rows in [1, 7, 64, 129] {
        wrong += run(rows)?.iter().zip(&all).filter(|(a, b)| a != b).count();
    }
    Ok(Found::new(&Error::default(), BOUND, true, wrong))
}

fn grouped(h: &Harness, instance: &'static str, masked: bool, n: usize, k: usize) -> Result<Found> {
    let counts = Grouped::COUNTS;
    let (groups, stride) = (counts.len(), 168);
    let starts: Vec<usize> = if masked {
        (0..groups).map(|g| g * stride).collect()
    } else {
        counts
            .iter()
            .scan(0, |sum, c| {
                *sum += c;
                Some(*sum - c)
            })
            .collect()
    };
    let rows = if masked {
        groups * stride
    } else {
        counts.iter().sum()
    };
    let ld = rows.next_multiple_of(4);
    let x = h.random::<u8>(rows * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k / 128 * ld, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(groups * n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(groups * (n / 128) * (k / 128), Kind::F32Scale, 0.001, 4)?;
    let list: Vec<i32> = if masked {
        counts.iter().map(|&c| c as i32).collect()
    } else {
        starts.iter().chain(&[rows]).map(|&s| s as i32).collect()
    };
    let list = h.upload(&list)?;
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows,
        ld,
    };
    let weights = Weights {
        data: h.span(&w),
        scales: h.span(&w_scale),
        n,
        k,
        groups,
    };
    let layout = if masked {
        Groups::Masked(h.span(&list), stride)
    } else {
        Groups::Contiguous(h.span(&list))
    };
    let (out, repeats) = twice(h, rows * n, |out| {
        let (gpu, stream) = (&h.gpu, &h.stream);
        Ok(gemm::grouped_with(
            gpu,
            stream,
            instance,
            activations,
            weights,
            layout,
            out,
            n,
            false,
        )?)
    })?;
    let mut error = Error::default();
    let mut random = Random(5);
    let mut written = vec![false; rows];
    for (g, (&start, &count)) in starts.iter().zip(&counts).enumerate() {
        written[start..start + count].fill(true);
        let (tokens, columns) = (sample(&mut random, count, 12), sample(&mut random, n, 32));
        let host = Host {
            x: h.download_rows(&x, k, tokens.iter().map(|t| start + t))?,
            x_scale: h.download(&x_scale)?,
            w: h.download_rows(&w, k, columns.iter().map(|c| g * n + c))?,
            w_scale: h.download(&w_scale)?,
            ld,
            n,
            k,
        };
        for &t in &tokens {
            for &row in &columns {
                error.add(
                    bf16(out[(start + t) * n + row]),
                    host.product(start + t, g, row),
                );
            }
        }
    }
    let wrong = (0..rows * n)
        .filter(|&i| (out[i] == 0xffff) == written[i / n])
        .count();
    Ok(Found::new(&error, BOUND, repeats, wrong))
}

/// Operands on the host: the sampled rows.
struct Host {
    x: BTreeMap<usize, Vec<u8>>,
    x_scale: Vec<f32>,
    w: BTreeMap<usize, Vec<u8>>,
    w_scale: Vec<f32>,
    ld: usize,
    n: usize,
    k: usize,
}

impl Host {
    fn product(&self, t: usize, group: usize, row: usize) -> f64 {
        let (x, w) = (&self.x[&t], &self.w[&(group * self.n + row)]);
        let scale_row = group * self.n.div_ceil(128) + row / 128;
        cases::gemm::product(x, w, |kb| {
            f64::from(self.x_scale[kb * self.ld + t])
                * f64::from(self.w_scale[scale_row * (self.k / 128) + kb])
        })
    }
}
