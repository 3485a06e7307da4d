//! MLA prefill.

use cudarc::driver::CudaSlice;
use kernels::cuda::prefill::{self, Inputs, KEY_VALUE, QUERY, ROPE, Shape, VALUE};
use kernels::cuda::probe::Kind;

use super::gemm::sample;
use super::mla::SCALE;
use super::{Case, Found};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16};

/// BF16 probabilities and output.
const BOUND: f64 = 5e-3;

/// Queries and context of each sequence.
type List = Vec<(usize, usize)>;

/// All cases: (queries, context) of each sequence.
pub(crate) fn cases() -> Vec<Case> {
    let lists = [
        ("one token", 128, vec![(1, 1)]),
        ("a tile", 16, vec![(128, 128)]),
        (
            "ragged",
            32,
            vec![
                (5, 5),
                (129, 129),
                (1, 300),
                (200, 333),
                (0, 0),
                (127, 1000),
            ],
        ),
        ("cached prefix", 16, vec![(64, 2048), (300, 4000)]),
        ("4096", 128, vec![(4096, 4096)]),
        ("16384", 4, vec![(16384, 16384)]),
    ];
    let case = |(name, heads, list): (&str, usize, List)| {
        Case::new(format!("mla_prefill heads {heads} {name}"), move |h| {
            check(h, heads, &list)
        })
    };
    lists.into_iter().map(case).collect()
}

/// Buffers of a prefill step.
pub(crate) struct Step {
    shape: Shape,
    q: CudaSlice<u16>,
    kv: CudaSlice<u16>,
    rope: CudaSlice<u16>,
    query_start: CudaSlice<i32>,
    context_start: CudaSlice<i32>,
    out: CudaSlice<u16>,
    lse: CudaSlice<f32>,
}

impl Step {
    /// Random inputs for sequences of (queries, context).
    pub(crate) fn new(h: &Harness, heads: usize, list: &[(usize, usize)]) -> Result<Self> {
        let (rows, context) = (
            list.iter().map(|l| l.0).sum(),
            list.iter().map(|l| l.1).sum(),
        );
        let shape = Shape {
            sequences: list.len(),
            rows,
            context,
            max_query: list.iter().map(|l| l.0).max().unwrap_or(0),
            heads,
        };
        Ok(Self {
            shape,
            q: h.random(rows * heads * QUERY, Kind::Bf16Normal, 1.0, 1)?,
            kv: h.random(context * heads * KEY_VALUE, Kind::Bf16Normal, 0.6, 2)?,
            rope: h.random(context * ROPE, Kind::Bf16Normal, 0.6, 3)?,
            query_start: h.upload(&starts(list.iter().map(|l| l.0)))?,
            context_start: h.upload(&starts(list.iter().map(|l| l.1)))?,
            out: h.poisoned(rows * heads * VALUE)?,
            lse: h.poisoned(rows * heads)?,
        })
    }

    /// Attends.
    pub(crate) fn attend(&self, h: &Harness, overlap: bool) -> Result<()> {
        let inputs = Inputs {
            q: h.span(&self.q),
            kv: h.span(&self.kv),
            rope: h.span(&self.rope),
            query_start: h.span(&self.query_start),
            context_start: h.span(&self.context_start),
        };
        let (out, lse) = (h.span(&self.out), h.span(&self.lse));
        Ok(prefill::attend(
            &h.gpu,
            &h.stream,
            self.shape,
            inputs,
            SCALE,
            out,
            Some(lse),
            overlap,
        )?)
    }
}

fn starts(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut sum = 0;
    let ends = lengths.map(|l| {
        sum += l as i32;
        sum
    });
    std::iter::once(0).chain(ends).collect()
}

fn check(h: &Harness, heads: usize, list: &[(usize, usize)]) -> Result<Found> {
    let step = Step::new(h, heads, list)?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&step.out)?;
        step.attend(h, false)?;
        *digest = h.digest(&step.out)?;
    }
    let (q, kv, rope) = (
        h.download(&step.q)?,
        h.download(&step.kv)?,
        h.download(&step.rope)?,
    );
    let (out, lse) = (h.download(&step.out)?, h.download(&step.lse)?);
    let mut wrong = out.iter().filter(|&&v| v == 0xffff).count();
    let mut error = Error::default();
    let mut random = Random(9);
    let (mut first_row, mut first_token) = (0, 0);
    for &(queries, context) in list {
        for i in sample(&mut random, queries, 6) {
            for head in sample(&mut random, heads, 3) {
                let row = (first_row + i) * heads + head;
                let q: Vec<f64> = q[row * QUERY..][..QUERY].iter().map(|&v| bf16(v)).collect();
                let visible = context - queries + i + 1;
                let entry =
                    |t: usize| &kv[((first_token + t) * heads + head) * KEY_VALUE..][..KEY_VALUE];
                let scores: Vec<f64> = (0..visible)
                    .map(|t| {
                        let key = entry(t)[..128]
                            .iter()
                            .chain(&rope[(first_token + t) * ROPE..][..ROPE]);
                        f64::from(SCALE) * q.iter().zip(key).map(|(a, &b)| a * bf16(b)).sum::<f64>()
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let mut reference = [0.0; VALUE];
                for (t, score) in scores.iter().enumerate() {
                    for (r, &v) in reference.iter_mut().zip(&entry(t)[128..]) {
                        *r += (score - top).exp() / total * bf16(v);
                    }
                }
                for (&o, r) in out[row * VALUE..][..VALUE].iter().zip(reference) {
                    error.add(bf16(o), r);
                }
                wrong += usize::from((f64::from(lse[row]) - top - total.ln()).abs() > 2e-2);
            }
        }
        first_row += queries;
        first_token += context;
    }
    Ok(Found::new(&error, BOUND, digests[0] == digests[1], wrong))
}
