//! Both forms of attention: over the paged latent cache (decode) and over expanded keys and values (prefill).

use super::{Error, Host, Judged, Operation, Random, bf16, sample};
use crate::backend::{Backend, BlockMemory, Result, Sequences};
use crate::cpu::{Cpu, Memory};
use crate::tensor::DType;

/// DeepSeek-V3's softmax scale.
pub const SCALE: f32 = 0.135_233_78;
/// Tokens of a cache block.
pub const BLOCK: usize = 64;
/// Latent values: key and value of the absorbed form.
pub const LATENT: usize = 512;
/// Latent and rope values of a cache entry.
pub const WIDTH: usize = 576;
/// Values of an expanded query head: 128 and 64 of rope.
pub const QUERY: usize = 192;
/// Key (without rope) and value of an expanded head.
pub const KEY_VALUE: usize = 256;
/// Value of an expanded head.
pub const VALUE: usize = 128;
/// Shared rope key.
pub const ROPE: usize = 64;

/// Softmax attention of one query over `visible` keys: the values' weighted sum, and the log-sum-exp of the scores.
fn attend<K: Iterator<Item = u16>>(
    q: &[f64],
    visible: usize,
    key: impl Fn(usize) -> K,
    values: usize,
    value: impl Fn(usize) -> K,
) -> (Vec<f64>, f64) {
    let score = |t| f64::from(SCALE) * q.iter().zip(key(t)).map(|(a, b)| a * bf16(b)).sum::<f64>();
    let scores: Vec<f64> = (0..visible).map(score).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; values];
    let mut total = 0.0;
    for (t, score) in scores.iter().enumerate() {
        let p = (score - top).exp();
        total += p;
        for (o, v) in out.iter_mut().zip(value(t)) {
            *o += p * bf16(v);
        }
    }
    (
        out.into_iter().map(|o| o / total).collect(),
        top + total.ln(),
    )
}

/// `[0, a, a + b, ...]` of lengths `a, b, ...`.
pub fn starts(lengths: impl Iterator<Item = usize>) -> Vec<i32> {
    let mut sum = 0;
    let ends = lengths.map(|l| {
        sum += l as i32;
        sum
    });
    std::iter::once(0).chain(ends).collect()
}

fn sequences(
    host: &Host<'_>,
    query_start: &[i32],
    lengths: &[i32],
    table: &[i32],
) -> Result<Sequences<Memory>> {
    let (count, rows) = (lengths.len(), query_start[lengths.len()] as usize);
    Ok(Sequences {
        query_start: host.ints(1, query_start)?,
        context_len: host.ints(1, lengths)?,
        block_table: host.ints(table.len() / count.max(1), table)?,
        slots: host.ints(1, &[])?,
        positions: host.ints(1, &[])?,
        count,
        max_query: rows,
        max_context: lengths.iter().map(|&l| l as usize).sum(),
    })
}

/// A decode step in the latent space: every sequence has `queries` query tokens, its last ones.
#[derive(Debug)]
pub struct Absorbed {
    /// Heads.
    pub heads: usize,
    /// Query tokens of each sequence.
    pub queries: usize,
    /// Cached tokens of each sequence.
    pub lengths: Vec<usize>,
    /// Entries of a row of the block table.
    pub max_blocks: usize,
    /// `[sequences, max_blocks]`.
    pub table: Vec<i32>,
    /// Blocks of the cache.
    pub blocks: usize,
    /// `[sequences, queries, heads, 576]`.
    pub q: Vec<u16>,
    /// `[blocks, LAYERS, 64, 576]`; NaN wherever there is no token of [`Self::LAYER`].
    pub cache: Vec<u16>,
}

impl Absorbed {
    /// Layers of the cache.
    pub const LAYERS: usize = 2;
    /// The layer attended to.
    pub const LAYER: usize = 1;

