//! FP8 products with block scales: one matrix, and one for each expert over its own rows.

use super::{Error, Host, Judged, Operation, Random, sample};
use crate::backend::{Backend, Dispatch, HostMatrix, Input, Precision, Quantised, Result};
use crate::cpu::{Cpu, Memory};
use crate::fp8;
use crate::tensor::{DType, Tensor};

/// Activations `[m, k]` in FP8 with a scale for each row and 128 columns, weights of `groups` matrices `[n, k]` one after the
/// other with a scale for each 128x128 block.
#[derive(Debug)]
pub struct Operands {
    /// Rows of the activations.
    pub m: usize,
    /// Outputs of a matrix.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// FP8, `[m, k]`.
    pub x: Vec<u8>,
    /// `[m, k / 128]`.
    pub x_scale: Vec<f32>,
    /// FP8, `[groups, n, k]`.
    pub w: Vec<u8>,
    /// `[groups, ceil(n / 128), k / 128]`.
    pub w_scale: Vec<f32>,
}

impl Operands {
    fn new(m: usize, n: usize, k: usize, groups: usize) -> Self {
        let mut random = Random((m * 31 + n * 7 + k + groups) as u64);
        let blocks = k / fp8::BLOCK;
        Self {
            m,
            n,
            k,
            x: bytes(&mut random, m * k),
            x_scale: random.weights(m * blocks, 0.01),
            w: bytes(&mut random, groups * n * k),
            w_scale: random.weights(groups * n.div_ceil(fp8::BLOCK) * blocks, 0.001),
        }
    }

    /// The product of row `t` with output `row` of a group's matrix.
    fn product(&self, t: usize, group: usize, row: usize) -> f64 {
        let (k, blocks) = (self.k, self.k / fp8::BLOCK);
        let weights = group * self.n + row;
        let scales = (group * self.n.div_ceil(fp8::BLOCK) + row / fp8::BLOCK) * blocks;
        product(
            &self.x[t * k..][..k],
            &self.w[weights * k..][..k],
            |block| {
                f64::from(self.x_scale[t * blocks + block])
                    * f64::from(self.w_scale[scales + block])
            },
        )
    }

    /// Adds the error of some outputs `[m, n]` of rows `start..start + count`.
    fn compare(&self, out: &[f32], group: usize, start: usize, count: usize, error: &mut Error) {
        let mut random = Random(5);
        let columns = sample(&mut random, self.n, 48);
        for t in sample(&mut random, count, 24) {
            for &row in &columns {
                let value = f64::from(out[(start + t) * self.n + row]);
                error.add(value, self.product(start + t, group, row));
            }
        }
    }

    fn activations(&self, host: &Host<'_>) -> Result<Quantised<Memory>> {
        let blocks = self.k / fp8::BLOCK;
        Ok(Quantised {
            data: host.cpu.import(DType::Fp8, self.m, self.k, &self.x)?,
            scales: host.floats(blocks, &self.x_scale)?,
        })
    }

    /// Rows `first..first + rows` of a group's matrix. `first` is a multiple of 128.
    fn matrix(&self, group: usize, first: usize, rows: usize) -> HostMatrix<'_> {
        let blocks = self.k / fp8::BLOCK;
        let data = (group * self.n + first) * self.k;
        let scales = (group * self.n.div_ceil(fp8::BLOCK) + first / fp8::BLOCK) * blocks;
        HostMatrix {
            dtype: DType::Fp8,
            rows,
            cols: self.k,
            data: &self.w[data..][..rows * self.k],
            scales: Some(&self.w_scale[scales..][..rows.div_ceil(fp8::BLOCK) * blocks]),
        }
    }
}

/// The scaled product of a row of activations and a row of weights; `scale` is of a block of 128.
fn product(x: &[u8], w: &[u8], scale: impl Fn(usize) -> f64) -> f64 {
    let blocks = x.chunks(fp8::BLOCK).zip(w.chunks(fp8::BLOCK));
    let sum = |(block, (x, w)): (usize, (&[u8], &[u8]))| {
        let value = |byte: u8| f64::from(fp8::VALUES[usize::from(byte)]);
        let dot: f64 = x.iter().zip(w).map(|(&a, &b)| value(a) * value(b)).sum();
        dot * scale(block)
    };
    blocks.enumerate().map(sum).sum()
}

/// FP8 values of about normal distribution, out of 256 drawn once.
fn bytes(random: &mut Random, len: usize) -> Vec<u8> {
    let values: [u8; 256] = std::array::from_fn(|_| fp8::encode(random.normal(100.0)));
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        let picks = random.bits().to_le_bytes();
        bytes.extend(picks.map(|pick| values[usize::from(pick)]));
    }
    bytes.truncate(len);
    bytes
}

/// One matrix over all rows.
#[derive(Debug)]
pub struct Gemm(pub Operands);

