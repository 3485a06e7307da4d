//! AMX: products of BF16 tiles.
//!
//! A step of the tile product adds, for one output, the products of 32 inputs: those of the even and those of the odd
//! inputs are summed apart, in order and rounded at each, then together, then onto the output. That is the order of sums
//! of all products here (`fast::product`), so tiles give their bits, as long as no subnormal number is met, which tiles
//! take for zero.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __cpuid_count, _mm512_cvtepi32_epi16, _mm512_inserti64x4, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi8, _mm512_maskz_loadu_epi32, _mm512_permutexvar_epi8, _mm512_srli_epi32,
    _mm512_storeu_si512, _mm512_zextsi256_si512,
};
use std::sync::OnceLock;

use super::avx512::fp8_to_bf16;
use super::{AHEAD, prefetch};

/// Rows of a full tile.
pub(in crate::cpu) const ROWS: usize = 16;

/// Inputs of a tile: 32 BF16 values, one row of 64 bytes.
pub(in crate::cpu) const INPUTS: usize = 32;

/// Bytes of a tile's row.
pub(in crate::cpu) const ROW: usize = 64;

/// Whether the processor has tiles of BF16 and GFNI, and the system lets this process use them (which this asks for).
pub(super) fn available() -> bool {
    /// arch_prctl: asks for the use of a feature whose state is large.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    /// The tiles' data.
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if !is_x86_feature_detected!("gfni") || __cpuid(0).eax < 7 {
            return false;
        }
        let features = __cpuid_count(7, 0).edx;
        let (bf16, tile) = (features >> 22 & 1 == 1, features >> 24 & 1 == 1);
        // SAFETY: the call changes nothing but this permission; systems that do not know it fail.
        bf16 && tile
            && unsafe {
                libc::syscall(
                    libc::SYS_arch_prctl,
                    ARCH_REQ_XCOMP_PERM,
                    XFEATURE_XTILEDATA,
                ) == 0
            }
    })
}

/// The thread's tiles, set up for as long as this lives.
pub(in crate::cpu) struct Tiles {
    rows: usize,
}

