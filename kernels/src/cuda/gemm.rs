//! FP8 GEMM with block scales, dense and grouped (`fp8_gemm.cu`).
//!
//! `out[t][n] = sum over k of x[t][k] * w[n][k]`, both E4M3; `x` has a scale per row and 128 columns, `w` one per 128x128
//! block. Scales of `x` lie with the rows innermost, `[k / 128][ld]`, as the quantising kernels write them.
//!
//! How a sum over K is cut depends on the instance, and [`choose`] takes it by the batch's size class: a token's bits depend on
//! that class, never on its neighbours. Where they must not depend on the class either, name [`PINNED`] for all sizes
//! ([`dense_with`]); a grouped product is pinned by naming any one instance ([`grouped_with`]).

use cudarc::driver::CudaStream;

use super::launch::arguments;
use super::tensor_map::{Element, tensor_map};
use super::{Gpu, Launch, Result, Span, require};

mod instance;

pub use instance::{Design, Instance, Share};

/// Weights: `[groups * n][k]` E4M3 and their scales `[groups][ceil(n / 128)][k / 128]`.
#[derive(Clone, Copy, Debug)]
pub struct Weights {
    /// E4M3 values.
    pub data: Span<u8>,
    /// Multiplicative scales.
    pub scales: Span<f32>,
    /// Outputs of one group, a multiple of 64.
    pub n: usize,
    /// Inputs, a multiple of 128.
    pub k: usize,
    /// Number of matrices.
    pub groups: usize,
}

/// Quantised activations: E4M3 `[rows][k]`, scales `[k / 128][ld]` with `ld` a multiple of 4 not below `rows`.
#[derive(Clone, Copy, Debug)]
pub struct Activations {
    /// E4M3 values.
    pub data: Span<u8>,
    /// Multiplicative scales, rows innermost.
    pub scales: Span<f32>,
    /// Rows.
    pub rows: usize,
    /// Distance of two scales of a row.
    pub ld: usize,
}

/// Which rows belong to which group. Read on the device.
#[derive(Clone, Copy, Debug)]
pub enum Groups {
    /// `[groups + 1]`: group g owns rows `starts[g]..starts[g + 1]`.
    Contiguous(Span<i32>),
    /// `[groups]`: group g owns the first `counts[g]` of its `stride` rows.
    Masked(Span<i32>, usize),
}

/// The kernel's `GemmArgs`.
#[repr(C)]
struct Args {
    w_scale: u64,
    x_scale: u64,
    out: u64,
    counts: u64,
    starts: u64,
    m: u32,
    n: u32,
    k: u32,
    groups: u32,
    group_stride: u32,
    ld_scale: u32,
    ld_out: u32,
    stream_weights: u32,
}

/// A dense instance that is right for every number of tokens and adds each token's products in the same order in all of them.
pub const PINNED: &str = "fp8_gemm_r128_t128_k1";

/// The dense instance for `m` tokens, measured best on an H200 (README.md has the table).
pub fn choose(m: usize, n: usize, k: usize, sms: u32) -> &'static str {
    let (sms, k_blocks) = (sms as usize, k / 128);
    let tiles = |rows: usize| n.div_ceil(rows);
    if m <= 64 {
        // Enough CTAs to keep HBM busy, few enough that one wave holds them. Clusters of four and more leave
        // multiprocessors idle: 132 of them do not divide so.
        return if tiles(64) * 2 <= sms && k_blocks >= 16 {
            "fp8_gemm_r64_t64_k2_d2"
        } else if tiles(128) * 2 <= sms && k_blocks >= 64 {
            "fp8_gemm_r128_t64_k2"
        } else if tiles(64) <= sms {
            "fp8_gemm_r64_t64_k1_d2"
        } else {
            "fp8_gemm_r192_t64_k1"
        };
    }
    if m <= 128 && tiles(64) * 4 <= sms && k_blocks >= 16 {
        return "fp8_gemm_r64_t64_k2_d2"; // twice 64 tokens
    }
    if m <= 128 && tiles(64) * 2 <= sms && k_blocks >= 32 {
        return "fp8_gemm_r64_t64_k1_d2";
    }
    if m <= 128 && tiles(128) * 2 <= sms && k_blocks >= 8 {
        return "fp8_gemm_r128_t128_k2";
    }
    // Waves of tiles, each with its time as measured.
    let cost = |rows: usize, tokens: usize, tile: f64| {
        (tiles(rows) * m.div_ceil(tokens)).div_ceil(sms) as f64 * tile
    };
    [
        ("fp8_prefill_t256_n128", cost(128, 256, 2.0)),
        ("fp8_prefill_t128_n192_weights", cost(192, 128, 1.65)),
        ("fp8_gemm_r128_t128_k1", cost(128, 128, 1.35)),
    ]
    .into_iter()
    .min_by(|a, b| a.1.total_cmp(&b.1))
    .expect("three of them")
    .0
}

