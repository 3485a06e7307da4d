//! Repeatable inputs: values, matrices as a checkpoint holds them, tensors.

use kernels::backend::{HostMatrix, Quantised, ScaleFormat};
use kernels::cpu::{Cpu, Memory};
use kernels::{Backend, DType, Tensor, fp8};

/// Repeatable values in -1..1.
pub(crate) fn values(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A matrix as a checkpoint holds it.
pub(crate) struct Host {
    dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Vec<u8>,
    scales: Vec<f32>,
}

impl Host {
    pub(crate) fn new(dtype: DType, rows: usize, cols: usize) -> Self {
        let values = values(rows * cols);
        Self {
            dtype,
            rows,
            cols,
            data: match dtype {
                DType::Fp8 => values.iter().map(|v| fp8::encode(*v * 400.0)).collect(),
                DType::Bf16 => values
                    .iter()
                    .flat_map(|v| v.to_le_bytes()[2..].to_vec())
                    .collect(),
                DType::F32 | DType::I32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            },
            scales: vec![0.0025; rows.div_ceil(fp8::BLOCK) * cols.div_ceil(fp8::BLOCK)],
        }
    }

    pub(crate) fn matrix(&self) -> HostMatrix<'_> {
        HostMatrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            data: &self.data,
            scales: (self.dtype == DType::Fp8).then_some(&self.scales),
        }
    }
}

/// Float32 rows.
pub(crate) fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> Tensor<Memory> {
    cpu.import(
        DType::F32,
        values.len() / cols,
        cols,
        bytemuck::cast_slice(values),
    )
    .expect("memory")
}

/// Rows of integers.
pub(crate) fn ints(cpu: &Cpu, cols: usize, values: &[i32]) -> Tensor<Memory> {
    cpu.import(
        DType::I32,
        values.len() / cols,
        cols,
        bytemuck::cast_slice(values),
    )
    .expect("memory")
}

/// Values quantised 1x128.
pub(crate) fn quantised(cpu: &Cpu, cols: usize, values: &[f32]) -> Quantised<Memory> {
    let rows = values.len() / cols;
    let mut q = Quantised {
        data: cpu.alloc(DType::Fp8, rows, cols).expect("memory"),
        scales: cpu
            .alloc(DType::F32, rows, cols.div_ceil(fp8::BLOCK))
            .expect("memory"),
    };
    let mut stream = cpu.stream().expect("threads");
    let x = tensor(cpu, cols, values);
    cpu.quantise(&mut stream, &x, rows, ScaleFormat::F32, &mut q)
        .expect("quantise");
    q
}
