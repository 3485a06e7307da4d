//! Rotary embedding, and writes into the paged latent cache.

use super::attention::WIDTH;
use super::rows::EPS;
use super::{Error, Host, Judged, Operation, Random, bf16};
use crate::backend::{Backend, BlockMemory, Columns, Result, Sequences};
use crate::cpu::Cpu;
use crate::tensor::DType;

/// Positions of the rotary table.
pub const POSITIONS: usize = 500;

/// Cosines and sines of DeepSeek-V3's frequencies without YaRN, `[POSITIONS, 64]`.
pub fn table() -> Vec<f32> {
    let entry = |p: usize, i: usize| {
        let angle = p as f64 * 10_000f64.powf(-((i / 2 * 2) as f64) / 64.0);
        (if i.is_multiple_of(2) {
            angle.cos()
        } else {
            angle.sin()
        }) as f32
    };
    (0..POSITIONS * 64)
        .map(|at| entry(at / 64, at % 64))
        .collect()
}

/// Value `i` of `x` turned by a row of the table.
fn rotated(x: &[u16], turn: &[f32], i: usize) -> f64 {
    let (a, b) = (bf16(x[i / 2 * 2]), bf16(x[i / 2 * 2 + 1]));
    let (cos, sin) = (f64::from(turn[i / 2 * 2]), f64::from(turn[i / 2 * 2 + 1]));
    if i.is_multiple_of(2) {
        a * cos - b * sin
    } else {
        a * sin + b * cos
    }
}

/// Rotary embedding of the last 64 of 192 values a head, in place.
#[derive(Debug)]
pub struct Rope {
    /// Rows.
    pub rows: usize,
    /// Heads of a row.
    pub heads: usize,
    /// `[rows, heads * 192]`.
    pub q: Vec<u16>,
    /// `[rows]`.
    pub positions: Vec<i32>,
}

impl Rope {
    /// Rows and heads of the cases.
    pub const SIZES: [(usize, usize); 2] = [(1, 128), (37, 16)];

    /// Random inputs.
    pub fn new(rows: usize, heads: usize) -> Self {
        let mut random = Random(6);
        Self {
            rows,
            heads,
            q: random.bf16s(rows * heads * 192, 1.0),
            positions: (0..rows).map(|_| random.below(POSITIONS) as i32).collect(),
        }
    }
}

impl Operation for Rope {
    /// `q` after.
    type Out = Vec<f32>;
    const BOUND: f64 = 3e-3;
    const CPU_BOUND: f64 = 1e-6;

    fn cpu(&self, cpu: &Cpu) -> Result<Vec<f32>> {
        let mut host = Host::new(cpu)?;
        let mut q = host.bf16s(self.heads * 192, &self.q)?;
        let (table, positions) = (host.floats(64, &table())?, host.ints(1, &self.positions)?);
        let (stream, heads) = (&mut host.stream, self.heads);
        cpu.rope(
            stream, &mut q, heads, 128, 64, &table, &positions, self.rows,
        )?;
        host.read(&q)
    }

    fn judge(&self, out: &Vec<f32>) -> Judged {
        let (table, mut error, mut wrong) = (table(), Error::default(), 0);
        for head in 0..self.rows * self.heads {
            let (before, after) = (&self.q[head * 192..], &out[head * 192..]);
            let turn = &table[self.positions[head / self.heads] as usize * 64..][..64];
            wrong += (0..128)
                .filter(|&c| f64::from(after[c]) != bf16(before[c]))
                .count();
            for i in 0..64 {
                error.add(
                    f64::from(after[128 + i]),
                    rotated(&before[128..192], turn, i),
                );
            }
        }
        Judged::new(&error, wrong)
    }

    fn work(&self) -> f64 {
        (self.rows * self.heads * 192) as f64
    }
}

/// Latent norm, rotation and write into the paged cache.
#[derive(Debug)]
pub struct CacheWrite {
    /// Rows.
    pub rows: usize,
    /// `[rows, LD]`: latent, rope, and what else the projection gives.
    pub kv: Vec<u16>,
    /// `[512]`.
    pub weight: Vec<f32>,
    /// `[rows]`.
    pub positions: Vec<i32>,
    /// `[rows]`, -1 for none.
    pub slots: Vec<i32>,
}

