//! Cases that every implementation of an operation is checked with: inputs, and a comparison with float64 arithmetic.
//!
//! The device program (`device check`) runs them through the CUDA kernels and through the CPU backend and prints both errors
//! in one table; the crate's tests run the same list through the CPU backend alone. Activations are BF16 values, which every
//! backend can hold; the sizes are DeepSeek-V3's where time allows.

pub mod attention;
pub mod cache;
pub mod gemm;
pub mod moe;
pub mod rows;

use crate::backend::{Backend, Result};
use crate::cpu::{Cpu, Memory, Stream};
use crate::tensor::{DType, Tensor};

/// Inputs of one operation.
pub trait Operation {
    /// What the operation leaves.
    type Out;
    /// Largest error of BF16 outputs.
    const BOUND: f64;
    /// Largest error of float32 outputs.
    const CPU_BOUND: f64;

    /// Computes on the CPU backend.
    ///
    /// # Errors
    /// The backend's.
    fn cpu(&self, cpu: &Cpu) -> Result<Self::Out>;
    /// Compares with float64.
    fn judge(&self, out: &Self::Out) -> Judged;
    /// Multiplications and additions, or elements moved: how long the CPU would take.
    fn work(&self) -> f64;
}

/// What a comparison found.
#[derive(Debug)]
pub struct Judged {
    /// Relative error of the outputs looked at.
    pub error: f64,
    /// Outputs that have to be exact (choices, quantised bytes, copies) and are not.
    pub wrong: usize,
}

impl Judged {
    /// From what was collected.
    pub fn new(error: &Error, wrong: usize) -> Self {
        Self {
            error: error.relative(),
            wrong,
        }
    }
}

/// Collects the relative error of an output against its reference: ||out - ref|| / ||ref||.
#[derive(Debug, Default)]
pub struct Error {
    difference: f64,
    reference: f64,
}

impl Error {
    /// Adds one element.
    pub fn add(&mut self, out: f64, reference: f64) {
        self.difference += (out - reference).powi(2);
        self.reference += reference.powi(2);
    }

    /// The relative error; NaN where anything was NaN, infinite where the reference is all zero and the output is not.
    pub fn relative(&self) -> f64 {
        if self.difference == 0.0 && self.reference == 0.0 {
            return 0.0;
        }
        (self.difference / self.reference).sqrt()
    }
}

/// Random numbers for shapes and contents (splitmix64).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About Gaussian with deviation `deviation`.
    pub fn normal(&mut self, deviation: f32) -> f32 {
        let bits = self.bits();
        let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
        (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt() * deviation
    }

    /// `len` BF16 values.
    pub fn bf16s(&mut self, len: usize, deviation: f32) -> Vec<u16> {
        (0..len)
            .map(|_| half::bf16::from_f32(self.normal(deviation)).to_bits())
            .collect()
    }

    /// `len` positive float32 values around `middle`.
    pub fn weights(&mut self, len: usize, middle: f32) -> Vec<f32> {
        (0..len)
            .map(|_| middle * (0.5 + self.unit() as f32))
            .collect()
    }

    /// `0..len` in random order.
    pub fn order(&mut self, len: usize) -> Vec<i32> {
        let mut order: Vec<i32> = (0..len as i32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// BF16 to f64.
pub fn bf16(x: u16) -> f64 {
    f64::from(half::bf16::from_bits(x).to_f32())
}

/// BF16 to float32.
pub fn floats(x: &[u16]) -> Vec<f32> {
    x.iter()
        .map(|&v| half::bf16::from_bits(v).to_f32())
        .collect()
}

/// Up to `count` indices below `len`: the first, the last, and random ones.
pub fn sample(random: &mut Random, len: usize, count: usize) -> Vec<usize> {
    if len <= count {
        return (0..len).collect();
    }
    let mut picked: Vec<usize> = (2..count).map(|_| random.below(len)).collect();
    picked.extend([0, len - 1]);
    picked
}

/// The CPU backend with a stream, for running cases.
struct Host<'a> {
    cpu: &'a Cpu,
    stream: Stream,
}

impl<'a> Host<'a> {
    fn new(cpu: &'a Cpu) -> Result<Self> {
        Ok(Self {
            cpu,
            stream: cpu.stream()?,
        })
    }

    fn floats(&self, cols: usize, data: &[f32]) -> Result<Tensor<Memory>> {
        let bytes = bytemuck::cast_slice(data);
        self.cpu
            .import(DType::F32, data.len() / cols.max(1), cols, bytes)
    }

    fn bf16s(&self, cols: usize, data: &[u16]) -> Result<Tensor<Memory>> {
        self.floats(cols, &floats(data))
    }

    fn ints(&self, cols: usize, data: &[i32]) -> Result<Tensor<Memory>> {
        let bytes = bytemuck::cast_slice(data);
        self.cpu
            .import(DType::I32, data.len() / cols.max(1), cols, bytes)
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor<Memory>> {
        self.cpu.alloc(dtype, rows, cols)
    }

    fn read<T: bytemuck::Pod>(&mut self, tensor: &Tensor<Memory>) -> Result<Vec<T>> {
        let mut data = vec![T::zeroed(); tensor.rows * tensor.cols];
        self.cpu.download(
            &mut self.stream,
            tensor,
            bytemuck::cast_slice_mut(&mut data),
        )?;
        self.cpu.synchronize(&mut self.stream)?;
        Ok(data)
    }
}
