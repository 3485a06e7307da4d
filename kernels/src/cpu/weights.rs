//! Weights as the CPU backend keeps them: checked host matrices in the type that a precision asks for.

use half::bf16;

use crate::backend::{Error, HostMatrix, Precision, Result};
use crate::fp8;
use crate::tensor::DType;

/// Values of a matrix, row-major.
#[derive(Debug, PartialEq)]
pub(super) enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    Fp8(Vec<u8>),
}

/// `[rows, cols]` weights with one scale per row block and 128 columns.
#[derive(Debug)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) values: Values,
    /// FP8: which row of `scales` a row uses (parts keep blocks of their own).
    pub(super) scale_row: Vec<u32>,
    /// FP8: `[row blocks, ceil(cols / 128)]`.
    pub(super) scales: Vec<f32>,
}

impl Matrix {
    /// The rows of all parts, in the form of `precision`.
    pub(super) fn new(
        op: &'static str,
        parts: &[HostMatrix<'_>],
        precision: Precision,
    ) -> Result<Self> {
        let shape = |detail: String| Error::Shape { op, detail };
        let first = parts.first().ok_or_else(|| shape("no parts".into()))?;
        for part in parts {
            if part.dtype != first.dtype || part.cols != first.cols {
                return Err(shape(format!(
                    "parts differ: {:?} with {} inputs, {:?} with {}",
                    first.dtype, first.cols, part.dtype, part.cols
                )));
            }
            check(op, part)?;
        }
        let quantised = matches!(precision, Precision::W8 | Precision::W8A8);
        let cols = first.cols;
        let mut matrix = Self {
            rows: parts.iter().map(|p| p.rows).sum(),
            cols,
            values: match (first.dtype, precision) {
                (DType::Fp8, _) if quantised => Values::Fp8(Vec::new()),
                (_, Precision::F32) => Values::F32(Vec::new()),
                _ => Values::Bf16(Vec::new()),
            },
            scale_row: Vec::new(),
            scales: Vec::new(),
        };
        for part in parts {
            matrix.push(part);
        }
        Ok(matrix)
    }

    fn push(&mut self, part: &HostMatrix<'_>) {
        let blocks = self.cols.div_ceil(fp8::BLOCK);
        match &mut self.values {
            Values::F32(to) => to.extend((0..part.rows * part.cols).map(|i| element(part, i))),
            Values::Bf16(to) => {
                to.extend((0..part.rows * part.cols).map(|i| bf16::from_f32(element(part, i))));
            }
            Values::Fp8(to) => {
                let first = self.scales.len() / blocks.max(1);
                self.scale_row
                    .extend((0..part.rows).map(|r| (first + r / fp8::BLOCK) as u32));
                self.scales.extend(part.scales.unwrap_or_default());
                to.extend_from_slice(part.data);
            }
        }
    }

    /// Weight `[row, col]` without its scale.
    pub(super) fn value(&self, row: usize, col: usize) -> f32 {
        let i = row * self.cols + col;
        match &self.values {
            Values::F32(values) => values[i],
            Values::Bf16(values) => values[i].to_f32(),
            Values::Fp8(values) => fp8::decode(values[i]),
        }
    }

    /// Scale of the weights of a row in one block of 128 columns.
    pub(super) fn scale(&self, row: usize, block: usize) -> f32 {
        match self.values {
            Values::Fp8(_) => {
                self.scales[self.scale_row[row] as usize * self.cols.div_ceil(fp8::BLOCK) + block]
            }
            _ => 1.0,
        }
    }
}

fn check(op: &'static str, part: &HostMatrix<'_>) -> Result<()> {
    let shape = |detail: String| Err(Error::Shape { op, detail });
    let bytes = part.rows * part.cols * part.dtype.bytes();
    if part.data.len() != bytes {
        return shape(format!(
            "[{}, {}] of {:?} takes {bytes} bytes, not {}",
            part.rows,
            part.cols,
            part.dtype,
            part.data.len()
        ));
    }
    let scales = part.rows.div_ceil(fp8::BLOCK) * part.cols.div_ceil(fp8::BLOCK);
    match (part.dtype, part.scales) {
        (DType::I32, _) => shape("weights cannot be integers".into()),
        (DType::Fp8, None) => shape("FP8 weights need scales".into()),
        (DType::Fp8, Some(given)) if given.len() != scales => shape(format!(
            "[{}, {}] has {scales} scales, not {}",
            part.rows,
            part.cols,
            given.len()
        )),
        _ => Ok(()),
    }
}

/// Element `i` of a checked host matrix, dequantised.
fn element(part: &HostMatrix<'_>, i: usize) -> f32 {
    let at = i * part.dtype.bytes();
    match part.dtype {
        DType::Bf16 => bf16::from_le_bytes([part.data[at], part.data[at + 1]]).to_f32(),
        DType::Fp8 => {
            let (row, col) = (i / part.cols, i % part.cols);
            let block = row / fp8::BLOCK * part.cols.div_ceil(fp8::BLOCK) + col / fp8::BLOCK;
            fp8::decode(part.data[at]) * part.scales.map_or(1.0, |s| s[block])
        }
        DType::F32 | DType::I32 => {
            let data = &part.data[at..at + 4];
            f32::from_le_bytes([data[0], data[1], data[2], data[3]])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fp8_part(rows: usize, cols: usize, data: &[u8], scales: &[f32]) -> Matrix {
        let part = HostMatrix {
            dtype: DType::Fp8,
            rows,
            cols,
            data,
            scales: Some(scales),
        };
        Matrix::new("linear", &[part.clone(), part], Precision::W8A8).unwrap()
    }

    #[test]
    fn parts_keep_scale_blocks_of_their_own() {
        let (rows, cols) = (130, 129);
        let data = vec![fp8::encode(1.0); rows * cols];
        let matrix = fp8_part(rows, cols, &data, &[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(matrix.rows, 260);
        assert_eq!(matrix.scale(127, 0), 1.0);
        assert_eq!(matrix.scale(129, 1), 4.0);
        assert_eq!(matrix.scale(130, 1), 2.0);
        assert_eq!(matrix.scale(259, 0), 3.0);
    }

    #[test]
    fn fp8_is_dequantised_where_the_precision_asks_for_it() {
        let part = HostMatrix {
            dtype: DType::Fp8,
            rows: 1,
            cols: 130,
            data: &[fp8::encode(1.75); 130],
            scales: Some(&[0.3, 2.0]),
        };
        let f32s = Matrix::new("linear", std::slice::from_ref(&part), Precision::F32).unwrap();
        assert_eq!(f32s.value(0, 0), 1.75 * 0.3);
        assert_eq!(f32s.value(0, 128), 3.5);
        let bf16s = Matrix::new("linear", &[part], Precision::Bf16).unwrap();
        assert_eq!(bf16s.value(0, 0), bf16::from_f32(1.75 * 0.3).to_f32());
        assert_eq!(bf16s.scale(0, 1), 1.0);
    }

    #[test]
    fn flawed_matrices_are_refused() {
        let good = HostMatrix {
            dtype: DType::Fp8,
            rows: 2,
            cols: 3,
            data: &[0; 6],
            scales: Some(&[1.0]),
        };
        let bad = [
            HostMatrix {
                scales: None,
                ..good.clone()
            },
            HostMatrix {
                scales: Some(&[1.0, 1.0]),
                ..good.clone()
            },
            HostMatrix {
                data: &[0; 5],
                ..good.clone()
            },
            HostMatrix {
                dtype: DType::I32,
                ..good.clone()
            },
        ];
        for matrix in bad {
            assert!(Matrix::new("linear", &[matrix], Precision::W8).is_err());
        }
        let narrow = HostMatrix {
            cols: 2,
            data: &[0; 4],
            ..good.clone()
        };
        assert!(Matrix::new("linear", &[good, narrow], Precision::W8).is_err());
        assert!(Matrix::new("linear", &[], Precision::W8).is_err());
    }
}
