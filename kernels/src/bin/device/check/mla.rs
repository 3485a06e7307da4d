//! MLA decode.

use cudarc::driver::CudaSlice;
use kernels::cuda::mla::{self, BLOCK, Cache, LATENT, Shape, WIDTH, Workspace};
use kernels::cuda::probe::Kind;

use super::gemm::sample;
use super::{Case, Found};
use crate::harness::{Harness, Result};
use crate::reference::{Error, Random, bf16};

/// BF16 probabilities and output.
const BOUND: f64 = 5e-3;
/// DeepSeek-V3's softmax scale.
pub(crate) const SCALE: f32 = 0.135_233_78;

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for heads in [128usize, 64, 32, 16] {
        for queries in [1usize, 2, 4] {
            for (name, lengths) in lengths() {
                for pair in [false, true] {
                    let (kind, lengths) = (if pair { "pair" } else { "one" }, lengths.clone());
                    // A pair shares the cache between two tiles of 64 query rows.
                    if !pair || (heads * queries).div_ceil(64).is_multiple_of(2) {
                        cases.push(Case::new(
                            format!("mla_decode {kind} heads {heads} queries {queries} {name}"),
                            move |h| decode(h, heads, queries, &lengths, pair),
                        ));
                    }
                }
            }
        }
    }
    cases
}

