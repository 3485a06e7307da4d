//! The gate, the order of token copies, and the weighted sum back.

use super::{Error, Host, Judged, Operation, Random, bf16};
use crate::backend::{Backend, Dispatch, GateShape, Result, Routing};
use crate::cpu::Cpu;
use crate::tensor::DType;

/// DeepSeek-V3's gate.
pub const V3: GateShape = GateShape {
    experts: 256,
    groups: 8,
    top_groups: 4,
    top_k: 8,
    scale: 2.5,
    normalise: true,
};

/// The gate, from logits.
#[derive(Debug)]
pub struct Gate {
    /// Its parameters.
    pub shape: GateShape,
    /// Tokens.
    pub tokens: usize,
    /// `[tokens, experts]`.
    pub logits: Vec<f32>,
    /// `[experts]`.
    pub bias: Vec<f32>,
}

/// How logits and biases are drawn.
#[derive(Clone, Copy, Debug)]
pub struct GateInputs {
    /// They are multiples of this (and tie) where it is not 0.
    pub step: f64,
    /// Added to the biases.
    pub offset: f64,
}

/// What [`Gate`] leaves.
#[derive(Debug, PartialEq)]
pub struct Gated {
    /// `[tokens, top_k]`.
    pub experts: Vec<i32>,
    /// `[tokens, top_k]`.
    pub weights: Vec<f32>,
    /// `[experts]`.
    pub counts: Vec<i32>,
}

impl Gate {
    /// Name, parameters, inputs and tokens of the cases.
    pub fn list() -> Vec<(String, GateShape, GateInputs, usize)> {
        let small = GateShape {
            experts: 64,
            groups: 8,
            top_groups: 3,
            top_k: 4,
            scale: 1.0,
            normalise: false,
        };
        let flat = GateShape {
            experts: 32,
            groups: 1,
            top_groups: 1,
            top_k: 32,
            scale: 2.5,
            normalise: true,
        };
        let mut cases = Vec::new();
        for (name, shape) in [
            ("v3", V3),
            ("64 experts", small),
            ("one group, all of 32", flat),
        ] {
            for (what, step, offset) in [
                ("random", 0.0, 0.0),
                ("ties", 0.5, 0.0),
                ("negative biases", 0.0, -3.0),
            ] {
                for tokens in [1, 128, 1000] {
                    let name = format!("gate {name} {what} tokens {tokens}");
                    cases.push((name, shape, GateInputs { step, offset }, tokens));
                }
            }
        }
        cases
    }

    /// Random logits and biases.
    pub fn new(shape: GateShape, tokens: usize, GateInputs { step, offset }: GateInputs) -> Self {
        let mut random = Random(1);
        let mut draw = |spread: f64| {
            let x = (random.unit() - 0.5) * spread;
            if step > 0.0 {
                (x / step).round() * step
            } else {
                x
            }
        };
        Self {
            shape,
            tokens,
            logits: (0..tokens * shape.experts)
                .map(|_| draw(6.0) as f32)
                .collect(),
            bias: (0..shape.experts)
                .map(|_| (f64::from(draw(1.0) as f32) + offset) as f32)
                .collect(),
        }
    }

    /// The rule itself. Scores are rounded to float32, as every implementation's are: ties are ties of those.
    fn choose(&self, token: usize) -> (Vec<usize>, Vec<f64>) {
        let shape = self.shape;
        let logits = &self.logits[token * shape.experts..][..shape.experts];
        let scores: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
        let choice: Vec<f32> = scores.iter().zip(&self.bias).map(|(s, b)| s + b).collect();
        let size = shape.experts / shape.groups;
        let best = |values: &[f32], count: usize| {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
            order.truncate(count);
            order
        };
        let groups: Vec<f32> = choice
            .chunks(size)
            .map(|group| best(group, 2).into_iter().map(|i| group[i]).sum())
            .collect();
        let kept = best(&groups, shape.top_groups);
        let masked: Vec<f32> = (0..shape.experts)
            .map(|e| {
                if kept.contains(&(e / size)) {
                    choice[e]
                } else {
                    f32::NEG_INFINITY
                }
            })
            .collect();
        let chosen = best(&masked, shape.top_k);
        let total: f64 = chosen.iter().map(|&e| f64::from(scores[e])).sum();
        let divide = if shape.normalise { total } else { 1.0 };
        let weight = |&e: &usize| f64::from(shape.scale) * f64::from(scores[e]) / divide;
        let weights = chosen.iter().map(weight).collect();
        (chosen, weights)
    }
}

