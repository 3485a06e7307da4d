//! AVX-512 (F, BW, VL, DQ and VBMI) and GFNI: one register a vector.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is the trait's"
)]

use std::arch::x86_64::{
    __m512, __m512i, _CMP_LT_OQ, _mm_storeu_si128, _mm256_loadu_si256, _mm512_abs_ps,
    _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cmpge_epu32_mask, _mm512_cmplt_epu32_mask, _mm512_cvtepi32_epi8,
    _mm512_cvtepu16_epi32, _mm512_cvtps_epi32, _mm512_div_ps, _mm512_fmadd_ps,
    _mm512_gf2p8affine_epi64_epi8, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_blend_epi32,
    _mm512_mask_mov_ps, _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_min_epu32, _mm512_min_ps,
    _mm512_mul_ps, _mm512_or_si512, _mm512_permute_ps, _mm512_permutex2var_epi8, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set1_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_sub_epi32, _mm512_sub_ps,
    _mm512_ternarylogic_epi64, _mm512_unpackhi_epi8, _mm512_unpacklo_epi8,
};

use half::bf16;

use super::{Kernel, Simd};
use crate::fp8;

#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// Runs a kernel with these features on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni,avx2,fma")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) -> K::Out {
    kernel.run::<Avx512>()
}

/// High or low byte of the bfloat16 of every positive FP8 value: what VBMI's 128-entry look-up takes.
const fn bf16_bytes(high: bool) -> [u8; 128] {
    let mut table = [0; 128];
    let mut i = 0;
    while i < 128 {
        let bits = fp8::VALUES[i].to_bits() >> 16;
        table[i] = if high { (bits >> 8) as u8 } else { bits as u8 };
        i += 1;
    }
    table
}

pub(super) static HIGH: [u8; 128] = bf16_bytes(true);
pub(super) static LOW: [u8; 128] = bf16_bytes(false);

/// 64 FP8 values as bfloat16: the first 8 of every quarter of the register, then the others. Both bytes of the bfloat16 of
/// an `normal` value are linear in its bits; for others each byte is looked up.
#[inline(always)]
pub(super) unsafe fn fp8_to_bf16(bytes: __m512i, normal: bool) -> [__m512i; 2] {
    /// Bits 3 to 0 become bits 7 to 4: the exponent's last bit and the fraction.
    const LOW_BITS: i64 = 0x0102_0408;
    /// Sign and the exponent's other bits plus 60: its first bit, that bit's opposite four times, the other two.
    const HIGH_BITS: i64 = 0x1020_4040_4040_4080;
    const OPPOSITE: i32 = 0x3c;
    let (low, high) = if normal {
        (
            _mm512_gf2p8affine_epi64_epi8::<0>(bytes, _mm512_set1_epi64(LOW_BITS)),
            _mm512_gf2p8affine_epi64_epi8::<OPPOSITE>(bytes, _mm512_set1_epi64(HIGH_BITS)),
        )
    } else {
        let table = |t: &[u8; 128], i: usize| _mm512_loadu_si512(t.as_ptr().add(i).cast());
        let look_up = |t| _mm512_permutex2var_epi8(table(t, 0), bytes, table(t, 64));
        // The look-up ignores the sign: high | bytes & sign.
        let sign = _mm512_set1_epi8(-128);
        (
            look_up(&LOW),
            _mm512_ternarylogic_epi64::<0xf8>(look_up(&HIGH), bytes, sign),
        )
    };
    [
        _mm512_unpacklo_epi8(low, high),
        _mm512_unpackhi_epi8(low, high),
    ]
}

/// Lanes i and i + 8 of two vectors added: the first's in the first half.
#[inline(always)]
unsafe fn fold(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(
        _mm512_shuffle_f32x4::<0x44>(a, b),
        _mm512_shuffle_f32x4::<0xee>(a, b),
    )
}

