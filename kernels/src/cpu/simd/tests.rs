//! All instruction sets against the portable one, bit for bit.

use super::*;
use crate::fp8;

/// Awkward and ordinary values.
fn values() -> Vec<f32> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        88.3,
        -87.3,
        -100.0,
        100.0,
        1.0 / 64.0,
        500.0,
        1e-3,
        447.9,
        1e-40,
    ];
    let ordinary = (0..1008).map(|i| ((i * 7919) % 2003) as f32 * 0.09 - 90.0);
    special.into_iter().chain(ordinary).collect()
}

struct Everything<'a> {
    values: &'a [f32],
    out: &'a mut Vec<u32>,
}

impl Kernel for Everything<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut lanes = [0.0; LANES];
        let mut keep = |v: S::V| {
            // SAFETY: 16 lanes of room.
            unsafe { S::store(lanes.as_mut_ptr(), v) };
            // A NaN's bits may differ, that it is one may not.
            self.out
                .extend(lanes.map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }));
        };
        for (i, chunk) in self.values.chunks_exact(LANES).enumerate() {
            let words: Vec<bf16> = chunk
                .iter()
                .cycle()
                .take(32)
                .map(|x| bf16::from_f32(*x))
                .collect();
            let mut bytes = [0u8; 64];
            for (to, natural) in bytes.iter_mut().zip(S::FP8_ORDER) {
                *to = (i * 64 + natural as usize) as u8;
            }
            let mut stored = [0u8; LANES];
            // SAFETY: 16 (32, 64) values of room behind every pointer.
            unsafe {
                let x = S::load(chunk.as_ptr());
                let y = S::load_first(chunk.as_ptr(), i % (LANES + 1));
                let c = S::splat(0.37);
                for v in [
                    S::fma(x, c, y),
                    S::add(x, y),
                    S::sub(x, c),
                    S::mul(x, x),
                    S::div(c, x),
                    S::max(x, y),
                    S::max(y, x),
                    S::min(x, y),
                    S::abs(x),
                    S::zero_below(c, x, y),
                    S::exp(x),
                    S::bf16(words.as_ptr()),
                ] {
                    keep(v);
                }
                for v in S::bf16_pair(words.as_ptr()) {
                    keep(v);
                }
                for v in S::fp8_rows(bytes.as_ptr(), false).as_flattened() {
                    keep(*v);
                }
                let normal = bytes.map(|b| if fp8::is_normal(b) { b } else { 8 });
                for v in S::fp8_rows(normal.as_ptr(), true).as_flattened() {
                    keep(*v);
                }
                let sums = S::sum4([x, y, c, S::mul(y, c)]);
                keep(S::load_first(sums.as_ptr(), 4));
                keep(S::splat(S::sum(y)));
                S::store_fp8(stored.as_mut_ptr(), x);
                keep(S::load(stored.map(f32::from).as_ptr()));
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let values = values();
    let runs: Vec<Vec<u32>> = Isa::available()
        .into_iter()
        .map(|isa| {
            let mut out = Vec::new();
            // SAFETY: the kernel stays within its slices.
            unsafe {
                isa.run(Everything {
                    values: &values,
                    out: &mut out,
                });
            }
            out
        })
        .collect();
    for run in &runs {
        let first = run.iter().zip(&runs[0]).position(|(a, b)| a != b);
        assert_eq!(first, None);
    }
}

struct Exp<'a>(&'a mut [f32]);

impl Kernel for Exp<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for chunk in self.0.chunks_exact_mut(LANES) {
            // SAFETY: 16 values.
            unsafe { S::store(chunk.as_mut_ptr(), S::exp(S::load(chunk.as_ptr()))) };
        }
    }
}

#[test]
fn exp_is_close_to_float64() {
    let x: Vec<f32> = (0..16_000).map(|i| -87.0 + i as f32 * 0.0109).collect();
    let mut y = x.clone();
    // SAFETY: the kernel stays within its slice.
    unsafe { Isa::best().run(Exp(&mut y)) };
    for (x, y) in x.iter().zip(&y) {
        let want = f64::from(*x).exp();
        assert!(
            (f64::from(*y) - want).abs() <= 2.5e-7 * want,
            "{x}: {y} {want}"
        );
    }
}

#[test]
fn fp8_is_stored_as_the_scalar_encoder_does() {
    let x: Vec<f32> = (0..32_768).map(|i| f32::from_bits(i << 17)).collect();
    for isa in Isa::available() {
        let mut bytes = vec![0; x.len()];
        // SAFETY: both slices have the same whole number of vectors.
        unsafe { isa.run(Encode(&x, &mut bytes)) };
        for (x, byte) in x.iter().zip(bytes) {
            assert_eq!(byte, fp8::encode(*x), "{isa:?} {x}");
        }
    }
}

struct Encode<'a>(&'a [f32], &'a mut [u8]);

impl Kernel for Encode<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, to) in self
            .0
            .chunks_exact(LANES)
            .zip(self.1.chunks_exact_mut(LANES))
        {
            // SAFETY: 16 values each.
            unsafe { S::store_fp8(to.as_mut_ptr(), S::load(x.as_ptr())) };
        }
    }
}