/// Dense product: `out` is BF16 `[rows][ld_out]`.
pub fn dense(
    gpu: &Gpu,
    stream: &CudaStream,
    x: Activations,
    w: Weights,
    out: Span<u16>,
    ld_out: usize,
    overlap: bool,
) -> Result<()> {
    let name = choose(x.rows, w.n, w.k, gpu.sms());
    dense_with(gpu, stream, name, x, w, out, ld_out, overlap)
}

/// [`dense`] with a named instance of the kernel.
pub fn dense_with(
    gpu: &Gpu,
    stream: &CudaStream,
    instance: &str,
    x: Activations,
    w: Weights,
    out: Span<u16>,
    ld_out: usize,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "fp8_gemm";
    let instance = find(instance, false)?;
    require(KERNEL, w.groups == 1, || {
        format!("dense with {} groups", w.groups)
    })?;
    require(
        KERNEL,
        out.len() >= x.rows.saturating_sub(1) * ld_out + w.n,
        || format!("output of {} elements for {} x {ld_out}", out.len(), x.rows),
    )?;
    let (rows, tokens) = instance.cluster_tile();
    let clusters = (w.n.div_ceil(rows as usize) * x.rows.div_ceil(tokens as usize)) as u32;
    let blocks = if instance.split_k > 1 {
        clusters * instance.split_k
    } else {
        instance.cluster() * clusters.min(instance.clusters(gpu.sms()))
    };
    launch(
        gpu, stream, instance, x, w, None, out, ld_out, blocks, overlap,
    )
}

/// Grouped product. `expected` is the usual number of rows of a group (it picks the tile; any count gives right results).
pub fn grouped(
    gpu: &Gpu,
    stream: &CudaStream,
    x: Activations,
    w: Weights,
    groups: Groups,
    expected: usize,
    out: Span<u16>,
    ld_out: usize,
    overlap: bool,
) -> Result<()> {
    let name = match expected {
        0..=12 => "fp8_gemm_grouped_r128_t16",
        13..=48 => "fp8_gemm_grouped_r128_t64",
        49..=96 => "fp8_gemm_grouped_r128_t128",
        _ => "fp8_prefill_grouped_t192_n128_tokens",
    };
    grouped_with(gpu, stream, name, x, w, groups, out, ld_out, overlap)
}

/// [`grouped`] with a named instance of the kernel.
pub fn grouped_with(
    gpu: &Gpu,
    stream: &CudaStream,
    instance: &str,
    x: Activations,
    w: Weights,
    groups: Groups,
    out: Span<u16>,
    ld_out: usize,
    overlap: bool,
) -> Result<()> {
    const KERNEL: &str = "fp8_gemm_grouped";
    let instance = find(instance, true)?;
    let listed = match groups {
        Groups::Contiguous(starts) => starts.len() > w.groups,
        Groups::Masked(counts, stride) => counts.len() >= w.groups && w.groups * stride <= x.rows,
    };
    require(KERNEL, listed, || {
        format!(
            "{groups:?} does not describe {} groups of {} rows",
            w.groups, x.rows
        )
    })?;
    require(KERNEL, w.n.is_multiple_of(128) || w.groups == 1, || {
        format!("groups of {} outputs", w.n)
    })?;
    require(
        KERNEL,
        out.len() >= x.rows.saturating_sub(1) * ld_out + w.n,
        || format!("output of {} elements for {} x {ld_out}", out.len(), x.rows),
    )?;
    launch(
        gpu,
        stream,
        instance,
        x,
        w,
        Some(groups),
        out,
        ld_out,
        instance.cluster() * instance.clusters(gpu.sms()),
        overlap,
    )
}

fn find(name: &str, grouped: bool) -> Result<Instance> {
    let instance = Instance::find(name).filter(|i| i.grouped == grouped);
    instance.ok_or_else(|| super::Error::Shape {
        kernel: "fp8_gemm",
        detail: format!("no instance {name} with grouped = {grouped}"),
    })
}

