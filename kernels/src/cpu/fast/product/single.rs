//! One row's product, as fast as weights come from memory: several panels side by side, each read in order, so that the
//! processor sees as many streams and asks for what follows by itself; and nothing but registers in between.

use super::{CHUNK, Load, PANEL, Product, Row};
use crate::cpu::simd::{AHEAD, LANES, Simd, prefetch};
use crate::fp8;

/// Panels side by side where there are 32 registers: four sums each.
pub(super) const ABREAST: usize = 4;

impl Product<'_> {
    /// All panels' products with `row`.
    ///
    /// # Safety
    /// As for [`super::products`].
    #[inline(always)]
    pub(super) unsafe fn single<S: Simd, W: Load>(&self, row: &Row<f32>) {
        let mut panel = self.panels.start;
        // SAFETY: the caller's; the panels are the product's.
        unsafe {
            while panel < self.panels.end {
                panel += match self.panels.end - panel {
                    ABREAST.. if S::WIDE => self.abreast::<S, W, ABREAST>(row, panel),
                    2.. if S::WIDE => self.abreast::<S, W, 2>(row, panel),
                    _ => self.abreast::<S, W, 1>(row, panel),
                };
            }
        }
    }

    /// Products of `row` with `P` panels from `panel` on; gives `P`.
    #[inline(always)]
    unsafe fn abreast<S: Simd, W: Load, const P: usize>(
        &self,
        row: &Row<f32>,
        panel: usize,
    ) -> usize {
        let weight = self.weight;
        let mut packed = [std::ptr::null::<W>(); P];
        for p in 0..P {
            packed[p] = weight.panel(panel + p).as_ptr().cast();
        }
        // SAFETY: a panel holds `padded` columns of 32, the row `padded` inputs, a scale per block and all outputs.
        unsafe {
            let mut totals = [[S::splat(0.0); 2]; P];
            let padded = weight.padded();
            for block in 0..padded.div_ceil(fp8::BLOCK) {
                let first = block * fp8::BLOCK;
                let mut sums = [[S::splat(0.0); 2]; P];
                let mut normal = [0; P];
                for p in 0..P {
                    normal[p] = weight.normal(panel + p, block);
                }
                for chunk in (first..padded.min(first + fp8::BLOCK)).step_by(CHUNK) {
                    let mut partial = [[[S::splat(0.0); 2]; 2]; P];
                    for col in (chunk..chunk + CHUNK).step_by(2) {
                        let x = [S::splat(*row.x.add(col)), S::splat(*row.x.add(col + 1))];
                        for p in 0..P {
                            let weights = packed[p].add(col * PANEL);
                            prefetch(weights.cast(), 2 * PANEL * size_of::<W>(), AHEAD);
                            let two = W::two::<S>(weights, normal[p] & 1 == 1);
                            normal[p] >>= 1;
                            for odd in 0..2 {
                                for half in 0..2 {
                                    let sum = &mut partial[p][odd][half];
                                    *sum = S::fma(x[odd], two[odd][half], *sum);
                                }
                            }
                        }
                    }
                    for p in 0..P {
                        for half in 0..2 {
                            let both = S::add(partial[p][0][half], partial[p][1][half]);
                            sums[p][half] = S::add(sums[p][half], both);
                        }
                    }
                }
                let own = row.scale(block);
                for p in 0..P {
                    let scale = S::splat(own * weight.scale(panel + p, block));
                    for half in 0..2 {
                        totals[p][half] = S::fma(sums[p][half], scale, totals[p][half]);
                    }
                }
            }
            for p in 0..P {
                let outputs = weight.outputs(panel + p);
                for (half, first) in outputs.clone().step_by(LANES).enumerate() {
                    let n = LANES.min(outputs.end - first);
                    S::store_first(row.out.add(first), n, totals[p][half]);
                }
            }
        }
        P
    }
}