impl Gemm {
    /// Rows, outputs and inputs: DeepSeek-V3's products, and odd ones.
    pub fn list() -> impl Iterator<Item = (usize, usize, usize)> {
        const SHAPES: [(usize, usize); 8] = [
            (64, 128),
            (576, 384),
            (320, 1024),
            (2112, 7168),
            (7168, 2048),
            (4096, 7168),
            (24576, 1536),
            (7168, 16384),
        ];
        let rows = |(n, k)| [1, 7, 33, 64, 127, 200, 4096].map(|m| (m, n, k));
        SHAPES.into_iter().flat_map(rows)
    }

    /// `m` rows, `n` outputs, `k` inputs (a multiple of 128).
    pub fn new(m: usize, n: usize, k: usize) -> Self {
        Self(Operands::new(m, n, k, 1))
    }
}

impl Operation for Gemm {
    /// `[m, n]`.
    type Out = Vec<f32>;
    /// BF16 outputs and the tensor cores' 14-bit sums inside a block.
    const BOUND: f64 = 4e-3;
    const CPU_BOUND: f64 = 1e-5;

    fn cpu(&self, cpu: &Cpu) -> Result<Vec<f32>> {
        let Operands { m, n, .. } = self.0;
        let mut host = Host::new(cpu)?;
        let x = self.0.activations(&host)?;
        let weights = cpu.linear(&[self.0.matrix(0, 0, n)], Precision::W8A8)?;
        let mut out = host.alloc(DType::F32, m, n)?;
        let input = Input::Quantised(&x);
        cpu.matmul(&mut host.stream, input, &weights, m, &mut out)?;
        host.read(&out)
    }

    fn judge(&self, out: &Vec<f32>) -> Judged {
        let mut error = Error::default();
        self.0.compare(out, 0, 0, self.0.m, &mut error);
        Judged::new(&error, 0)
    }

    fn work(&self) -> f64 {
        (self.0.m * self.0.n * self.0.k) as f64
    }
}

/// A matrix for each expert over the rows that chose it, experts one after the other.
#[derive(Debug)]
pub struct Grouped(pub Operands);

impl Grouped {
    /// Rows of each expert: none, one, ragged, exactly a tile, more than one tile.
    pub const COUNTS: [usize; 8] = [0, 1, 37, 64, 0, 163, 130, 16];

    /// `n` outputs (gate and up, a multiple of 256) and `k` inputs (a multiple of 128).
    pub fn new(n: usize, k: usize) -> Self {
        let rows = Self::COUNTS.iter().sum();
        Self(Operands::new(rows, n, k, Self::COUNTS.len()))
    }

    /// First row of each expert, and the number of rows.
    pub fn starts() -> Vec<usize> {
        let mut starts = vec![0];
        for count in Self::COUNTS {
            starts.push(starts[starts.len() - 1] + count);
        }
        starts
    }
}

impl Operation for Grouped {
    /// `[rows, n]`.
    type Out = Vec<f32>;
    const BOUND: f64 = Gemm::BOUND;
    const CPU_BOUND: f64 = Gemm::CPU_BOUND;

    fn cpu(&self, cpu: &Cpu) -> Result<Vec<f32>> {
        let Operands { m, n, k, .. } = self.0;
        let (groups, inter) = (Self::COUNTS.len(), n / 2);
        let mut host = Host::new(cpu)?;
        let x = self.0.activations(&host)?;
        let mut experts = cpu.experts(groups, k, inter, Precision::W8A8)?;
        // The down product is not asked for.
        let (data, scales) = (
            vec![0; k * inter],
            vec![1.0; k.div_ceil(fp8::BLOCK) * inter.div_ceil(fp8::BLOCK)],
        );
        let down = HostMatrix {
            dtype: DType::Fp8,
            rows: k,
            cols: inter,
            data: &data,
            scales: Some(&scales),
        };
        for group in 0..groups {
            let gate = self.0.matrix(group, 0, inter);
            let up = self.0.matrix(group, inter, inter);
            cpu.load_expert(&mut experts, group, &gate, &up, &down)?;
        }
        let ints =
            |values: Vec<i32>| -> Result<Tensor<Memory>> { host.ints(values.len(), &values) };
        let dispatch = Dispatch {
            offsets: ints(Self::starts().iter().map(|&s| s as i32).collect())?,
            copy_of_row: ints((0..m as i32).collect())?,
            row_of_copy: ints((0..m as i32).collect())?,
        };
        let mut out = host.alloc(DType::F32, m, n)?;
        let input = Input::Quantised(&x);
        cpu.experts_gate_up(&mut host.stream, input, &experts, &dispatch, m, 1, &mut out)?;
        host.read(&out)
    }

    fn judge(&self, out: &Vec<f32>) -> Judged {
        let mut error = Error::default();
        for (group, rows) in Self::starts().windows(2).enumerate() {
            let count = rows[1] - rows[0];
            self.0.compare(out, group, rows[0], count, &mut error);
        }
        Judged::new(&error, 0)
    }

    fn work(&self) -> f64 {
        (self.0.m * self.0.n * self.0.k) as f64
    }
}