    /// Names and lengths of the sequences of the cases.
    pub fn lengths() -> [(&'static str, Vec<usize>); 7] {
        let mut random = Random(3);
        let many: Vec<usize> = (0..150).map(|_| 4 + random.below(600)).collect();
        let uneven = many.iter().copied().chain([5000, 0]).collect();
        [
            ("one token beyond the queries", vec![5]),
            ("block edges", vec![4, 63, 64, 65, 127, 128, 129, 192]),
            ("one long", vec![8192]),
            ("four long", vec![4096, 4000, 3999, 64]),
            ("an empty one", vec![100, 0, 700]),
            ("more than parts", many),
            ("more than parts and a long one", uneven),
        ]
    }

    /// Random queries and cache; blocks in random order.
    pub fn new(heads: usize, queries: usize, lengths: Vec<usize>) -> Self {
        let needed = |l: &usize| l.div_ceil(BLOCK);
        let max_blocks = lengths.iter().map(needed).max().unwrap_or(0).max(1);
        let blocks = lengths.iter().map(needed).sum::<usize>() + 3;
        let mut random = Random(11);
        let mut order = random.order(blocks).into_iter();
        let mut table = vec![0; lengths.len() * max_blocks];
        let mut cache = vec![0x7fc0; blocks * Self::LAYERS * BLOCK * WIDTH];
        for (row, &length) in table.chunks_exact_mut(max_blocks).zip(&lengths) {
            for (b, (entry, block)) in row
                .iter_mut()
                .zip((&mut order).take(needed(&length)))
                .enumerate()
            {
                *entry = block;
                let tokens = (length - b * BLOCK).min(BLOCK);
                let page = (block as usize * Self::LAYERS + Self::LAYER) * BLOCK * WIDTH;
                cache[page..page + tokens * WIDTH]
                    .copy_from_slice(&random.bf16s(tokens * WIDTH, 0.5));
            }
        }
        Self {
            heads,
            queries,
            q: random.bf16s(lengths.len() * queries * heads * WIDTH, 1.0),
            lengths,
            max_blocks,
            table,
            blocks,
            cache,
        }
    }

    fn rows(&self) -> usize {
        self.queries * self.heads
    }
}

impl Operation for Absorbed {
    /// `[sequences, queries, heads, 512]`; rows of empty sequences are not looked at.
    type Out = Vec<f32>;
    const BOUND: f64 = 5e-3;
    const CPU_BOUND: f64 = 3e-5;

    fn cpu(&self, cpu: &Cpu) -> Result<Vec<f32>> {
        let mut host = Host::new(cpu)?;
        let cache = cpu.cache(self.blocks, Self::LAYERS, WIDTH, DType::Bf16)?;
        let block = Self::LAYERS * BLOCK * WIDTH;
        for (b, values) in self.cache.chunks_exact(block).enumerate() {
            let from = bytemuck::cast_slice(values);
            cache.write(b, 0..block * 2, &mut |to| to.copy_from_slice(from))?;
        }
        // Its sequences without tokens have no queries either.
        let queries = |l: &usize| if *l == 0 { 0 } else { self.queries };
        let lengths: Vec<i32> = self.lengths.iter().map(|&l| l as i32).collect();
        let start = starts(self.lengths.iter().map(queries));
        let seqs = sequences(&host, &start, &lengths, &self.table)?;
        let kept: Vec<u16> = self
            .q
            .chunks_exact(self.rows() * WIDTH)
            .zip(&self.lengths)
            .filter(|(_, l)| **l > 0)
            .flat_map(|(q, _)| q.iter().copied())
            .collect();
        let rows = start[self.lengths.len()] as usize;
        let q = host.bf16s(self.heads * WIDTH, &kept)?;
        let mut out = host.alloc(DType::F32, rows, self.heads * LATENT)?;
        cpu.attend_absorbed(
            &mut host.stream,
            &q,
            &cache,
            Self::LAYER,
            &seqs,
            self.heads,
            SCALE,
            rows,
            &mut out,
        )?;
        let out: Vec<f32> = host.read(&out)?;
        let mut all = Vec::new();
        for (s, &length) in self.lengths.iter().enumerate() {
            let first = start[s] as usize * self.heads * LATENT;
            let len = self.rows() * LATENT;
            if length == 0 {
                all.extend(std::iter::repeat_n(f32::NAN, len));
            } else {
                all.extend(&out[first..first + len]);
            }
        }
        Ok(all)
    }

