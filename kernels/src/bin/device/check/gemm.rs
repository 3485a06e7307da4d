//! FP8 GEMM: dense and grouped.

use kernels::cases::gemm::{Gemm, Grouped, Operands};
use kernels::cases::{Error, Operation, floats};
use kernels::cuda::Span;
use kernels::cuda::gemm::{self, Activations, Groups, Instance, Weights};
use kernels::cuda::probe::Kind;

use super::{Case, Found, Ran};
use crate::harness::{Harness, Result};

/// BF16 output and the tensor cores' 14-bit sums inside a block.
const BOUND: f64 = Gemm::BOUND;

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (m, n, k) in Gemm::list() {
        cases.push(dense(format!("fp8_gemm m {m} n {n} k {k}"), None, m, n, k));
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
            cases.push(dense(name, Some(instance.name), m, n, k));
        }
    }
    for instance in Instance::all().iter().filter(|i| i.grouped) {
        for masked in [true, false] {
            let kind = if masked { "masked" } else { "contiguous" };
            for (n, k) in [(4096, 7168), (7168, 2048), (512, 256)] {
                cases.push(Case::shared(
                    format!("{} {kind} 8 groups n {n} k {k}", instance.name),
                    move || Grouped::new(n, k),
                    move |h, case| experts(h, instance.name, masked, case),
                ));
            }
        }
    }
    cases
}

/// One matrix, by the instance named or the one that is chosen.
fn dense(name: String, instance: Option<&'static str>, m: usize, n: usize, k: usize) -> Case {
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