/// The even and the odd words of a register of bfloat16, as float32.
#[inline(always)]
unsafe fn widen(words: __m512i) -> [__m512; 2] {
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)),
        _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65_536))),
    ]
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;
    // Interleaving bytes of two registers works within their 128-bit quarters: quarter q's first 8 bytes become the words
    // 8q.. of one register, its last 8 of another. Words are pairs of columns of one row: the first register has the
    // first 16 rows. AMX takes them as they are.
    const FP8_ORDER: [u8; 64] = {
        let mut order = [0; 64];
        let mut byte = 0;
        while byte < 64 {
            let (quarter, half, word) = (byte / 16, byte / 8 % 2, byte % 8);
            order[byte] = (word % 2 * 32 + 16 * half + 4 * quarter + word / 2) as u8;
            byte += 1;
        }
        order
    };

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> __m512 {
        _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        _mm512_storeu_ps(p, v);
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        _mm512_abs_ps(a)
    }
    #[inline(always)]
    unsafe fn zero_below(y: __m512, x: __m512, limit: __m512) -> __m512 {
        let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit);
        _mm512_mask_mov_ps(y, below, _mm512_setzero_ps())
    }
    #[inline(always)]
    unsafe fn pow2(n: __m512) -> __m512 {
        let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
    }
    #[inline(always)]
    unsafe fn sum4(v: [__m512; 4]) -> [f32; 4] {
        // Two vectors fold into the quarters of one, then four, then within the quarters.
        let (a, b) = (fold(v[0], v[1]), fold(v[2], v[3]));
        let s = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(a, b),
        );
        let s = _mm512_add_ps(s, _mm512_permute_ps::<0x4e>(s));
        let s = _mm512_add_ps(s, _mm512_permute_ps::<0xb1>(s));
        let mut sums = [0.0; 16];
        _mm512_storeu_ps(sums.as_mut_ptr(), s);
        [sums[0], sums[4], sums[8], sums[12]]
    }
    #[inline(always)]
    unsafe fn bf16_pair(p: *const bf16) -> [__m512; 2] {
        widen(_mm512_loadu_si512(p.cast()))
    }
    #[inline(always)]
    unsafe fn bf16(p: *const bf16) -> __m512 {
        let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
    }
    #[inline(always)]
    unsafe fn fp8_rows(p: *const u8, normal: bool) -> [[__m512; 2]; 2] {
        let [first, second] = fp8_to_bf16(_mm512_loadu_si512(p.cast()), normal);
        let ([a0, b0], [a1, b1]) = (widen(first), widen(second));
        [[a0, a1], [b0, b1]]
    }
    #[inline(always)]
    unsafe fn store_fp8(p: *mut u8, v: __m512) {
        let bits = _mm512_castps_si512(v);
        let sign = _mm512_and_si512(_mm512_srli_epi32::<24>(bits), _mm512_set1_epi32(0x80));
        let magnitude = _mm512_castps_si512(_mm512_abs_ps(v));
        let odd = _mm512_and_si512(_mm512_srli_epi32::<20>(magnitude), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(
            _mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7_ffff)),
            odd,
        );
        let normal = _mm512_sub_epi32(_mm512_srli_epi32::<20>(rounded), _mm512_set1_epi32(960));
        // Near 2^14 float32 counts in steps of 2^-9, as FP8 does below its smallest normal value.
        let step = _mm512_set1_ps(16_384.0);
        let steps = _mm512_castps_si512(_mm512_add_ps(_mm512_abs_ps(v), step));
        let subnormal = _mm512_sub_epi32(steps, _mm512_castps_si512(step));
        let small = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x3c80_0000));
        let infinite = _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7f80_0000));
        let finite = _mm512_mask_blend_epi32(
            small,
            _mm512_min_epu32(normal, _mm512_set1_epi32(0x7e)),
            subnormal,
        );
        let value = _mm512_mask_blend_epi32(infinite, finite, _mm512_set1_epi32(0x7f));
        let bytes = _mm512_cvtepi32_epi8(_mm512_or_si512(value, sign));
        _mm_storeu_si128(p.cast(), bytes);
    }
}
