//! Cache entries and both forms of attention.

use half::bf16;

use super::super::cache::{BLOCK_TOKENS, Cache};
use super::super::memory::Memory;
use super::{Cpu, Random, Stream, backends, check, floats, ints, poisoned, tensor};
use crate::backend::{Backend, BlockMemory, Columns, Sequences};
use crate::tensor::DType;

/// Rounding of float32 scores, exponentials and sums, relative to the result's root mean square.
const ATTENTION: f64 = 3e-5;

/// A step: per sequence (query tokens, tokens in the cache), blocks in a shuffled order.
struct Step {
    lens: Vec<(usize, usize)>,
    blocks: Vec<Vec<i32>>,
    total_blocks: usize,
}

impl Step {
    fn new(random: &mut Random, lens: &[(usize, usize)]) -> Self {
        let used: usize = lens.iter().map(|(_, c)| c.div_ceil(BLOCK_TOKENS)).sum();
        let mut ids: Vec<i32> = (0..used as i32 + 2).collect();
        for i in (1..ids.len()).rev() {
            ids.swap(i, random.below(i + 1));
        }
        let mut ids = ids.into_iter();
        Self {
            lens: lens.to_vec(),
            blocks: lens
                .iter()
                .map(|(_, c)| ids.by_ref().take(c.div_ceil(BLOCK_TOKENS)).collect())
                .collect(),
            total_blocks: used + 2,
        }
    }

    fn rows(&self) -> usize {
        self.lens.iter().map(|(q, _)| q).sum()
    }

    fn context(&self) -> usize {
        self.lens.iter().map(|(_, c)| c).sum()
    }

    /// `(sequence, visible tokens)` of every row.
    fn queries(&self) -> impl Iterator<Item = (usize, usize)> {
        let lens = self.lens.iter().enumerate();
        lens.flat_map(|(s, (q, c))| (0..*q).map(move |i| (s, c - q + i + 1)))
    }

    fn slot(&self, s: usize, token: usize) -> i32 {
        self.blocks[s][token / BLOCK_TOKENS] * 64 + (token % BLOCK_TOKENS) as i32
    }

    fn sequences(&self, cpu: &Cpu) -> Sequences<Memory> {
        let width = self.blocks.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let mut table = Vec::new();
        for blocks in &self.blocks {
            table.extend(blocks);
            // What is not in use may say anything.
            table.extend(vec![-5; width - blocks.len()]);
        }
        let mut start = vec![0];
        for (q, _) in &self.lens {
            start.push(start[start.len() - 1] + *q as i32);
        }
        let lens: Vec<i32> = self.lens.iter().map(|(_, c)| *c as i32).collect();
        let slots: Vec<i32> = self.queries().map(|(s, n)| self.slot(s, n - 1)).collect();
        let positions: Vec<i32> = self.queries().map(|(_, n)| n as i32 - 1).collect();
        Sequences {
            query_start: ints(cpu, 1, &start),
            context_len: ints(cpu, 1, &lens),
            block_table: ints(cpu, width, &table),
            slots: ints(cpu, 1, &slots),
            positions: ints(cpu, 1, &positions),
            count: self.lens.len(),
            max_query: self.rows(),
            max_context: self.context(),
        }
    }

    /// A cache of three layers whose middle one holds `entries` (all sequences' tokens, one after the other); every other
    /// value is NaN.
    fn cache(&self, cpu: &Cpu, entries: &[f32], width: usize, dtype: DType) -> Cache {
        let cache = cpu.cache(self.total_blocks, 3, width, dtype).unwrap();
        for block in 0..self.total_blocks {
            // All ones are a NaN in both types.
            cache
                .write(block, 0..cache.block_bytes(), &mut |bytes| bytes.fill(0xff))
                .unwrap();
        }
        let mut entries = entries.chunks_exact(width);
        for (s, (_, context)) in self.lens.iter().enumerate() {
            for token in 0..*context {
                let slot = self.slot(s, token) as usize;
                let mut page = cache.write_page(slot / BLOCK_TOKENS, 1).unwrap();
                page.store(slot % BLOCK_TOKENS, 0, entries.next().unwrap());
            }
        }
        cache
    }
}

