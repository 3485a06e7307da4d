//! Float32 values rounded to BF16.

use crate::cpu::pool::{Pool, Split};
use crate::cpu::simd::{Isa, Kernel, Simd};

/// Values of a task.
const STEP: usize = 1 << 13;

/// Puts `x` into `out`, rounded to the nearest BF16 values (ties to even).
pub(in crate::cpu) fn round(pool: &mut Pool, isa: Isa, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let out = Split::new(out);
    pool.run(x.len().div_ceil(STEP), x.len() < 2 * STEP, &|i| {
        let x = &x[i * STEP..x.len().min((i + 1) * STEP)];
        // SAFETY: tasks have parts of their own; `run` is for the processor's features.
        unsafe {
            let out = out.part(i * STEP, x.len());
            isa.run(Round { x, out });
        }
    });
}

struct Round<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Round<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (out, x) in self.out.iter_mut().zip(self.x) {
            *out = f32::from_bits(nearest(x.to_bits()));
        }
    }
}

/// Without branches, so that the compiler makes vectors of the processor's size of it.
#[inline(always)]
fn nearest(bits: u32) -> u32 {
    let nan = (bits | 0x0040_0000) & 0xffff_0000;
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        nan
    } else {
        rounded
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn values_become_what_bf16_makes_of_them() {
        let edges = [
            0.0,
            -0.0,
            1.0,
            f32::MAX,
            f32::MIN_POSITIVE,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
        ];
        // Every upper half with lower halves on both sides of a tie.
        let around = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| u32::from(high) << 16 | low)
        });
        let x: Vec<f32> = edges
            .into_iter()
            .chain(around.map(f32::from_bits))
            .collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; x.len()];
            round(&mut Pool::new(2).unwrap(), isa, &x, &mut out);
            for (x, out) in x.iter().zip(&out) {
                let want = bf16::from_f32(*x).to_f32();
                assert_eq!(out.to_bits(), want.to_bits(), "{isa:?} {x}");
            }
        }
    }
}
