//! Every operation, in every implementation that this processor can run, against float64: the reference within its
//! bound; the fast path within the same bound, and the same bits whatever the instruction set and the threads.

mod attention;
mod experts;
mod linear;
mod moe;
mod rows;

use half::bf16;

use super::memory::{Arena, Memory};
use super::simd::Isa;
use super::{Cpu, Stream};
use crate::backend::{Backend, HostMatrix, Quantised};
use crate::fp8;
use crate::tensor::{DType, Tensor};

/// Repeatable random numbers (splitmix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Never zero, about Gaussian.
    pub(super) fn value(&mut self) -> f32 {
        let sum: i64 = (0..4).map(|_| (self.next() >> 44) as i64 - (1 << 19)).sum();
        (sum as f32 + 0.5) / (1 << 19) as f32
    }

    pub(super) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// The oracle and every form of the fast path.
pub(super) fn backends() -> Vec<Cpu> {
    let mut all = vec![Cpu::reference()];
    for isa in Isa::available() {
        for threads in [1, 3] {
            all.push(Cpu {
                threads,
                isa: Some(isa),
                arena: Arena::default(),
            });
        }
    }
    all
}

/// Runs `op` on every backend: all within `bound` of `want` (relative to its root mean square), all fast ones alike.
pub(super) fn check(
    what: &str,
    want: &[f64],
    bound: f64,
    op: impl Fn(&Cpu, &mut Stream) -> Vec<f32>,
) {
    let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len().max(1) as f64).sqrt();
    let mut fast: Option<Vec<u32>> = None;
    for cpu in backends() {
        let got = op(&cpu, &mut cpu.stream().unwrap());
        assert_eq!(got.len(), want.len(), "{what} {cpu:?}");
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(*got) - want).abs() / rms.max(1e-30);
            assert!(
                error <= bound,
                "{what} {cpu:?} [{i}]: {got} for {want}, error {error:e}"
            );
        }
        if cpu.isa.is_some() {
            let bits: Vec<u32> = got.iter().map(|v| v.to_bits()).collect();
            let first = fast.get_or_insert_with(|| bits.clone());
            let differs = first.iter().zip(&bits).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{what} {cpu:?}: bits differ");
        }
    }
}

pub(super) fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> Tensor<Memory> {
    let rows = values.len() / cols.max(1);
    cpu.import(DType::F32, rows, cols, bytemuck::cast_slice(values))
        .unwrap()
}

pub(super) fn ints(cpu: &Cpu, cols: usize, values: &[i32]) -> Tensor<Memory> {
    let rows = values.len() / cols.max(1);
    cpu.import(DType::I32, rows, cols, bytemuck::cast_slice(values))
        .unwrap()
}

/// Outputs full of NaN: what an operation leaves out shows.
pub(super) fn poisoned(cpu: &Cpu, rows: usize, cols: usize) -> Tensor<Memory> {
    let mut t = cpu.alloc(DType::F32, rows, cols).unwrap();
    t.mem.slice_mut().fill(f32::NAN);
    t
}

pub(super) fn poisoned_quantised(cpu: &Cpu, rows: usize, cols: usize) -> Quantised<Memory> {
    let mut data = cpu.alloc(DType::Fp8, rows, cols).unwrap();
    data.mem.slice_mut().fill(0x7fu8);
    Quantised {
        data,
        scales: poisoned(cpu, rows, cols.div_ceil(fp8::BLOCK)),
    }
}

/// The values of quantised rows.
pub(super) fn dequantised(q: &Quantised<Memory>) -> Vec<f32> {
    let (cols, blocks) = (q.data.cols, q.scales.cols);
    let scales: &[f32] = q.scales.mem.slice();
    let value = |(i, byte): (usize, &u8)| {
        fp8::decode(*byte) * scales[i / cols * blocks + i % cols / fp8::BLOCK]
    };
    q.data
        .mem
        .slice::<u8>()
        .iter()
        .enumerate()
        .map(value)
        .collect()
}

pub(super) fn floats(t: &Tensor<Memory>) -> Vec<f32> {
    t.mem.slice::<f32>()[..t.rows * t.cols].to_vec()
}

/// A random matrix as a checkpoint holds it.
pub(super) struct Checkpoint {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
    pub(super) data: Vec<u8>,
    scales: Vec<f32>,
}

impl Checkpoint {
    pub(super) fn random(random: &mut Random, dtype: DType, rows: usize, cols: usize) -> Self {
        let values = random.values(rows * cols);
        let data = match dtype {
            DType::F32 | DType::I32 => bytemuck::cast_slice(&values).to_vec(),
            DType::Bf16 => values
                .iter()
                .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
                .collect(),
            DType::Fp8 => values.iter().map(|v| fp8::encode(*v * 100.0)).collect(),
        };
        let blocks = rows.div_ceil(fp8::BLOCK) * cols.div_ceil(fp8::BLOCK);
        Self {
            rows,
            cols,
            dtype,
            data,
            scales: (0..blocks)
                .map(|_| 0.001 + random.value().abs() * 0.01)
                .collect(),
        }
    }

    pub(super) fn host(&self) -> HostMatrix<'_> {
        HostMatrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            data: &self.data,
            scales: (self.dtype == DType::Fp8).then_some(&self.scales[..]),
        }
    }

    /// Element `[row, col]`, dequantised exactly.
    pub(super) fn value(&self, row: usize, col: usize) -> f64 {
        let i = row * self.cols + col;
        match self.dtype {
            DType::F32 | DType::I32 => f64::from(bytemuck::cast_slice::<u8, f32>(&self.data)[i]),
            DType::Bf16 => {
                let bytes = [self.data[2 * i], self.data[2 * i + 1]];
                bf16::from_le_bytes(bytes).to_f64()
            }
            DType::Fp8 => {
                let blocks = self.cols.div_ceil(fp8::BLOCK);
                let scale = self.scales[row / fp8::BLOCK * blocks + col / fp8::BLOCK];
                f64::from(fp8::decode(self.data[i])) * f64::from(scale)
            }
        }
    }
}