fn steps(random: &mut Random) -> Vec<Step> {
    let lens: [&[(usize, usize)]; 6] = [
        &[(1, 1)],
        &[(1, 64), (1, 65), (3, 200)],
        &[(70, 70)],
        &[(1, 700)],
        &[(5, 130), (0, 40), (2, 2), (33, 97)],
        &[],
    ];
    lens.iter().map(|lens| Step::new(random, lens)).collect()
}

/// Values as a cache of this type keeps them.
fn kept(values: &[f32], dtype: DType) -> Vec<f32> {
    let round = |v: &f32| match dtype {
        DType::Bf16 => bf16::from_f32(*v).to_f32(),
        _ => *v,
    };
    values.iter().map(round).collect()
}

/// Softmax attention of one query in float64.
fn attend(q: &[f32], keys: &[Vec<f64>], values: &[Vec<f64>], scale: f32) -> Vec<f64> {
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| q.iter().zip(k).map(|(q, k)| f64::from(*q) * k).sum::<f64>() * f64::from(scale))
        .collect();
    let max = scores.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    (0..values[0].len())
        .map(|i| {
            weights
                .iter()
                .zip(values)
                .map(|(w, v)| w * v[i])
                .sum::<f64>()
                / sum
        })
        .collect()
}

fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn absorbed_attention_is_right_over_shuffled_blocks() {
    let mut random = Random::new(30);
    for step in steps(&mut random) {
        for (heads, latent, rope) in [(8, 128, 32), (3, 20, 6), (1, 64, 16), (5, 512, 64)] {
            let width = latent + rope;
            let q = random.values(step.rows() * heads * width);
            let scale = 1.3 / (width as f32).sqrt();
            for dtype in [DType::F32, DType::Bf16] {
                let entries = kept(&random.values(step.context() * width), dtype);
                let mut starts = vec![0];
                step.lens
                    .iter()
                    .for_each(|(_, c)| starts.push(starts[starts.len() - 1] + c));
                let mut want = Vec::new();
                for (t, (s, visible)) in step.queries().enumerate() {
                    let rows = entries[starts[s] * width..]
                        .chunks_exact(width)
                        .take(visible);
                    let keys: Vec<Vec<f64>> = rows.map(doubles).collect();
                    let values: Vec<Vec<f64>> = keys.iter().map(|k| k[..latent].to_vec()).collect();
                    for h in 0..heads {
                        let q = &q[(t * heads + h) * width..][..width];
                        want.extend(attend(q, &keys, &values, scale));
                    }
                }
                check(
                    &format!("{:?} {heads} {latent} {dtype:?}", step.lens),
                    &want,
                    ATTENTION,
                    |cpu, stream| {
                        let cache = step.cache(cpu, &entries, width, dtype);
                        let seqs = step.sequences(cpu);
                        let mut out = poisoned(cpu, step.rows(), heads * latent);
                        let q = tensor(cpu, heads * width, &q);
                        cpu.attend_absorbed(
                            stream,
                            &q,
                            &cache,
                            1,
                            &seqs,
                            heads,
                            scale,
                            step.rows(),
                            &mut out,
                        )
                        .unwrap();
                        floats(&out)
                    },
                );
            }
        }
    }
}