fn lengths() -> [(&'static str, Vec<usize>); 6] {
    let mut random = Random(3);
    [
        ("one token beyond the queries", vec![5]),
        ("block edges", vec![4, 63, 64, 65, 127, 128, 129, 192]),
        ("one long", vec![8192]),
        ("four long", vec![4096, 4000, 3999, 64]),
        ("an empty one", vec![100, 0, 700]),
        (
            "more than parts",
            (0..150).map(|_| 4 + random.below(600)).collect(),
        ),
    ]
}

/// Buffers of a decode step.
pub(crate) struct Step {
    /// Its shape.
    pub(crate) shape: Shape,
    /// Queries.
    pub(crate) q: CudaSlice<u16>,
    cache: CudaSlice<u16>,
    blocks: usize,
    layers: usize,
    lengths: CudaSlice<i32>,
    table: CudaSlice<i32>,
    parts: CudaSlice<i32>,
    pieces: CudaSlice<i32>,
    partial: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    /// Output.
    pub(crate) out: CudaSlice<u16>,
    host_table: Vec<i32>,
}

impl Step {
    /// Random queries and cache; blocks in random order.
    pub(crate) fn new(
        h: &Harness,
        heads: usize,
        queries: usize,
        lengths: &[usize],
        layers: usize,
    ) -> Result<Self> {
        let max_blocks = lengths
            .iter()
            .map(|l| l.div_ceil(BLOCK))
            .max()
            .unwrap_or(0)
            .max(1);
        let shape = Shape {
            batch: lengths.len(),
            queries,
            heads,
            max_blocks,
        };
        let blocks: usize = lengths.iter().map(|l| l.div_ceil(BLOCK)).sum::<usize>() + 3;
        let mut order: Vec<i32> = (0..blocks as i32).collect();
        let mut random = Random(11);
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        let mut host_table = vec![0; shape.batch * max_blocks];
        let mut next = order.into_iter();
        for (s, length) in lengths.iter().enumerate() {
            for (entry, block) in host_table[s * max_blocks..]
                .iter_mut()
                .zip((&mut next).take(length.div_ceil(BLOCK)))
            {
                *entry = block;
            }
        }
        let rows = shape.batch * queries * heads;
        let sms = h.gpu.sms();
        let host_lengths: Vec<i32> = lengths.iter().map(|&l| l as i32).collect();
        Ok(Self {
            shape,
            q: h.random(rows * WIDTH, Kind::Bf16Normal, 1.0, 1)?,
            cache: h.random(blocks * layers * BLOCK * WIDTH, Kind::Bf16Normal, 0.5, 2)?,
            blocks,
            layers,
            lengths: h.upload(&host_lengths)?,
            table: h.upload(&host_table)?,
            parts: h.poisoned(shape.parts_len(sms))?,
            pieces: h.poisoned(shape.pieces_len())?,
            partial: h.poisoned(shape.lse_len(sms) * LATENT)?,
            lse: h.poisoned(shape.lse_len(sms))?,
            out: h.poisoned(rows * LATENT)?,
            host_table,
        })
    }

    /// The workspace.
    pub(crate) fn work(&self, h: &Harness) -> Workspace {
        Workspace {
            parts: h.span(&self.parts),
            pieces: h.span(&self.pieces),
            partial: h.span(&self.partial),
            lse: h.span(&self.lse),
        }
    }

    /// Plans.
    pub(crate) fn plan(&self, h: &Harness) -> Result<()> {
        Ok(mla::plan(
            &h.gpu,
            &h.stream,
            self.shape,
            h.span(&self.lengths),
            self.work(h),
            false,
        )?)
    }

    /// Attends in `layer`.
    pub(crate) fn decode(
        &self,
        h: &Harness,
        layer: usize,
        pair: bool,
        overlap: bool,
    ) -> Result<()> {
        let cache = Cache {
            data: h.span(&self.cache),
            blocks: self.blocks,
            layers: self.layers,
            layer,
            lengths: h.span(&self.lengths),
            block_table: h.span(&self.table),
        };
        let (q, out) = (h.span(&self.q), h.span(&self.out));
        Ok(mla::decode_with(
            &h.gpu,
            &h.stream,
            self.shape,
            q,
            cache,
            SCALE,
            self.work(h),
            out,
            pair,
            overlap,
        )?)
    }
}

fn decode(
    h: &Harness,
    heads: usize,
    queries: usize,
    lengths: &[usize],
    pair: bool,
) -> Result<Found> {
    let (layers, layer) = (2, 1);
    let step = Step::new(h, heads, queries, lengths, layers)?;
    // What lies behind the last token of each sequence must not matter, whatever it is.
    let mut cache = h.download(&step.cache)?;
    for (s, &length) in lengths.iter().enumerate() {
        if length % BLOCK != 0 {
            let block = step.host_table[s * step.shape.max_blocks + length / BLOCK] as usize;
            let first = ((block * layers + layer) * BLOCK + length % BLOCK) * WIDTH;
            let end = (block * layers + layer + 1) * BLOCK * WIDTH;
            cache[first..end].fill(0x7fc0);
        }
    }
    let step = Step {
        cache: h.upload(&cache)?,
        ..step
    };
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&step.out)?;
        h.poison(&step.parts)?;
        step.plan(h)?;
        step.decode(h, layer, pair, false)?;
        *digest = h.digest(&step.out)?;
    }
    let (q, out) = (h.download(&step.q)?, h.download(&step.out)?);
    let rows = queries * heads;
    let mut error = Error::default();
    let mut wrong = 0;
    let mut random = Random(5);
    for s in sample(&mut random, lengths.len(), 10) {
        let key = |token: usize| {
            let block = step.host_table[s * step.shape.max_blocks + token / BLOCK] as usize;
            &cache[((block * layers + layer) * BLOCK + token % BLOCK) * WIDTH..][..WIDTH]
        };
        for r in sample(&mut random, rows, 5) {
            let out = &out[(s * rows + r) * LATENT..][..LATENT];
            if lengths[s] == 0 {
                wrong += usize::from(out.iter().any(|&v| v != 0xffff));
                continue;
            }
            let q: Vec<f64> = q[(s * rows + r) * WIDTH..][..WIDTH]
                .iter()
                .map(|&v| bf16(v))
                .collect();
            let visible = lengths[s] + 1 + r / heads - queries;
            for (o, reference) in out.iter().zip(attend(&q, visible, f64::from(SCALE), key)) {
                error.add(bf16(*o), reference);
            }
        }
        let written = &out[s * rows * LATENT..][..rows * LATENT];
        wrong += written
            .iter()
            .filter(|&&v| (v == 0xffff) != (lengths[s] == 0))
            .count();
    }
    Ok(Found::new(&error, BOUND, digests[0] == digests[1], wrong))
}

fn attend<'a>(q: &[f64], visible: usize, scale: f64, key: impl Fn(usize) -> &'a [u16]) -> Vec<f64> {
    let scores: Vec<f64> = (0..visible)
        .map(|t| scale * q.iter().zip(key(t)).map(|(a, &b)| a * bf16(b)).sum::<f64>())
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; LATENT];
    let mut total = 0.0;
    for (t, score) in scores.iter().enumerate() {
        let p = (score - top).exp();
        total += p;
        for (o, &v) in out.iter_mut().zip(key(t)) {
            *o += p * bf16(v);
        }
    }
    out.iter().map(|o| o / total).collect()
}