    fn judge(&self, out: &Vec<f32>) -> Judged {
        let (mut error, mut random) = (Error::default(), Random(5));
        for s in sample(&mut random, self.lengths.len(), 10) {
            let key = |token: usize| {
                let block = self.table[s * self.max_blocks + token / BLOCK] as usize;
                let page = (block * Self::LAYERS + Self::LAYER) * BLOCK;
                self.cache[(page + token % BLOCK) * WIDTH..][..WIDTH]
                    .iter()
                    .copied()
            };
            if self.lengths[s] == 0 {
                continue;
            }
            for r in sample(&mut random, self.rows(), 5) {
                let row = s * self.rows() + r;
                let q = self.q[row * WIDTH..][..WIDTH].iter();
                let q: Vec<f64> = q.map(|&v| bf16(v)).collect();
                let visible = self.lengths[s] + 1 + r / self.heads - self.queries;
                let (reference, _) = attend(&q, visible, key, LATENT, key);
                for (o, reference) in out[row * LATENT..].iter().zip(reference) {
                    error.add(f64::from(*o), reference);
                }
            }
        }
        Judged::new(&error, 0)
    }

    fn work(&self) -> f64 {
        (self.lengths.iter().sum::<usize>() * self.rows() * (WIDTH + LATENT) * 2) as f64
    }
}

/// Query and context tokens of each sequence.
pub type Lengths = Vec<(usize, usize)>;

/// Causal attention over expanded keys and values.
#[derive(Debug)]
pub struct Expanded {
    /// Heads.
    pub heads: usize,
    /// Query and context tokens of each sequence.
    pub list: Lengths,
    /// `[queries, heads, 192]`.
    pub q: Vec<u16>,
    /// `[context, heads, 256]`.
    pub kv: Vec<u16>,
    /// `[context, 64]`.
    pub rope: Vec<u16>,
}

impl Expanded {
    /// Names, heads, and query and context tokens of each sequence of the cases.
    pub fn lists() -> Vec<(&'static str, usize, Lengths)> {
        let ragged = vec![
            (5, 5),
            (129, 129),
            (1, 300),
            (200, 333),
            (0, 0),
            (127, 1000),
        ];
        vec![
            ("one token", 128, vec![(1, 1)]),
            ("a tile", 16, vec![(128, 128)]),
            ("short ones", 4, vec![(70, 70), (1, 64), (5, 130)]),
            ("ragged", 32, ragged),
            ("cached prefix", 16, vec![(64, 2048), (300, 4000)]),
            ("4096", 128, vec![(4096, 4096)]),
            ("16384", 4, vec![(16384, 16384)]),
        ]
    }

    /// Sequences with tokens that are NaN, which no earlier query may notice and every later one must.
    pub fn broken() -> Self {
        let mut case = Self::new(1, vec![(200, 200), (100, 100), (70, 150)]);
        // In the second tile of queries, wholly; in the first half of a tile; behind a prefix that is not a whole tile.
        for (token, values_only) in [(150, false), (200 + 20, true), (300 + 100, true)] {
            let entry = &mut case.kv[token * KEY_VALUE..][..KEY_VALUE];
            entry[if values_only { 128 } else { 0 }..].fill(0x7fc0);
        }
        case
    }