#[test]
fn expanded_attention_is_right() {
    let mut random = Random::new(31);
    for step in steps(&mut random) {
        for (heads, nope, rope, value) in [(8, 32, 32, 32), (2, 10, 4, 7), (3, 128, 64, 128)] {
            let q = random.values(step.rows() * heads * (nope + rope));
            let kv = random.values((step.context() + 3) * heads * (nope + value));
            let ropes = random.values((step.context() + 3) * rope);
            let scale = 1.2 / ((nope + rope) as f32).sqrt();
            // Sequences need not begin at row 0.
            let mut start = vec![3];
            step.lens
                .iter()
                .for_each(|(_, c)| start.push(start[start.len() - 1] + *c as i32));
            let mut want = Vec::new();
            for (t, (s, visible)) in step.queries().enumerate() {
                for h in 0..heads {
                    let head = |i: usize| {
                        let row = start[s] as usize + i;
                        (
                            row,
                            &kv[(row * heads + h) * (nope + value)..][..nope + value],
                        )
                    };
                    let keys: Vec<Vec<f64>> = (0..visible)
                        .map(|i| {
                            let (row, head) = head(i);
                            doubles(&[&head[..nope], &ropes[row * rope..][..rope]].concat())
                        })
                        .collect();
                    let values: Vec<Vec<f64>> =
                        (0..visible).map(|i| doubles(&head(i).1[nope..])).collect();
                    let q = &q[(t * heads + h) * (nope + rope)..][..nope + rope];
                    want.extend(attend(q, &keys, &values, scale));
                }
            }
            check(
                &format!("{:?} {heads} {nope}", step.lens),
                &want,
                ATTENTION,
                |cpu, stream| {
                    let seqs = step.sequences(cpu);
                    let mut out = poisoned(cpu, step.rows(), heads * value);
                    let q = tensor(cpu, heads * (nope + rope), &q);
                    let kv = tensor(cpu, heads * (nope + value), &kv);
                    let (ropes, start) = (tensor(cpu, rope, &ropes), ints(cpu, 1, &start));
                    cpu.attend_expanded(
                        stream,
                        &q,
                        &kv,
                        &ropes,
                        &seqs,
                        &start,
                        heads,
                        scale,
                        step.rows(),
                        &mut out,
                    )
                    .unwrap();
                    floats(&out)
                },
            );
        }
    }
}

/// The same tokens of one sequence, all at once and in pieces, alone and beside others.
#[test]
fn a_query_has_the_same_bits_however_the_step_is_cut() {
    let mut random = Random::new(32);
    let (heads, latent, rope) = (8, 48, 16);
    let width = latent + rope;
    let entries = kept(&random.values(300 * width), DType::Bf16);
    let q = random.values(300 * heads * width);
    let run = |cpu: &Cpu, stream: &mut Stream, lens: &[(usize, usize)]| -> Vec<f32> {
        let step = Step::new(&mut Random::new(1), lens);
        let mut all = Vec::new();
        let mut queries = Vec::new();
        for (q_len, context) in lens {
            all.extend(&entries[..context * width]);
            queries.extend(&q[(context - q_len) * heads * width..context * heads * width]);
        }
        let cache = step.cache(cpu, &all, width, DType::Bf16);
        let mut out = poisoned(cpu, step.rows(), heads * latent);
        let q = tensor(cpu, heads * width, &queries);
        let seqs = step.sequences(cpu);
        cpu.attend_absorbed(
            stream,
            &q,
            &cache,
            1,
            &seqs,
            heads,
            0.2,
            step.rows(),
            &mut out,
        )
        .unwrap();
        floats(&out)
    };
    for cpu in backends() {
        let stream = &mut cpu.stream().unwrap();
        let whole = run(&cpu, stream, &[(300, 300)]);
        let row = |t: usize| &whole[t * heads * latent..][..heads * latent];
        for t in [0, 1, 63, 64, 200, 299] {
            assert_eq!(run(&cpu, stream, &[(1, t + 1)]), row(t), "{cpu:?} {t}");
        }
        let beside = run(&cpu, stream, &[(2, 150), (1, 100), (7, 300)]);
        assert_eq!(beside[2 * heads * latent..][..heads * latent], *row(99));
        assert_eq!(beside[..heads * latent], *row(148));
        assert_eq!(beside[9 * heads * latent..], *row(299));
    }
}

