//! MLA decode.

use cudarc::driver::CudaSlice;
use kernels::cases::attention::{Absorbed, SCALE};
use kernels::cases::{Random, floats};
use kernels::cuda::mla::{self, BLOCK, Cache, LATENT, Shape, WIDTH, Workspace};
use kernels::cuda::probe::Kind;

use super::{Case, Ran};
use crate::harness::{Harness, Result};

/// All cases.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for heads in [128usize, 64, 32, 16] {
        for queries in [1usize, 2, 4] {
            for (name, lengths) in Absorbed::lengths() {
                cases.push(Case::shared(
                    format!("mla_decode heads {heads} queries {queries} {name}"),
                    move || Absorbed::new(heads, queries, lengths.clone()),
                    decode,
                ));
            }
        }
    }
    cases
}

/// Buffers of a decode step.
pub(crate) struct Step {
    shape: Shape,
    q: CudaSlice<u16>,
    cache: CudaSlice<u16>,
    blocks: usize,
    layers: usize,
    lengths: CudaSlice<i32>,
    table: CudaSlice<i32>,
    parts: CudaSlice<i32>,
    pieces: CudaSlice<i32>,
    rows: CudaSlice<i32>,
    partial: CudaSlice<u16>,
    sums: CudaSlice<f32>,
    out: CudaSlice<u16>,
}

impl Step {
    /// Buffers for sequences of `lengths` with `table` of `max_blocks` entries a row, and undefined queries and cache.
    fn new(
        h: &Harness,
        heads: usize,
        queries: usize,
        lengths: &[usize],
        table: &[i32],
        (blocks, layers): (usize, usize),
        (q, cache): (CudaSlice<u16>, CudaSlice<u16>),
    ) -> Result<Self> {
        let shape = Shape {
            batch: lengths.len(),
            queries,
            heads,
            max_blocks: table.len() / lengths.len(),
        };
        let sms = h.gpu.sms();
        let host_lengths: Vec<i32> = lengths.iter().map(|&l| l as i32).collect();
        Ok(Self {
            shape,
            q,
            cache,
            blocks,
            layers,
            lengths: h.upload(&host_lengths)?,
            table: h.upload(table)?,
            parts: h.poisoned(shape.parts_len(sms))?,
            pieces: h.poisoned(shape.pieces_len())?,
            rows: h.poisoned(shape.rows_len(sms))?,
            partial: h.poisoned(shape.partial_rows(sms) * LATENT)?,
            sums: h.poisoned(shape.partial_rows(sms) * 4)?,
            out: h.poisoned(shape.batch * queries * heads * LATENT)?,
        })
    }

    /// Random queries and a random cache of `layers` layers made on the device; blocks in random order.
    pub(crate) fn random(
        h: &Harness,
        heads: usize,
        queries: usize,
        batch: usize,
        tokens: usize,
        layers: usize,
    ) -> Result<Self> {
        let blocks = batch * tokens.div_ceil(BLOCK);
        let table = Random(11).order(blocks);
        let cache = blocks * layers * BLOCK * WIDTH;
        let contents = (
            h.random(batch * queries * heads * WIDTH, Kind::Bf16Normal, 1.0, 1)?,
            h.random(cache, Kind::Bf16Normal, 0.5, 2)?,
        );
        let lengths = vec![tokens; batch];
        let cache = (blocks, layers);
        Self::new(h, heads, queries, &lengths, &table, cache, contents)
    }

    /// The workspace.
    pub(crate) fn work(&self, h: &Harness) -> Workspace {
        Workspace {
            parts: h.span(&self.parts),
            pieces: h.span(&self.pieces),
            rows: h.span(&self.rows),
            partial: h.span(&self.partial),
            sums: h.span(&self.sums),
        }
    }

    /// Plans.
    pub(crate) fn plan(&self, h: &Harness) -> Result<()> {
        Ok(mla::plan(
            &h.gpu,
            &h.stream,
            self.shape,
            h.span(&self.lengths),
            h.span(&self.table),
            self.work(h),
            false,
        )?)
    }

    /// Attends in `layer`.
    pub(crate) fn decode(&self, h: &Harness, layer: usize, overlap: bool) -> Result<()> {
        let cache = Cache {
            data: h.span(&self.cache),
            blocks: self.blocks,
            layers: self.layers,
            layer,
            lengths: h.span(&self.lengths),
            block_table: h.span(&self.table),
        };
        let (q, out) = (h.span(&self.q), h.span(&self.out));
        Ok(mla::decode(
            &h.gpu,
            &h.stream,
            self.shape,
            q,
            cache,
            SCALE,
            self.work(h),
            out,
            overlap,
        )?)
    }
}

fn decode(h: &Harness, case: &Absorbed) -> Result<Ran<Vec<f32>>> {
    let contents = (h.upload(&case.q)?, h.upload(&case.cache)?);
    let step = Step::new(
        h,
        case.heads,
        case.queries,
        &case.lengths,
        &case.table,
        (case.blocks, Absorbed::LAYERS),
        contents,
    )?;
    let mut digests = [0; 2];
    for digest in &mut digests {
        h.poison(&step.out)?;
        h.poison(&step.parts)?;
        step.plan(h)?;
        step.decode(h, Absorbed::LAYER, false)?;
        *digest = h.digest(&step.out)?;
    }
    let out = h.download(&step.out)?;
    let rows = case.queries * case.heads * LATENT;
    let wrong = out
        .iter()
        .enumerate()
        .filter(|(i, v)| (**v == 0xffff) != (case.lengths[i / rows] == 0))
        .count();
    Ok(Ran {
        out: floats(&out),
        repeats: digests[0] == digests[1],
        wrong,
    })
}