    /// Random inputs for sequences of (queries, context).
    pub fn new(heads: usize, list: Lengths) -> Self {
        let (rows, context): (usize, usize) = list
            .iter()
            .fold((0, 0), |sum, l| (sum.0 + l.0, sum.1 + l.1));
        let mut random = Random(1);
        Self {
            heads,
            list,
            q: random.bf16s(rows * heads * QUERY, 1.0),
            kv: random.bf16s(context * heads * KEY_VALUE, 0.6),
            rope: random.bf16s(context * ROPE, 0.6),
        }
    }
}

/// What [`Expanded`] leaves.
#[derive(Debug)]
pub struct Attended {
    /// `[queries, heads, 128]`.
    pub out: Vec<f32>,
    /// `[queries, heads]`, where the implementation gives it: natural logarithm.
    pub lse: Option<Vec<f32>>,
}

impl Operation for Expanded {
    type Out = Attended;
    const BOUND: f64 = 5e-3;
    const CPU_BOUND: f64 = 3e-5;

    fn cpu(&self, cpu: &Cpu) -> Result<Attended> {
        let mut host = Host::new(cpu)?;
        let query_start = starts(self.list.iter().map(|l| l.0));
        let context_start = starts(self.list.iter().map(|l| l.1));
        let lengths: Vec<i32> = self.list.iter().map(|l| l.1 as i32).collect();
        // Not read: the keys are given.
        let blocks = self.list.iter().map(|l| l.1.div_ceil(BLOCK)).max();
        let table = vec![0; self.list.len() * blocks.unwrap_or(0)];
        let seqs = sequences(&host, &query_start, &lengths, &table)?;
        let rows = query_start[self.list.len()] as usize;
        let q = host.bf16s(self.heads * QUERY, &self.q)?;
        let kv = host.bf16s(self.heads * KEY_VALUE, &self.kv)?;
        let rope = host.bf16s(ROPE, &self.rope)?;
        let context_start = host.ints(1, &context_start)?;
        let mut out = host.alloc(DType::F32, rows, self.heads * VALUE)?;
        cpu.attend_expanded(
            &mut host.stream,
            &q,
            &kv,
            &rope,
            &seqs,
            &context_start,
            self.heads,
            SCALE,
            rows,
            &mut out,
        )?;
        Ok(Attended {
            out: host.read(&out)?,
            lse: None,
        })
    }

    fn judge(&self, out: &Attended) -> Judged {
        let (mut error, mut wrong, mut random) = (Error::default(), 0, Random(9));
        let (mut first_row, mut first_token) = (0, 0);
        for &(queries, context) in &self.list {
            for i in sample(&mut random, queries, 6) {
                for head in sample(&mut random, self.heads, 3) {
                    let row = (first_row + i) * self.heads + head;
                    let q = self.q[row * QUERY..][..QUERY].iter();
                    let q: Vec<f64> = q.map(|&v| bf16(v)).collect();
                    let entry = |t: usize, from: usize, to: usize| {
                        let at = ((first_token + t) * self.heads + head) * KEY_VALUE;
                        self.kv[at + from..at + to].iter()
                    };
                    let rope = |t: usize| self.rope[(first_token + t) * ROPE..][..ROPE].iter();
                    let key = |t| entry(t, 0, 128).chain(rope(t)).copied();
                    let value = |t| entry(t, 128, 256).chain([].iter()).copied();
                    let visible = context - queries + i + 1;
                    let (reference, lse) = attend(&q, visible, key, VALUE, value);
                    for (o, r) in out.out[row * VALUE..].iter().zip(reference) {
                        if r.is_nan() {
                            wrong += usize::from(!o.is_nan());
                        } else {
                            error.add(f64::from(*o), r);
                        }
                    }
                    let given = out.lse.as_ref().map(|all| f64::from(all[row]));
                    wrong += usize::from(given.is_some_and(|given| (given - lse).abs() > 2e-2));
                }
            }
            first_row += queries;
            first_token += context;
        }
        Judged::new(&error, wrong)
    }

    fn work(&self) -> f64 {
        let pairs: usize = self
            .list
            .iter()
            .map(|&(queries, context)| queries * context)
            .sum();
        (pairs * self.heads * (QUERY + VALUE) * 2) as f64
    }
}