/// A query that is not a number shows in its head's result alone, a cache entry in those of its sequence's tokens that
/// see it; everything else has the bits it has without them.
#[test]
fn nan_stays_with_the_queries_and_tokens_it_touches() {
    let mut random = Random::new(35);
    let (heads, latent, rope) = (8, 48, 16);
    let width = latent + rope;
    let step = Step::new(&mut random, &[(3, 70), (6, 40), (2, 130)]);
    let q = random.values(step.rows() * heads * width);
    let entries = random.values(step.context() * width);
    let kv = random.values(step.context() * heads * 2 * latent);
    // Row 4, the second sequence's second query, in head 5; that sequence's token 37, which its last three rows see.
    let (row, head, token) = (4, 5, 37);
    let touched = |t: usize, h: usize| (t, h) == (row, head) || (6..9).contains(&t);
    let (mut bad_q, mut bad_entries, mut bad_kv) = (q.clone(), entries.clone(), kv.clone());
    bad_q[(row * heads + head) * width + 3] = f32::NAN;
    bad_entries[(70 + token) * width + 7] = f32::NAN;
    bad_kv[(70 + token) * heads * 2 * latent..][..heads * 2 * latent].fill(f32::NAN);
    for cpu in backends() {
        let stream = &mut cpu.stream().unwrap();
        let seqs = step.sequences(&cpu);
        let mut absorbed = |q: &[f32], entries: &[f32]| {
            let cache = step.cache(&cpu, entries, width, DType::Bf16);
            let q = tensor(&cpu, heads * width, q);
            let mut out = poisoned(&cpu, step.rows(), heads * latent);
            let rows = step.rows();
            cpu.attend_absorbed(stream, &q, &cache, 1, &seqs, heads, 0.2, rows, &mut out)
                .unwrap();
            floats(&out)
        };
        let pairs = [(
            absorbed(&q, &entries),
            absorbed(&bad_q, &bad_entries),
            "absorbed",
        )];
        let start = ints(&cpu, 1, &[0, 70, 110, 240]);
        let ropes = tensor(&cpu, rope, &random.values(step.context() * rope));
        let mut expanded = |q: &[f32], kv: &[f32]| {
            let (q, kv) = (
                tensor(&cpu, heads * width, q),
                tensor(&cpu, heads * 2 * latent, kv),
            );
            let mut out = poisoned(&cpu, step.rows(), heads * latent);
            let rows = step.rows();
            cpu.attend_expanded(
                stream, &q, &kv, &ropes, &seqs, &start, heads, 0.2, rows, &mut out,
            )
            .unwrap();
            floats(&out)
        };
        let other = (expanded(&q, &kv), expanded(&bad_q, &bad_kv), "expanded");
        for (good, bad, form) in pairs.into_iter().chain([other]) {
            for (i, (good, bad)) in good.iter().zip(&bad).enumerate() {
                let (t, h) = (i / (heads * latent), i / latent % heads);
                assert!(good.is_finite());
                if touched(t, h) {
                    assert!(bad.is_nan(), "{form} {cpu:?}: row {t}, head {h}");
                } else {
                    assert_eq!(
                        good.to_bits(),
                        bad.to_bits(),
                        "{form} {cpu:?}: row {t}, head {h}"
                    );
                }
            }
        }
    }
}