impl Operation for Gate {
    type Out = Gated;
    const BOUND: f64 = 1e-6;
    const CPU_BOUND: f64 = 1e-6;

    fn cpu(&self, cpu: &Cpu) -> Result<Gated> {
        let (experts, top_k) = (self.shape.experts, self.shape.top_k);
        let mut host = Host::new(cpu)?;
        // Products with the unit matrix are the logits themselves.
        let mut unit = vec![0.0f32; experts * experts];
        unit.iter_mut()
            .step_by(experts + 1)
            .for_each(|one| *one = 1.0);
        let (x, weight) = (
            host.floats(experts, &self.logits)?,
            host.floats(experts, &unit)?,
        );
        let bias = host.floats(experts, &self.bias)?;
        let mut out = Routing {
            experts: host.alloc(DType::I32, self.tokens, top_k)?,
            weights: host.alloc(DType::F32, self.tokens, top_k)?,
        };
        let mut counts = host.ints(experts, &vec![0; experts])?;
        let (stream, shape) = (&mut host.stream, &self.shape);
        cpu.gate(
            stream,
            &x,
            &weight,
            &bias,
            shape,
            self.tokens,
            &mut out,
            &mut counts,
        )?;
        Ok(Gated {
            experts: host.read(&out.experts)?,
            weights: host.read(&out.weights)?,
            counts: host.read(&counts)?,
        })
    }

    fn judge(&self, out: &Gated) -> Judged {
        let (mut error, mut wrong) = (Error::default(), 0);
        let mut counts = vec![0; self.shape.experts];
        for t in 0..self.tokens {
            let (expected, weights) = self.choose(t);
            let at = t * self.shape.top_k;
            let differs = |(found, want): &(&i32, &usize)| **found as usize != **want;
            wrong += out.experts[at..]
                .iter()
                .zip(&expected)
                .filter(differs)
                .count();
            for (w, e) in out.weights[at..].iter().zip(weights) {
                error.add(f64::from(*w), e);
            }
            for e in expected {
                counts[e] += 1;
            }
        }
        Judged::new(&error, wrong + usize::from(out.counts != counts))
    }

    fn work(&self) -> f64 {
        (self.tokens * self.shape.experts * self.shape.experts) as f64
    }
}

/// The order of token copies by expert slot, and the sum of the experts' outputs in the gate's order.
#[derive(Debug)]
pub struct Moves {
    /// Tokens.
    pub tokens: usize,
    /// Expert slots.
    pub slots: usize,
    /// `[experts, WIDTH]`: number of slots, then which.
    pub table: Vec<i32>,
    /// `[tokens, TOP_K]`.
    pub chosen: Vec<i32>,
    /// `[tokens, TOP_K]`.
    pub weights: Vec<f32>,
    /// `[copies, COLS]`.
    pub y: Vec<u16>,
    /// `[tokens, COLS]`.
    pub shared: Vec<u16>,
}

/// What [`Moves`] leaves.
#[derive(Debug)]
pub struct Moved {
    /// `[slots + 1]`.
    pub offsets: Vec<i32>,
    /// `[copies]`.
    pub copy_of_row: Vec<i32>,
    /// `[copies]`.
    pub row_of_copy: Vec<i32>,
    /// `[tokens, COLS]`.
    pub out: Vec<f32>,
}

impl Moves {
    /// Experts of a token.
    pub const TOP_K: usize = 8;
    /// Entries of a row of the table.
    pub const WIDTH: usize = 3;
    /// Columns.
    pub const COLS: usize = 7168;

    /// Tokens and slots of the cases.
    pub const SIZES: [(usize, usize); 4] = [(1, 256), (128, 288), (4096, 288), (33, 1)];

