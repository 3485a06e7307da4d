//! Weights taken from a checkpoint: their bytes where they lie in the file, their values checked.

use std::borrow::Cow;

use half::bf16;
use kernels::{DType, backend::HostMatrix};

use super::{Checkpoint, ElementType, Entry, Error};

/// A weight of a checkpoint, borrowed from the mapped file as long as nothing converts it. A vector has one row.
#[derive(Clone, Debug)]
pub struct Matrix<'a> {
    /// Element type of `data`.
    pub dtype: DType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Little-endian elements.
    pub data: Cow<'a, [u8]>,
    /// For FP8: one multiplicative scale per 128 x 128 block.
    pub scales: Option<Vec<f32>>,
}

impl Matrix<'_> {
    /// As a backend takes it.
    pub fn host(&self) -> HostMatrix<'_> {
        HostMatrix {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            data: &self.data,
            scales: self.scales.as_deref(),
        }
    }

    /// All values in float32, FP8 blocks multiplied with their scales.
    pub fn to_f32(&self) -> Vec<f32> {
        match (self.dtype, &self.scales) {
            (DType::Fp8, Some(scales)) => {
                let table = fp8_values();
                let across = self.cols.div_ceil(128);
                let value = |(i, &byte): (usize, &u8)| {
                    let (row, col) = (i / self.cols, i % self.cols);
                    table[byte as usize] * scales[row / 128 * across + col / 128]
                };
                self.data.iter().enumerate().map(value).collect()
            }
            (DType::Bf16, _) => bf16s(&self.data).map(bf16::to_f32).collect(),
            _ => f32s(&self.data).collect(),
        }
    }

    /// The same values as float32.
    pub fn widened(&self) -> Matrix<'static> {
        let data = bytemuck::cast_slice(&self.to_f32()).to_vec();
        Matrix {
            dtype: DType::F32,
            rows: self.rows,
            cols: self.cols,
            data: data.into(),
            scales: None,
        }
    }
}

/// The value of every E4M3FN byte: sign, 4 bits of exponent with bias 7, 3 bits of mantissa.
pub(crate) fn fp8_values() -> [f32; 256] {
    std::array::from_fn(|byte| {
        let (exponent, mantissa) = ((byte >> 3 & 15) as i32, (byte & 7) as f32);
        let magnitude = match (exponent, byte & 0x7f) {
            (_, 0x7f) => f32::NAN,
            (0, _) => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if byte & 0x80 == 0 {
            magnitude
        } else {
            -magnitude
        }
    })
}

fn bf16s(data: &[u8]) -> impl Iterator<Item = bf16> {
    data.as_chunks::<2>()
        .0
        .iter()
        .map(|bytes| bf16::from_le_bytes(*bytes))
}

fn f32s(data: &[u8]) -> impl Iterator<Item = f32> {
    data.as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
}

impl Checkpoint {
    /// A tensor that the configuration asks for (its shape was checked when the checkpoint was opened), values checked.
    ///
    /// # Errors
    /// If there is no such tensor, if a value is not a finite number, or if a scale is not a positive one.
    pub fn matrix(&self, name: &str) -> Result<Matrix<'_>, Error> {
        let entry = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let data = self.data(entry);
        let (dtype, finite) = match entry.dtype {
            ElementType::F32 => (DType::F32, f32s(data).all(f32::is_finite)),
            ElementType::Bf16 => (DType::Bf16, bf16s(data).all(bf16::is_finite)),
            ElementType::F8E4M3 => (DType::Fp8, data.iter().all(|byte| byte & 0x7f != 0x7f)),
            ElementType::Other(_) => {
                return Err(self.flaw(entry, name, "element type is not supported".into()));
            }
        };
        if !finite {
            return Err(self.flaw(
                entry,
                name,
                "holds a value that is not a finite number".into(),
            ));
        }
        let (rows, cols) = match entry.shape[..] {
            [cols] => (1, cols),
            [rows, cols] => (rows, cols),
            _ => return Err(self.flaw(entry, name, "is neither vector nor matrix".into())),
        };
        let scales = match dtype {
            DType::Fp8 => Some(self.scales(&format!("{name}_scale_inv"))?),
            _ => None,
        };
        Ok(Matrix {
            dtype,
            rows,
            cols,
            data: Cow::Borrowed(data),
            scales,
        })
    }

    fn scales(&self, name: &str) -> Result<Vec<f32>, Error> {
        let entry: &Entry = self.tensors.get(name).ok_or_else(|| self.missing(name))?;
        let scales: Vec<f32> = f32s(self.data(entry)).collect();
        match scales
            .iter()
            .position(|scale| !(scale.is_finite() && *scale > 0.0))
        {
            None => Ok(scales),
            Some(at) => {
                let detail = format!("scale {at} is {}, not a positive number", scales[at]);
                Err(self.flaw(entry, name, detail))
            }
        }
    }
}