#[test]
fn cache_entries_are_normalised_rotated_and_read_back() {
    let mut random = Random::new(33);
    let (latent, rope, layer) = (40, 6, 1);
    let width = latent + rope;
    for dtype in [DType::F32, DType::Bf16] {
        let step = Step::new(&mut random, &[(70, 70), (1, 10), (4, 4)]);
        let rows = step.rows();
        let kv = random.values(rows * (width + 3));
        let weight = random.values(latent);
        let table = random.values(70 * rope);
        let mut want = Vec::new();
        for (kv, (_, visible)) in kv.chunks_exact(width + 3).zip(step.queries()) {
            let x = &kv[3..3 + latent];
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / latent as f64;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            want.extend(
                x.iter()
                    .zip(&weight)
                    .map(|(x, w)| f64::from(*x) * scale * f64::from(*w)),
            );
            let angles = &table[(visible - 1) * rope..][..rope];
            for (v, angle) in kv[3 + latent..].chunks_exact(2).zip(angles.chunks_exact(2)) {
                let [re, im, cos, sin] = [v[0], v[1], angle[0], angle[1]].map(f64::from);
                want.extend([re * cos - im * sin, re * sin + im * cos]);
            }
        }
        let bound = if dtype == DType::F32 { 2e-6 } else { 2e-2 };
        check(&format!("{dtype:?}"), &want, bound, |cpu, stream| {
            let cache = step.cache(cpu, &vec![7.0; step.context() * width], width, dtype);
            let seqs = step.sequences(cpu);
            let wide = tensor(cpu, width + 3, &kv);
            let columns = Columns {
                tensor: &wide,
                first: 3,
                cols: width,
            };
            let (weight, table) = (tensor(cpu, latent, &weight), tensor(cpu, rope, &table));
            cpu.cache_write(
                stream, columns, &weight, 1e-6, &table, &seqs, layer, rows, &cache,
            )
            .unwrap();
            let context = step.context();
            let start = ints(cpu, 1, &[0, 70, 80, 84]);
            let (mut latents, mut ropes) =
                (poisoned(cpu, context, latent), poisoned(cpu, context, rope));
            cpu.cache_read(
                stream,
                &cache,
                layer,
                &seqs,
                &start,
                context,
                &mut latents,
                &mut ropes,
            )
            .unwrap();
            let (latents, ropes) = (floats(&latents), floats(&ropes));
            // Only the last of the second sequence's ten tokens was written now.
            assert!(latents[70 * latent..79 * latent].iter().all(|v| *v == 7.0));
            let written = (0..70).chain(79..84);
            written
                .flat_map(|t| {
                    [&latents[t * latent..][..latent], &ropes[t * rope..][..rope]].concat()
                })
                .collect()
        });
    }
}

#[test]
fn rows_without_a_slot_are_not_written_and_bad_tables_are_errors() {
    for cpu in backends() {
        let stream = &mut cpu.stream().unwrap();
        let step = Step::new(&mut Random::new(34), &[(2, 2)]);
        let cache = step.cache(&cpu, &[5.0; 12], 6, DType::F32);
        let kv = tensor(&cpu, 6, &[1.0; 12]);
        let (weight, table) = (
            tensor(&cpu, 4, &[1.0; 4]),
            tensor(&cpu, 2, &[1.0, 0.0, 1.0, 0.0]),
        );
        let mut run = |change: &dyn Fn(&mut Sequences<Memory>)| {
            let mut seqs = step.sequences(&cpu);
            change(&mut seqs);
            let columns = Columns {
                tensor: &kv,
                first: 0,
                cols: 6,
            };
            cpu.cache_write(stream, columns, &weight, 1e-6, &table, &seqs, 1, 2, &cache)?;
            let (q, mut out) = (tensor(&cpu, 6, &[1.0; 12]), poisoned(&cpu, 2, 4));
            cpu.attend_absorbed(stream, &q, &cache, 1, &seqs, 1, 1.0, 2, &mut out)?;
            Ok::<_, crate::Error>(floats(&out))
        };
        let none = |seqs: &mut Sequences<Memory>| seqs.slots = ints(&cpu, 1, &[-1, -1]);
        assert_eq!(run(&none).unwrap(), [5.0; 8], "{cpu:?}");
        assert!(run(&|_| {}).unwrap().iter().all(|v| (v - 1.0).abs() < 1e-5));
        assert!(run(&|s| s.slots = ints(&cpu, 1, &[0, 64 * 99])).is_err());
        assert!(run(&|s| s.positions = ints(&cpu, 1, &[0, 2])).is_err());
        assert!(run(&|s| s.block_table = ints(&cpu, 1, &[77])).is_err());
        assert!(run(&|s| s.context_len = ints(&cpu, 1, &[1])).is_err());
        assert!(run(&|s| s.context_len = ints(&cpu, 1, &[129])).is_err());
        assert!(run(&|s| s.query_start = ints(&cpu, 1, &[0, 3])).is_err());
        assert!(run(&|s| s.query_start = ints(&cpu, 1, &[2, 1])).is_err());
    }
}
