//! FP8 GEMM at the network's shapes, every instance that fits.

use kernels::cases::Random;
use kernels::cuda::gemm::{self, Activations, Groups, Instance, Weights};
use kernels::cuda::probe::Kind;

use super::Case;
use crate::harness::{Harness, Result, Timing};

/// n, k, DeepGEMM's microseconds at m 32, 64, 128 and 4096.
const DENSE: [(usize, usize, [f64; 4]); 5] = [
    (2112, 7168, [10.5, 9.6, 10.4, 100.0]),
    (24576, 1536, [14.9, 14.4, 14.8, 265.1]),
    (7168, 16384, [36.5, 35.8, 47.1, 764.9]),
    (4096, 7168, [12.7, 11.7, 12.4, 191.3]),
    (7168, 2048, [7.6, 7.5, 8.4, 95.4]),
];

/// Groups, tokens of a group, n, k, DeepGEMM's microseconds; masked layout.
const MASKED: [(usize, usize, usize, usize, f64); 8] = [
    (32, 8, 4096, 7168, 238.8),
    (32, 32, 4096, 7168, 238.2),
    (32, 64, 4096, 7168, 256.0),
    (32, 128, 4096, 7168, 455.0),
    (32, 8, 7168, 2048, 133.9),
    (32, 32, 7168, 2048, 131.0),
    (32, 64, 7168, 2048, 147.0),
    (32, 128, 7168, 2048, 184.0),
];

/// The same, contiguous layout.
const CONTIGUOUS: [(usize, usize, usize, usize, f64); 4] = [
    (32, 256, 4096, 7168, 531.0),
    (32, 1024, 4096, 7168, 1680.0),
    (32, 256, 7168, 2048, 299.0),
    (32, 1024, 7168, 2048, 887.0),
];

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (n, k, peers) in DENSE {
        for (m, peer) in [32, 64, 128, 4096].into_iter().zip(peers) {
            let chosen = gemm::choose(m, n, k, 132);
            let fits = |i: &&Instance| {
                let tiles = n.div_ceil(i.rows as usize) as u32 * i.split_k;
                let one_wave = i.split_k == 1 || tiles <= 160;
                !i.grouped
                    && (i.name == chosen
                        || i.tokens as usize >= m && i.tokens as usize <= m.max(64) && one_wave
                        || i.tokens == 64 && m == 128 && 2 * tiles <= 132
                        || m > 128 && i.tokens > 64 && i.split_k == 1)
            };
            for instance in Instance::all().iter().filter(fits) {
                let mark = if instance.name == chosen { " *" } else { "" };
                cases.push(Case {
                    name: format!("fp8 dense m {m} ({n},{k}) {}{mark}", &instance.name[4..]),
                    peer: Some((peer, "DeepGEMM")),
                    bytes: (n * k + m * k + 2 * m * n) as f64,
                    flops: 2.0 * (m * n * k) as f64,
                    run: Box::new(move |h| dense(h, instance.name, m, n, k)),
                });
            }
        }
    }
    for (masked, list) in [(true, &MASKED[..]), (false, &CONTIGUOUS[..])] {
        for &(groups, m, n, k, peer) in list {
            let kind = if masked { "masked" } else { "contiguous" };
            let enough = |i: &&Instance| {
                i.grouped
                    && (i.tokens as usize >= m.min(128))
                    && i.tokens as usize <= (4 * m).max(32)
            };
            for instance in Instance::all().iter().filter(enough) {
                cases.push(Case {
                    name: format!(
                        "fp8 {kind} {groups} x {m} ({n},{k}) {}",
                        &instance.name[4..]
                    ),
                    peer: Some((peer, "DeepGEMM")),
                    bytes: (groups * (n * k + m * k + 2 * m * n)) as f64,
                    flops: 2.0 * (groups * m * n * k) as f64,
                    run: Box::new(move |h| grouped(h, instance.name, masked, groups, m, n, k)),
                });
            }
        }
    }
    cases
}

fn dense(h: &Harness, instance: &str, m: usize, n: usize, k: usize) -> Result<Timing> {
    let (ld, k_blocks) = (m.next_multiple_of(4), k / 128);
    let sets = super::sets(n * k);
    let x = h.random::<u8>(m * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k_blocks * ld, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(sets * n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(n.div_ceil(128) * k_blocks, Kind::F32Scale, 0.001, 4)?;
    let out = h.alloc::<u16>(m * n)?;
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows: m,
        ld,
    };
    h.time(12.0, 7, |i| {
        let data = h.span(&w).from(i % sets * n * k);
        let weights = Weights {
            data,
            scales: h.span(&w_scale),
            n,
            k,
            groups: 1,
        };
        Ok(gemm::dense_with(
            &h.gpu,
            &h.stream,
            instance,
            activations,
            weights,
            h.span(&out),
            n,
            true,
        )?)
    })
}

fn grouped(
    h: &Harness,
    instance: &str,
    masked: bool,
    groups: usize,
    m: usize,
    n: usize,
    k: usize,
) -> Result<Timing> {
    // Group sizes 0.7 to 1.3 times the nominal one.
    let mut random = Random(7);
    let counts: Vec<usize> = (0..groups)
        .map(|_| ((0.7 + 0.6 * random.unit()) * m as f64).round().max(1.0) as usize)
        .collect();
    let stride = (2 * m).next_multiple_of(4);
    let rows = if masked {
        groups * stride
    } else {
        counts.iter().sum()
    };
    let (ld, k_blocks) = (rows.next_multiple_of(4), k / 128);
    let sets = super::sets(groups * n * k);
    let x = h.random::<u8>(rows * k, Kind::Fp8Normal, 100.0, 1)?;
    let x_scale = h.random::<f32>(k_blocks * ld, Kind::F32Scale, 0.01, 2)?;
    let w = h.random::<u8>(sets * groups * n * k, Kind::Fp8Normal, 100.0, 3)?;
    let w_scale = h.random::<f32>(groups * (n / 128) * k_blocks, Kind::F32Scale, 0.001, 4)?;
    let out = h.alloc::<u16>(rows * n)?;
    let list: Vec<i32> = if masked {
        counts.iter().map(|&c| c as i32).collect()
    } else {
        std::iter::once(0)
            .chain(counts.iter().scan(0, |sum, &c| {
                *sum += c as i32;
                Some(*sum)
            }))
            .collect()
    };
    let list = h.upload(&list)?;
    let activations = Activations {
        data: h.span(&x),
        scales: h.span(&x_scale),
        rows,
        ld,
    };
    let layout = if masked {
        Groups::Masked(h.span(&list), stride)
    } else {
        Groups::Contiguous(h.span(&list))
    };
    h.time(12.0, 7, |i| {
        let data = h.span(&w).from(i % sets * groups * n * k);
        let weights = Weights {
            data,
            scales: h.span(&w_scale),
            n,
            k,
            groups,
        };
        Ok(gemm::grouped_with(
            &h.gpu,
            &h.stream,
            instance,
            activations,
            weights,
            layout,
            h.span(&out),
            n,
            true,
        )?)
    })
}