#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// Input and output tiles of `rows` rows.
    ///
    /// # Safety
    /// AMX must be [`available`], and the thread have no other `Tiles`.
    pub(in crate::cpu) unsafe fn new(rows: usize) -> Self {
        assert!((1..=ROWS).contains(&rows));
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..8 {
            configuration.row_bytes[tile] = ROW as u16;
            // 0 to 3 outputs, 4 and 5 inputs, 6 and 7 weights.
            configuration.rows[tile] = if tile < 6 { rows as u8 } else { ROWS as u8 };
        }
        // SAFETY: 64 bytes of a valid configuration; AMX is there by contract.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack)) };
        Self { rows }
    }

    /// Products of two input tiles, one after the other in memory, with two weight tiles whose rows alternate, summed over
    /// `count >= 1` such pairs; the four output tiles (first inputs with both weights, then the second) go to `out`.
    ///
    /// # Safety
    /// `a` holds `count` times two tiles of `rows` rows, `b` `count` times two of 16, `out` four of `rows` rows.
    #[inline]
    pub(in crate::cpu) unsafe fn two(
        &self,
        a: *const u8,
        b: *const u8,
        count: usize,
        out: *mut f32,
    ) {
        let size = self.rows * ROW;
        // SAFETY: the caller's; tiles are configured while `self` lives, and the compiler uses none.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b} + 2 * {row}]",
                "tileloadd tmm4, [{a} + {row}]",
                "add {a}, {size}",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + 2 * {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {row}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {size}",
                "add {b}, 2048",
                "dec {count}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "add {out}, {size}",
                "tilestored [{out} + {row}], tmm1",
                "add {out}, {size}",
                "tilestored [{out} + {row}], tmm2",
                "add {out}, {size}",
                "tilestored [{out} + {row}], tmm3",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                count = inout(reg) count => _,
                out = inout(reg) out => _,
                row = in(reg) ROW,
                size = in(reg) size,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// [`Self::two`] with one input tile: two output tiles.
    ///
    /// # Safety
    /// `a` holds `count` tiles of `rows` rows, `b` `count` times two of 16, `out` two of `rows` rows.
    #[inline]
    pub(in crate::cpu) unsafe fn one(
        &self,
        a: *const u8,
        b: *const u8,
        count: usize,
        out: *mut f32,
    ) {
        // SAFETY: as for `two`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {row}]",
                "tileloadd tmm6, [{b} + 2 * {row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + 2 * {row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, {size}",
                "add {b}, 2048",
                "dec {count}",
                "jnz 2b",
                "tilestored [{out} + {row}], tmm0",
                "add {out}, {size}",
                "tilestored [{out} + {row}], tmm1",
                a = inout(reg) a => _,
                b = inout(reg) b => _,
                count = inout(reg) count => _,
                out = inout(reg) out => _,
                row = in(reg) ROW,
                size = in(reg) self.rows * ROW,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: AMX is there (`new`). Without this, switches between threads would keep saving the tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Weights of a pair of columns in `FP8_ORDER`, 64 bytes, as BF16: a row of the first 16 outputs' tile and one of the
/// others'. `normal` as in [`super::Simd::fp8_rows`].
///
/// # Safety
/// `packed` is 64 bytes, `to` twice as many; the processor has AVX-512 (BW, VBMI) and GFNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
pub(in crate::cpu) unsafe fn unpack(packed: *const u8, normal: bool, to: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        prefetch(packed, 64, AHEAD);
        let [first, second] = fp8_to_bf16(_mm512_loadu_si512(packed.cast()), normal);
        _mm512_storeu_si512(to.cast(), first);
        _mm512_storeu_si512(to.add(ROW).cast(), second);
    }
}

/// What a row of inputs is made of.
pub(in crate::cpu) trait Source: Copy {
    /// Writes the first `n` (at most 64) values from `p` on as BF16, zeros behind them: 32 to `first` and, where there
    /// are more, 32 to `second`.
    ///
    /// # Safety
    /// The pointers are good for that; the processor has AVX-512 (BW, VBMI).
    unsafe fn sixty_four(p: *const Self, n: usize, first: *mut u8, second: *mut u8);
}

/// FP8 values.
impl Source for u8 {
    #[inline]
    unsafe fn sixty_four(p: *const Self, n: usize, first: *mut u8, second: *mut u8) {
        // SAFETY: the caller's.
        unsafe { fp8_inputs(p, n, first, second) };
    }
}

/// Float32 values that are BF16 values.
impl Source for f32 {
    #[inline]
    unsafe fn sixty_four(p: *const Self, n: usize, first: *mut u8, second: *mut u8) {
        // SAFETY: the caller's.
        unsafe {
            f32_inputs(p, n.min(INPUTS), first);
            if n > INPUTS {
                f32_inputs(p.add(INPUTS), n - INPUTS, second);
            }
        }
    }
}

/// Bytes in the order that interleaving within quarters brings back to theirs.
const SPREAD: [u8; 64] = {
    let mut order = [0; 64];
    let mut byte = 0;
    while byte < 64 {
        let (quarter, half) = (byte / 16, byte / 8 % 2);
        order[byte] = (32 * half + 8 * quarter + byte % 8) as u8;
        byte += 1;
    }
    order
};

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
#[inline]
unsafe fn fp8_inputs(p: *const u8, n: usize, first: *mut u8, second: *mut u8) {
    // SAFETY: the caller's; the mask has the values' bits.
    unsafe {
        let bytes = _mm512_maskz_loadu_epi8(u64::MAX >> (64 - n), p.cast());
        let spread = _mm512_loadu_si512(SPREAD.as_ptr().cast());
        let [low, high] = fp8_to_bf16(_mm512_permutexvar_epi8(spread, bytes), false);
        _mm512_storeu_si512(first.cast(), low);
        if n > INPUTS {
            _mm512_storeu_si512(second.cast(), high);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn f32_inputs(p: *const f32, n: usize, to: *mut u8) {
    // SAFETY: the caller's; the masks have the values' bits.
    unsafe {
        let half = |from: usize| {
            let n = n.saturating_sub(from).min(16);
            let values =
                _mm512_maskz_loadu_epi32(((1u32 << n) - 1) as u16, p.wrapping_add(from).cast());
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(values))
        };
        let both = _mm512_inserti64x4::<1>(_mm512_zextsi256_si512(half(0)), half(16));
        _mm512_storeu_si512(to.cast(), both);
    }
}
