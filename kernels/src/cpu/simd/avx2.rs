//! AVX2 and FMA: two registers a vector.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is the trait's"
)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_LT_OQ, _mm_add_ps, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_movehl_ps, _mm_shuffle_ps, _mm256_add_epi32, _mm256_add_ps, _mm256_and_ps,
    _mm256_and_si256, _mm256_andnot_ps, _mm256_blendv_epi8, _mm256_castps_si256,
    _mm256_castps256_ps128, _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cmpeq_epi32,
    _mm256_cmpgt_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32,
    _mm256_cvtps_epi32, _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps,
};

use half::bf16;

use super::{Kernel, LANES, Simd};
use crate::fp8;

#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// Runs a kernel with these features on.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx2>()
}

type V = [__m256; 2];

#[inline(always)]
unsafe fn low_word(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
}

#[inline(always)]
unsafe fn high_word(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65_536)))
}

/// `2^n` of eight values.
#[inline(always)]
unsafe fn pow2x8(n: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

/// Sum of the sixteen lanes.
#[inline(always)]
unsafe fn lane_sum(v: V) -> f32 {
    let s = _mm256_add_ps(v[0], v[1]);
    let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
    let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    _mm_cvtss_f32(_mm_add_ps(s, _mm_shuffle_ps::<1>(s, s)))
}

/// Eight FP8 values.
#[inline(always)]
unsafe fn fp8x8(p: *const u8) -> __m256 {
    let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
    let code = _mm256_and_si256(bytes, _mm256_set1_epi32(0x7f));
    let normal = _mm256_add_epi32(_mm256_slli_epi32::<20>(code), _mm256_set1_epi32(120 << 23));
    // Below the smallest normal value the code counts steps of 2^-9.
    let steps = _mm256_mul_ps(_mm256_cvtepi32_ps(code), _mm256_set1_ps(1.0 / 512.0));
    let small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), code);
    let value = _mm256_blendv_epi8(normal, _mm256_castps_si256(steps), small);
    let nan = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(0x7f));
    let value = _mm256_blendv_epi8(value, _mm256_set1_epi32(0x7fc0_0000), nan);
    let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(bytes, _mm256_set1_epi32(0x80)));
    _mm256_castsi256_ps(_mm256_or_si256(value, sign))
}

impl Simd for Avx2 {
    type V = V;
    const WIDE: bool = false;
    const FP8_ORDER: [u8; 64] = super::portable::Portable::FP8_ORDER;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [_mm256_set1_ps(x); 2]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))]
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> V {
        if n == LANES {
            return Self::load(p);
        }
        let mut v = [0.0; LANES];
        p.copy_to_nonoverlapping(v.as_mut_ptr(), n);
        Self::load(v.as_ptr())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        _mm256_storeu_ps(p, v[0]);
        _mm256_storeu_ps(p.add(8), v[1]);
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        [
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1]),
        ]
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])]
    }
    #[inline(always)]
    unsafe fn abs(a: V) -> V {
        let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
        [_mm256_and_ps(a[0], mask), _mm256_and_ps(a[1], mask)]
    }
    #[inline(always)]
    unsafe fn zero_below(y: V, x: V, limit: V) -> V {
        [
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x[0], limit[0]), y[0]),
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x[1], limit[1]), y[1]),
        ]
    }
    #[inline(always)]
    unsafe fn pow2(n: V) -> V {
        [pow2x8(n[0]), pow2x8(n[1])]
    }
    #[inline(always)]
    unsafe fn sum4(v: [V; 4]) -> [f32; 4] {
        [
            lane_sum(v[0]),
            lane_sum(v[1]),
            lane_sum(v[2]),
            lane_sum(v[3]),
        ]
    }
    #[inline(always)]
    unsafe fn bf16_pair(p: *const bf16) -> [V; 2] {
        let (a, b) = (
            _mm256_loadu_si256(p.cast()),
            _mm256_loadu_si256(p.add(16).cast()),
        );
        [[low_word(a), low_word(b)], [high_word(a), high_word(b)]]
    }
    #[inline(always)]
    unsafe fn bf16(p: *const bf16) -> V {
        [
            low_word(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))),
            low_word(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()))),
        ]
    }
    #[inline(always)]
    unsafe fn fp8_rows(p: *const u8, _: bool) -> [[V; 2]; 2] {
        [
            [
                [fp8x8(p), fp8x8(p.add(8))],
                [fp8x8(p.add(16)), fp8x8(p.add(24))],
            ],
            [
                [fp8x8(p.add(32)), fp8x8(p.add(40))],
                [fp8x8(p.add(48)), fp8x8(p.add(56))],
            ],
        ]
    }
    #[inline(always)]
    unsafe fn store_fp8(p: *mut u8, v: V) {
        let mut values = [0.0; LANES];
        Self::store(values.as_mut_ptr(), v);
        p.cast::<[u8; LANES]>().write(values.map(fp8::encode));
    }
}
