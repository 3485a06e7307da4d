//! BF16 products through cuBLASLt. Their peer is the same library on the device where all peers were timed, so that these rows are
//! the ruler of a run: its ratio says what this device and this minute make of a product that is bound by power, or by memory.

use kernels::cuda::blas::{Blas, Shape};
use kernels::cuda::probe::Kind;

use super::Case;
use crate::harness::{Harness, Result, Timing};

/// m, n, k and the library's microseconds then.
const CASES: [(usize, usize, usize, f64); 7] = [
    (64, 129_280, 7168, 441.0),
    (64, 7168, 16384, 62.2),
    (4096, 2112, 7168, 194.7),
    (4096, 24576, 1536, 443.3),
    (4096, 7168, 16384, 1414.5),
    (4096, 4096, 7168, 360.2),
    (4096, 7168, 2048, 177.1),
];

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    CASES
        .into_iter()
        .map(|(m, n, k, peer)| Case {
            name: format!("blas bf16 m {m} ({n},{k})"),
            peer: Some((peer, "cuBLASLt")),
            bytes: 2.0 * (n * k + m * k + m * n) as f64,
            flops: 2.0 * (m * n * k) as f64,
            run: Box::new(move |h| product(h, m, n, k)),
        })
        .collect()
}

fn product(h: &Harness, m: usize, n: usize, k: usize) -> Result<Timing> {
    const WORKSPACE: usize = 32 << 20;
    let blas = Blas::open()?;
    let plan = blas.plan(Shape::plain(m, n, k, false), WORKSPACE)?;
    let sets = super::sets(2 * n * k);
    let x = h.random::<u16>(m * k, Kind::Bf16Normal, 1.0, 1)?;
    let w = h.random::<u16>(sets * n * k, Kind::Bf16Normal, 1.0, 2)?;
    let (out, workspace) = (h.alloc::<u16>(m * n)?, h.alloc::<u8>(WORKSPACE)?);
    h.time(12.0, 7, |i| {
        Ok(plan.run(
            &blas,
            &h.stream,
            h.span(&x),
            h.span(&w).from(i % sets * n * k),
            h.span(&out),
            h.span(&workspace),
        )?)
    })
}