fn launch(
    gpu: &Gpu,
    stream: &CudaStream,
    instance: Instance,
    x: Activations,
    w: Weights,
    groups: Option<Groups>,
    out: Span<u16>,
    ld_out: usize,
    blocks: u32,
    overlap: bool,
) -> Result<()> {
    let name = instance.name;
    let k_blocks = w.k / 128;
    require(
        name,
        w.n.is_multiple_of(64) && w.k.is_multiple_of(128) && k_blocks >= instance.split_k as usize,
        || {
            format!(
                "n {} k {}: n must be a multiple of 64, k of 128, at least {} blocks",
                w.n, w.k, instance.split_k
            )
        },
    )?;
    require(
        name,
        x.ld.is_multiple_of(4) && x.ld >= x.rows && x.scales.len() >= k_blocks * x.ld,
        || {
            format!(
                "{} scales for {} rows at pitch {}, k {}",
                x.scales.len(),
                x.rows,
                x.ld,
                w.k
            )
        },
    )?;
    require(
        name,
        x.data.len() >= x.rows * w.k && w.data.len() >= w.groups * w.n * w.k,
        || {
            format!(
                "{} activations, {} weights for {} x {} x {} x {}",
                x.data.len(),
                w.data.len(),
                x.rows,
                w.groups,
                w.n,
                w.k
            )
        },
    )?;
    require(
        name,
        w.scales.len() >= w.groups * w.n.div_ceil(128) * k_blocks,
        || {
            format!(
                "{} weight scales for {} x {} x {}",
                w.scales.len(),
                w.groups,
                w.n,
                w.k
            )
        },
    )?;
    require(name, ld_out.is_multiple_of(8) && ld_out >= w.n, || {
        format!("output pitch {ld_out} for n {}", w.n)
    })?;
    let k = w.k as u64;
    let w_map = tensor_map(
        name,
        Element::Fp8,
        w.data.address(),
        &[k, (w.groups * w.n) as u64],
        &[k],
        &[128, instance.weight_box()],
    )?;
    let x_map = tensor_map(
        name,
        Element::Fp8,
        x.data.address(),
        &[k, x.rows as u64],
        &[k],
        &[128, instance.token_box()],
    )?;
    let (counts, starts, stride) = match groups {
        None => (0, 0, 0),
        Some(Groups::Contiguous(starts)) => (0, starts.address(), 0),
        Some(Groups::Masked(counts, stride)) => (counts.address(), 0, stride),
    };
    let args = Args {
        w_scale: w.scales.address(),
        x_scale: x.scales.address(),
        out: out.address(),
        counts,
        starts,
        m: x.rows as u32,
        n: w.n as u32,
        k: w.k as u32,
        groups: w.groups as u32,
        group_stride: stride as u32,
        ld_scale: x.ld as u32,
        ld_out: ld_out as u32,
        stream_weights: u32::from(
            instance.design == Design::Weights && (x.rows <= 256 || groups.is_some()),
        ),
    };
    let launch = Launch {
        grid: [blocks, 1, 1],
        threads: instance.threads(),
        shared_bytes: instance.shared_bytes(w.groups),
        cluster: instance.cluster(),
        overlap,
    };
    if instance.design == Design::Weights {
        // SAFETY: kernel(TensorMap, TensorMap, GemmArgs), laid out as declared above.
        return unsafe {
            launch.run(
                gpu,
                stream,
                "fp8_gemm",
                name,
                arguments![w_map, x_map, args],
            )
        };
    }
    let out_map = tensor_map(
        name,
        Element::Bf16,
        out.address(),
        &[w.n as u64, x.rows as u64],
        &[ld_out as u64 * 2],
        &[64, 16],
    )?;
    // SAFETY: kernel(TensorMap, TensorMap, TensorMap, GemmArgs), laid out as declared above.
    unsafe {
        launch.run(
            gpu,
            stream,
            "fp8_prefill",
            name,
            arguments![w_map, x_map, out_map, args],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::gpu::SHARED_LIMIT;

    #[test]
    fn every_instance_fits_a_multiprocessor() {
        assert!(Instance::all().len() >= 10);
        for instance in Instance::all() {
            let groups = if instance.grouped { 256 } else { 1 };
            assert!(
                instance.shared_bytes(groups) <= SHARED_LIMIT,
                "{instance:?}"
            );
            assert!(instance.threads() <= 640, "{instance:?}");
        }
    }

    #[test]
    fn measured_shapes_get_their_fastest_instance() {
        for (m, n, k, name) in [
            (64, 2112, 7168, "fp8_gemm_r64_t64_k2_d2"),
            (64, 24576, 1536, "fp8_gemm_r192_t64_k1"),
            (64, 7168, 16384, "fp8_gemm_r128_t64_k2"),
            (64, 4096, 7168, "fp8_gemm_r64_t64_k2_d2"),
            (64, 7168, 2048, "fp8_gemm_r64_t64_k1_d2"),
            (128, 2112, 7168, "fp8_gemm_r64_t64_k2_d2"),
            (128, 4096, 7168, "fp8_gemm_r64_t64_k1_d2"),
            (128, 7168, 2048, "fp8_gemm_r128_t128_k2"),
            (256, 4096, 7168, "fp8_gemm_r128_t128_k1"),
            (4096, 4096, 7168, "fp8_prefill_t256_n128"),
            (4096, 7168, 16384, "fp8_prefill_t256_n128"),
            (4096, 24576, 1536, "fp8_prefill_t256_n128"),
            (4096, 2112, 7168, "fp8_prefill_t128_n192_weights"),
        ] {
            assert_eq!(choose(m, n, k, 132), name, "m {m} n {n} k {k}");
        }
    }

    #[test]
    fn every_choice_is_an_instance() {
        for m in [1, 16, 17, 64, 65, 128, 129, 4096] {
            for (n, k) in [
                (2112, 7168),
                (24576, 1536),
                (7168, 16384),
                (4096, 7168),
                (7168, 2048),
                (64, 128),
                (576, 256),
            ] {
                let instance = Instance::find(choose(m, n, k, 132)).unwrap();
                assert!(!instance.grouped && k / 128 >= instance.split_k as usize);
            }
        }
    }
}
