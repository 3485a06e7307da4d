//! FP8 GEMM: dense and grouped.

use std::collections::BTreeMap;

use kernels::cuda::gemm::{self, Activations, Groups, Instance, Weights};
use kernels::cuda::probe::Kind;

use super::{Case, Found};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16, e4m3_table};

/// BF16 output and the tensor cores' 14-bit sums inside a block.
const BOUND: f64 = 4e-3;

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, k) in [
        (2112, 7168),
        (24576, 1536),
        (7168, 16384),
        (4096, 7168),
        (7168, 2048),
        (64, 128),
        (576, 384),
    ] {
        for m in [1, 7, 33, 64, 127, 200] {
            cases.push(Case::new(format!("fp8_gemm m {m} n {n} k {k}"), move |h| {
                dense(h, None, m, n, k)
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
            move |h| dense(h, None, 4096, n, k),
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
            cases.push(Case::new(
                format!("{} m {m} n {n} k {k}", instance.name),
                move |h| dense(h, Some(instance.name), m, n, k),
            ));
        }
    }
    for instance in Instance::all().iter().filter(|i| i.grouped) {
        for (n, k) in [(4096, 7168), (7168, 2048), (512, 256)] {
            for masked in [true, false] {
                let kind = if masked { "masked" } else { "contiguous" };
                cases.push(Case::new(
                    format!("{} {kind} 8 groups n {n} k {k}", instance.name),
                    move |h| grouped(h, instance.name, masked, n, k),
                ));
            }
        }
    }
    cases
}

fn dense(
    h: &Harness,
    instance: Option<&'static str>,
    m: usize,
    n: usize,
    k: usize,
) -> Result<Found> {
    let ld = m.next_multiple_of(4);
    let x = h.random::<u8>(m * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k / 128 * ld, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(n.div_ceil(128) * (k / 128), Kind::F32Scale, 0.001, 4)?;
    let out = h.poisoned::<u16>(m * n)?;
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
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&out)?;
        match instance {
            Some(name) => gemm::dense_with(
                &h.gpu,
                &h.stream,
                name,
                activations,
                weights,
                h.span(&out),
                n,
                false,
            )?,
            None => gemm::dense(
                &h.gpu,
                &h.stream,
                activations,
                weights,
                h.span(&out),
                n,
                false,
            )?,
        }
        *digest = h.digest(&out)?;
    }
    let out = h.download(&out)?;
    let unwritten = out.iter().filter(|&&v| v == 0xffff).count();
    let mut error = Error::default();
    let mut random = Random(5);
    let (tokens, rows) = (sample(&mut random, m, 24), sample(&mut random, n, 48));
    let host = Host {
        x: h.download_rows(&x, k, tokens.iter().copied())?,
        x_scale: h.download(&x_scale)?,
        w: h.download_rows(&w, k, rows.iter().copied())?,
        w_scale: h.download(&w_scale)?,
        table: e4m3_table(),
        ld,
        n,
        k,
    };
    for &t in &tokens {
        for &row in &rows {
            error.add(bf16(out[t * n + row]), host.product(t, 0, row));
        }
    }
    Ok(Found::new(
        &error,
        BOUND,
        digests[0] == digests[1],
        unwritten,
    ))
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
    // Empty, one token, ragged, exactly full and more than one tile.
    let counts = [0usize, 1, 37, 64, 0, 163, 130, 16];
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
    let out = h.poisoned::<u16>(rows * n)?;
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
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&out)?;
        gemm::grouped_with(
            &h.gpu,
            &h.stream,
            instance,
            activations,
            weights,
            layout,
            h.span(&out),
            n,
            false,
        )?;
        *digest = h.digest(&out)?;
    }
    let out = h.download(&out)?;
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
            table: e4m3_table(),
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
    Ok(Found::new(&error, BOUND, digests[0] == digests[1], wrong))
}

/// Operands on the host: the sampled rows.
struct Host {
    x: BTreeMap<usize, Vec<u8>>,
    x_scale: Vec<f32>,
    w: BTreeMap<usize, Vec<u8>>,
    w_scale: Vec<f32>,
    table: [f64; 256],
    ld: usize,
    n: usize,
    k: usize,
}

impl Host {
    fn product(&self, t: usize, group: usize, row: usize) -> f64 {
        let (x, w) = (&self.x[&t], &self.w[&(group * self.n + row)]);
        let scale_row = group * self.n.div_ceil(128) + row / 128;
        (0..self.k / 128)
            .map(|kb| {
                let block = kb * 128..kb * 128 + 128;
                let dot: f64 = x[block.clone()]
                    .iter()
                    .zip(&w[block])
                    .map(|(&a, &b)| self.table[a as usize] * self.table[b as usize])
                    .sum();
                let scale = f64::from(self.x_scale[kb * self.ld + t])
                    * f64::from(self.w_scale[scale_row * (self.k / 128) + kb]);
                dot * scale
            })
            .sum()
    }
}

/// Up to `count` indices below `len`: the first, the last, and random ones.
pub(crate) fn sample(random: &mut Random, len: usize, count: usize) -> Vec<usize> {
    if len <= count {
        return (0..len).collect();
    }
    let mut picked: Vec<usize> = (2..count).map(|_| random.below(len)).collect();
    picked.extend([0, len - 1]);
    picked
}