    /// Random choices, weights and rows.
    pub fn new(tokens: usize, slots: usize) -> Self {
        let experts = slots.min(256);
        let copies = tokens * Self::TOP_K;
        let mut random = Random(2);
        // The first experts have a second slot where there are slots to spare.
        let entry = |e: usize| {
            if e + experts < slots {
                [2, e as i32, (e + experts) as i32]
            } else {
                [1, e as i32, 0]
            }
        };
        Self {
            tokens,
            slots,
            table: (0..experts).flat_map(entry).collect(),
            chosen: (0..copies).map(|_| random.below(experts) as i32).collect(),
            weights: random.weights(copies, 0.3),
            y: random.bf16s(copies * Self::COLS, 1.0),
            shared: random.bf16s(tokens * Self::COLS, 1.0),
        }
    }

    /// Copies in the order of their rows.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.chosen.len()).collect();
        order.sort_by_key(|&c| self.slot(c));
        order
    }

    fn slot(&self, copy: usize) -> usize {
        let entry = &self.table[self.chosen[copy] as usize * Self::WIDTH..][..Self::WIDTH];
        entry[1 + copy / Self::TOP_K % entry[0] as usize] as usize
    }
}

impl Operation for Moves {
    type Out = Moved;
    const BOUND: f64 = 3e-3;
    const CPU_BOUND: f64 = 1e-6;

    fn cpu(&self, cpu: &Cpu) -> Result<Moved> {
        let (tokens, copies) = (self.tokens, self.tokens * Self::TOP_K);
        let mut host = Host::new(cpu)?;
        let routing = Routing {
            experts: host.ints(Self::TOP_K, &self.chosen)?,
            weights: host.floats(Self::TOP_K, &self.weights)?,
        };
        let table = host.ints(Self::WIDTH, &self.table)?;
        let mut order = Dispatch {
            offsets: host.alloc(DType::I32, self.slots + 1, 1)?,
            copy_of_row: host.alloc(DType::I32, copies, 1)?,
            row_of_copy: host.alloc(DType::I32, copies, 1)?,
        };
        cpu.dispatch(
            &mut host.stream,
            &routing,
            &table,
            tokens,
            self.slots,
            &mut order,
        )?;
        let (y, shared) = (
            host.bf16s(Self::COLS, &self.y)?,
            host.bf16s(Self::COLS, &self.shared)?,
        );
        let mut out = host.alloc(DType::F32, tokens, Self::COLS)?;
        cpu.combine(
            &mut host.stream,
            &y,
            &routing,
            &order,
            Some(&shared),
            tokens,
            &mut out,
        )?;
        Ok(Moved {
            offsets: host.read(&order.offsets)?,
            copy_of_row: host.read(&order.copy_of_row)?,
            row_of_copy: host.read(&order.row_of_copy)?,
            out: host.read(&out)?,
        })
    }

    fn judge(&self, found: &Moved) -> Judged {
        let order = self.order();
        let mut wrong = 0;
        for (r, &c) in order.iter().enumerate() {
            wrong += usize::from(found.copy_of_row[r] as usize != c);
            wrong += usize::from(found.row_of_copy[c] as usize != r);
        }
        for (s, &offset) in found.offsets.iter().enumerate() {
            let first = order.partition_point(|&c| self.slot(c) < s);
            wrong += usize::from(offset as usize != first);
        }
        let (mut error, mut random) = (Error::default(), Random(3));
        let mut row_of_copy = vec![0; order.len()];
        for (r, &c) in order.iter().enumerate() {
            row_of_copy[c] = r;
        }
        for _ in 0..20_000 {
            let (t, i) = (random.below(self.tokens), random.below(Self::COLS));
            let term = |c: usize| {
                f64::from(self.weights[c]) * bf16(self.y[row_of_copy[c] * Self::COLS + i])
            };
            let sum: f64 = (t * Self::TOP_K..(t + 1) * Self::TOP_K).map(term).sum();
            let at = t * Self::COLS + i;
            error.add(f64::from(found.out[at]), sum + bf16(self.shared[at]));
        }
        Judged::new(&error, wrong)
    }

    fn work(&self) -> f64 {
        (self.y.len() + self.shared.len()) as f64
    }
}
