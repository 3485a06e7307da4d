//! The steps between the products, the gate, sampling and MLA prefill.

use cudarc::driver::CudaSlice;
use kernels::cases::moe::V3;
use kernels::cuda::pointwise::{self, Output, Quantised, ScaleFormat};
use kernels::cuda::probe::Kind;
use kernels::cuda::routing;
use kernels::cuda::sampling::{self, Choice};

use super::Case;
use crate::check::prefill::Step;
use crate::harness::{Harness, Result, Timing};

/// All cases. Peers: own Triton kernels for the fused rows, FlashAttention-3 for prefill.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut row = |name: String, peer, bytes: usize, flops: f64, run: super::Run| {
        cases.push(Case {
            name,
            peer,
            bytes: bytes as f64,
            flops,
            run,
        });
    };
    for (rows, peer) in [(64, 3.85), (128, 4.55), (4096, 54.3)] {
        let bytes = rows * 7168 * (3 * 2 + 1 + 2);
        let run = Box::new(move |h: &Harness| add_norm(h, rows));
        row(
            format!("add + norm + quantise [{rows}, 7168]"),
            Some((peer, "Triton")),
            bytes,
            0.0,
            run,
        );
    }
    for (rows, peer) in [(128, 1.9), (1024, 5.3), (4096, 12.6)] {
        let bytes = rows * 2048 * 5;
        let run = Box::new(move |h: &Harness| swiglu(h, rows));
        row(
            format!("swiglu + quantise [{rows}, 2 x 2048]"),
            Some((peer, "Triton")),
            bytes,
            0.0,
            run,
        );
    }
    for tokens in [1, 128, 4096] {
        let run = Box::new(move |h: &Harness| gate(h, tokens));
        row(
            format!("gate [{tokens}, 256]"),
            None,
            tokens * 256 * 4,
            0.0,
            run,
        );
    }
    for (rows, temperature) in [(128, 0.0), (128, 0.8)] {
        let run = Box::new(move |h: &Harness| sample(h, rows, temperature));
        row(
            format!("sample [{rows}, 129280] temperature {temperature}"),
            None,
            rows * 129_280 * 4,
            0.0,
            run,
        );
    }
    let prefill = [
        (128, 2048, 1, 305.0),
        (128, 4096, 1, 1110.0),
        (128, 8192, 1, 4194.0),
        (32, 4096, 1, 287.0),
        (32, 4096, 4, 1113.0),
    ];
    for (heads, tokens, batch, peer) in prefill {
        let flops = (batch * heads * tokens) as f64 * tokens as f64 * 320.0;
        let bytes = batch * heads * tokens * (192 + 256 + 128) * 2;
        let run = Box::new(move |h: &Harness| {
            let step = Step::random(h, heads, &vec![(tokens, tokens); batch])?;
            h.time(12.0, 7, |_| step.attend(h, true))
        });
        row(
            format!("mla prefill heads {heads} batch {batch} x {tokens}"),
            Some((peer, "FA3")),
            bytes,
            flops,
            run,
        );
    }
    cases
}

/// Output of `rows` x `cols`, BF16 and quantised.
fn target(
    h: &Harness,
    rows: usize,
    cols: usize,
) -> Result<(CudaSlice<u16>, CudaSlice<u8>, CudaSlice<f32>)> {
    Ok((
        h.alloc(rows * cols)?,
        h.alloc(rows * cols)?,
        h.alloc(rows.next_multiple_of(4) * cols / 128)?,
    ))
}

fn quantised(h: &Harness, data: &CudaSlice<u8>, scales: &CudaSlice<f32>, rows: usize) -> Quantised {
    let ld = rows.next_multiple_of(4);
    Quantised {
        data: h.span(data),
        scales: h.span(scales),
        ld,
        scale: ScaleFormat::F32,
    }
}

/// Buffer sets of 256 MB in all, so that inputs are cold.
fn sets(bytes: usize) -> usize {
    ((256 << 20) / bytes).clamp(2, 64)
}

fn add_norm(h: &Harness, rows: usize) -> Result<Timing> {
    const COLS: usize = 7168;
    let sets = sets(rows * COLS * 4);
    let residual = h.random::<u16>(sets * rows * COLS, Kind::Bf16Normal, 1.0, 1)?;
    let delta = h.random::<u16>(sets * rows * COLS, Kind::Bf16Normal, 1.0, 2)?;
    let weight = h.random::<f32>(COLS, Kind::F32Scale, 1.0, 3)?;
    let (plain, data, scales) = target(h, rows, COLS)?;
    h.time(4.0, 7, |i| {
        let at = i % sets * rows * COLS;
        let out = Output {
            plain: Some(h.span(&plain)),
            quantised: Some(quantised(h, &data, &scales, rows)),
        };
        let (residual, delta) = (h.span(&residual).from(at), Some(h.span(&delta).from(at)));
        Ok(pointwise::add_norm(
            &h.gpu,
            &h.stream,
            residual,
            COLS,
            delta,
            h.span(&weight),
            1e-6,
            rows,
            COLS,
            out,
            true,
        )?)
    })
}

fn swiglu(h: &Harness, rows: usize) -> Result<Timing> {
    const COLS: usize = 2048;
    let sets = sets(rows * COLS * 4);
    let x = h.random::<u16>(sets * rows * 2 * COLS, Kind::Bf16Normal, 1.0, 1)?;
    let (_, data, scales) = target(h, rows, COLS)?;
    h.time(4.0, 7, |i| {
        let out = Output {
            plain: None,
            quantised: Some(quantised(h, &data, &scales, rows)),
        };
        let x = h.span(&x).from(i % sets * rows * 2 * COLS);
        Ok(pointwise::swiglu(
            &h.gpu, &h.stream, x, rows, COLS, None, out, true,
        )?)
    })
}

fn gate(h: &Harness, tokens: usize) -> Result<Timing> {
    let logits = h.random::<f32>(tokens * V3.experts, Kind::F32Normal, 1.0, 1)?;
    let bias = h.random::<f32>(V3.experts, Kind::F32Scale, 0.1, 2)?;
    let (chosen, weights) = (
        h.alloc::<i32>(tokens * V3.top_k)?,
        h.alloc::<f32>(tokens * V3.top_k)?,
    );
    let counts = h.upload(&vec![0i32; V3.experts])?;
    h.time(4.0, 7, |_| {
        let out = (h.span(&chosen), h.span(&weights));
        let (logits, bias) = (h.span(&logits), h.span(&bias));
        Ok(routing::gate(
            &h.gpu,
            &h.stream,
            V3,
            logits,
            bias,
            tokens,
            out,
            h.span(&counts),
            true,
        )?)
    })
}

fn sample(h: &Harness, rows: usize, temperature: f32) -> Result<Timing> {
    const VOCAB: usize = 129_280;
    let logits = h.random::<f32>(rows * VOCAB, Kind::F32Normal, 3.0, 1)?;
    let (t, p) = (
        h.upload(&vec![temperature; rows])?,
        h.upload(&vec![0.95f32; rows])?,
    );
    let u = h.upload(&vec![0.5f32; rows])?;
    let out = h.alloc::<i32>(rows)?;
    h.time(4.0, 7, |_| {
        let choice = Choice {
            temperature: h.span(&t),
            top_p: h.span(&p),
            uniform: h.span(&u),
        };
        Ok(sampling::sample(
            &h.gpu,
            &h.stream,
            h.span(&logits),
            rows,
            VOCAB,
            VOCAB,
            choice,
            h.span(&out),
            true,
        )?)
    })
}