impl CacheWrite {
    /// Columns of the projection's output.
    pub const LD: usize = 2112;
    /// Blocks of the cache.
    pub const BLOCKS: usize = 4;
    /// Layers of the cache.
    pub const LAYERS: usize = 3;
    /// The layer written.
    pub const LAYER: usize = 1;

    /// Random inputs; row 3 has no slot.
    pub fn new(rows: usize) -> Self {
        let mut random = Random(7);
        let slot = |r: usize| ((r * 7) % (Self::BLOCKS * 64)) as i32;
        Self {
            rows,
            kv: random.bf16s(rows * Self::LD, 1.5),
            weight: random.weights(512, 1.0),
            positions: (0..rows).map(|_| random.below(POSITIONS) as i32).collect(),
            slots: (0..rows)
                .map(|r| if r == 3 { -1 } else { slot(r) })
                .collect(),
        }
    }

    /// The cache's entry for a row, if it has one.
    fn entry(&self, row: usize) -> Option<usize> {
        let slot = usize::try_from(self.slots[row]).ok()?;
        Some((slot / 64 * Self::LAYERS + Self::LAYER) * 64 + slot % 64)
    }
}

impl Operation for CacheWrite {
    /// The whole cache in BF16; it was all ones before.
    type Out = Vec<u16>;
    const BOUND: f64 = 3e-3;
    const CPU_BOUND: f64 = 3e-3;

    fn cpu(&self, cpu: &Cpu) -> Result<Vec<u16>> {
        let mut host = Host::new(cpu)?;
        let cache = cpu.cache(Self::BLOCKS, Self::LAYERS, WIDTH, DType::Bf16)?;
        for block in 0..Self::BLOCKS {
            cache.write(block, 0..cache.block_bytes(), &mut |bytes| bytes.fill(0xff))?;
        }
        let kv = host.bf16s(Self::LD, &self.kv)?;
        let columns = Columns {
            tensor: &kv,
            first: 0,
            cols: WIDTH,
        };
        let none = || host.ints(1, &[]);
        let seqs = Sequences {
            query_start: none()?,
            context_len: none()?,
            block_table: none()?,
            slots: host.ints(1, &self.slots)?,
            positions: host.ints(1, &self.positions)?,
            count: 0,
            max_query: self.rows,
            max_context: 0,
        };
        let (weight, table) = (host.floats(512, &self.weight)?, host.floats(64, &table())?);
        let (stream, layer) = (&mut host.stream, Self::LAYER);
        cpu.cache_write(
            stream, columns, &weight, EPS, &table, &seqs, layer, self.rows, &cache,
        )?;
        let mut out = Vec::new();
        for block in 0..Self::BLOCKS {
            cache.read(block, 0..cache.block_bytes(), &mut |bytes| {
                out.extend(
                    bytes
                        .chunks_exact(2)
                        .map(|b| u16::from_le_bytes([b[0], b[1]])),
                );
            })?;
        }
        Ok(out)
    }

    fn judge(&self, out: &Vec<u16>) -> Judged {
        let (table, mut error) = (table(), Error::default());
        let mut written = vec![false; Self::BLOCKS * Self::LAYERS * 64];
        for r in 0..self.rows {
            let Some(entry) = self.entry(r) else { continue };
            written[entry] = true;
            let (x, out) = (&self.kv[r * Self::LD..], &out[entry * WIDTH..]);
            let mean = x[..512].iter().map(|&v| bf16(v).powi(2)).sum::<f64>() / 512.0;
            let inverse = 1.0 / (mean + f64::from(EPS)).sqrt();
            for c in 0..512 {
                error.add(
                    bf16(out[c]),
                    bf16(x[c]) * inverse * f64::from(self.weight[c]),
                );
            }
            let turn = &table[self.positions[r] as usize * 64..][..64];
            for i in 0..64 {
                error.add(bf16(out[512 + i]), rotated(&x[512..576], turn, i));
            }
        }
        let wrong = (0..out.len())
            .filter(|&i| (out[i] == 0xffff) == written[i / WIDTH])
            .count();
        Judged::new(&error, wrong)
    }

    fn work(&self) -> f64 {
        (self.rows * WIDTH) as f64
    }
}
