//! BF16 products through cuBLASLt.

use kernels::cases::{Error, Random, bf16, sample};
use kernels::cuda::blas::{Blas, Pitch, Shape};
use kernels::cuda::probe::Kind;

use super::{Case, Found};
use crate::harness::{Harness, Result};

/// All cases: a language-model head, the gate's logits, absorbed queries and values with heads side by side.
pub(crate) fn cases() -> Vec<Case> {
    let heads = |m, n, k, x_row, out_row, x_product, out_product| Shape {
        m,
        n,
        k,
        batch: 16,
        x: Pitch {
            row: x_row,
            product: x_product,
        },
        w: Pitch {
            row: k,
            product: n * k,
        },
        out: Pitch {
            row: out_row,
            product: out_product,
        },
        float_out: false,
    };
    [
        ("head", Shape::plain(64, 129_280, 7168, true)),
        ("gate", Shape::plain(33, 256, 7168, true)),
        (
            "absorbed queries",
            heads(64, 512, 128, 16 * 192, 16 * 576, 192, 576),
        ),
        (
            "absorbed values",
            heads(7, 128, 512, 16 * 512, 16 * 128, 512, 128),
        ),
    ]
    .into_iter()
    .map(|(name, shape)| Case::new(format!("blas {name}"), move |h| product(h, shape)))
    .collect()
}

fn product(h: &Harness, s: Shape) -> Result<Found> {
    let blas = Blas::open()?;
    let plan = blas.plan(s, 32 << 20)?;
    let extent =
        |p: Pitch, rows: usize, cols: usize| (s.batch - 1) * p.product + (rows - 1) * p.row + cols;
    let x = h.random::<u16>(extent(s.x, s.m, s.k), Kind::Bf16Normal, 1.0, 1)?;
    let w = h.random::<u16>(extent(s.w, s.n, s.k), Kind::Bf16Normal, 1.0, 2)?;
    let workspace = h.alloc::<u8>(32 << 20)?;
    let len = extent(s.out, s.m, s.n);
    let (short, long) = (h.poisoned::<u16>(len)?, h.poisoned::<f32>(len)?);
    let mut digests = [0; 2];
    for digest in &mut digests {
        let (x, w, workspace) = (h.span(&x), h.span(&w), h.span(&workspace));
        *digest = if s.float_out {
            plan.run(&blas, &h.stream, x, w, h.span(&long), workspace)?;
            h.digest(&long)?
        } else {
            plan.run(&blas, &h.stream, x, w, h.span(&short), workspace)?;
            h.digest(&short)?
        };
    }
    let (x, w, short, long) = (
        h.download(&x)?,
        h.download(&w)?,
        h.download(&short)?,
        h.download(&long)?,
    );
    let mut error = Error::default();
    let mut random = Random(3);
    for b in sample(&mut random, s.batch, 4) {
        for t in sample(&mut random, s.m, 6) {
            for n in sample(&mut random, s.n, 20) {
                let x = &x[b * s.x.product + t * s.x.row..][..s.k];
                let w = &w[b * s.w.product + n * s.w.row..][..s.k];
                let at = b * s.out.product + t * s.out.row + n;
                let out = if s.float_out {
                    f64::from(long[at])
                } else {
                    bf16(short[at])
                };
                error.add(out, x.iter().zip(w).map(|(&a, &b)| bf16(a) * bf16(b)).sum());
            }
        }
    }
    let bound = if s.float_out { 1e-5 } else { 3e-3 };
    Ok(Found::new(&error, bound, digests[0] == digests[1], 0))
}
