//! Products with weight matrices (report section 3.3).

use half::bf16;

use crate::cpu::views::Acts;
use crate::cpu::weights::Matrix;
use crate::fp8;

/// `out[i] = x[row(i), first..] W^T` for `i < rows`; row `i` of the output starts at `i * stride`.
///
/// Block by block of 128 inputs: the block's products are summed and then scaled by what the weights' and the
/// activations' blocks are scaled by, as the FP8 product of the report is.
pub(in crate::cpu) fn matmul(
    x: Acts<'_>,
    first: usize,
    row: &dyn Fn(usize) -> usize,
    weight: &Matrix,
    rows: usize,
    out: &mut [f32],
    stride: usize,
) {
    let blocks = weight.cols.div_ceil(fp8::BLOCK);
    for i in 0..rows {
        let t = row(i);
        for n in 0..weight.rows {
            let mut sum = 0.0;
            for block in 0..blocks {
                let mut products = 0.0;
                for k in block * fp8::BLOCK..weight.cols.min((block + 1) * fp8::BLOCK) {
                    let x = match x {
                        Acts::Plain(rows) => rows.row(t)[first + k],
                        Acts::Quantised { data, cols, .. } => {
                            fp8::decode(data[t * cols + first + k])
                        }
                    };
                    products += x * weight.value(n, k);
                }
                let scale = match x {
                    Acts::Plain(_) => 1.0,
                    Acts::Quantised { scales, .. } => scales[t * blocks + block],
                };
                sum += products * (scale * weight.scale(n, block));
            }
            out[i * stride + n] = sum;
        }
    }
}

/// Puts `x` into `out`, rounded to the nearest BF16 values (ties to even).
pub(in crate::cpu) fn round(x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = bf16::from_f32(*x).to_f32();
    }
}
