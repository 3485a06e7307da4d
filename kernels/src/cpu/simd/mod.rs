//! Sixteen float32 lanes on whatever the processor has. Every implementation gives the same bits for the same input
//! (fused multiply-adds everywhere, one order of sums), so that results do not depend on the machine.

#![expect(
    clippy::inline_always,
    reason = "only what is inlined into `run` is compiled for its instruction set"
)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use half::bf16;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// How far ahead weights are asked for. Measured: farther or nearer is slower.
pub(super) const AHEAD: usize = 1024;

/// Asks for the `bytes` bytes that lie `ahead` behind `p`, so that they arrive from memory while a core computes with
/// others; any address will do.
#[inline(always)]
pub(super) fn prefetch(p: *const u8, bytes: usize, ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing and has no faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(ahead + line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, bytes, ahead);
}

/// The operations that kernels are made of.
///
/// # Safety
/// Every method needs the processor features of its implementation ([`Isa::run`] sees to it), and pointers that are
/// good for the lanes named.
pub(super) trait Simd: Copy + 'static {
    /// Sixteen float32 values.
    type V: Copy;
    /// Whether there are 32 registers of a whole vector each (else 16 of half a vector).
    const WIDE: bool;
    /// Where natural element i of a pair of FP8 rows of 32 is kept: packed byte j holds element `FP8_ORDER[j]`.
    const FP8_ORDER: [u8; 64];

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    /// The first `n` (at most 16) values, zeros in the other lanes.
    unsafe fn load_first(p: *const f32, n: usize) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: `b` where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: `b` where one is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn abs(a: Self::V) -> Self::V;
    /// `y`, but 0 in lanes where `x < limit`.
    unsafe fn zero_below(y: Self::V, x: Self::V, limit: Self::V) -> Self::V;
    /// `2^n` for whole `n` in -126..=127.
    unsafe fn pow2(n: Self::V) -> Self::V;
    /// Sums of the lanes of four vectors: lanes i and i + 8, then i + 4, i + 2, i + 1.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4];
    /// 32 values whose lanes alternate in memory: word 2j is lane j of the first vector, word 2j + 1 of the second.
    unsafe fn bf16_pair(p: *const bf16) -> [Self::V; 2];
    /// 16 values in order.
    unsafe fn bf16(p: *const bf16) -> Self::V;
    /// 64 values packed in `FP8_ORDER`: two rows of 32. `normal`: all of them are ([`crate::fp8::is_normal`]).
    unsafe fn fp8_rows(p: *const u8, normal: bool) -> [[Self::V; 2]; 2];
    /// Stores 16 values as FP8, as [`crate::fp8::encode`] does.
    unsafe fn store_fp8(p: *mut u8, v: Self::V);

    /// Stores the first `n` (at most 16) lanes.
    #[inline(always)]
    unsafe fn store_first(p: *mut f32, n: usize, v: Self::V) {
        // SAFETY: the caller's, for all of these.
        unsafe {
            if n == LANES {
                return Self::store(p, v);
            }
            let mut lanes = [0.0; LANES];
            Self::store(lanes.as_mut_ptr(), v);
            p.copy_from_nonoverlapping(lanes.as_ptr(), n);
        }
    }

    /// Sum of the lanes, in `sum4`'s order.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: the caller's, for all of these.
        unsafe { Self::sum4([v, v, v, v])[0] }
    }

    /// `exp(x)` to about 2 units in the last place; 0 below -87.3, saturates above 88.3, NaN stays.
    #[inline(always)]
    unsafe fn exp(x: Self::V) -> Self::V {
        // Cephes' expf: e^x = 2^n e^r, |r| <= ln 2 / 2, and a polynomial for e^r.
        const MAGIC: f32 = 12_582_912.0;
        const POLYNOMIAL: [f32; 6] = [
            1.987_569_1e-4,
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ];
        // SAFETY: the caller's, for all of these.
        unsafe {
            let low = Self::splat(-87.3);
            let clamped = Self::min(Self::splat(88.3), Self::max(low, x));
            let magic = Self::splat(MAGIC);
            let n = Self::sub(
                Self::fma(clamped, Self::splat(std::f32::consts::LOG2_E), magic),
                magic,
            );
            let r = Self::fma(n, Self::splat(-0.693_359_4), clamped);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(POLYNOMIAL[0]);
            for c in &POLYNOMIAL[1..] {
                p = Self::fma(p, r, Self::splat(*c));
            }
            let p = Self::fma(Self::mul(p, r), r, Self::add(r, Self::splat(1.0)));
            Self::zero_below(Self::mul(p, Self::pow2(n)), x, low)
        }
    }
}

/// A computation written once for all instruction sets. `run` and what it calls must be `#[inline(always)]`, and vectors
/// must stay out of closures: only what is inlined is compiled for the instruction set.
pub(super) trait Kernel {
    type Out;

    /// # Safety
    /// As [`Simd`], and whatever the kernel says of its fields.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// An instruction set that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// AVX-512, and AMX tiles for products of FP8 with FP8.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// What the processor has, best first.
    pub(super) fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f")
                && has!("avx512bw")
                && has!("avx512vl")
                && has!("avx512dq")
                && has!("avx512vbmi")
                && has!("gfni")
            {
                #[cfg(target_os = "linux")]
                if amx::available() {
                    all.push(Self(Level::Amx));
                }
                all.push(Self(Level::Avx512));
            }
            if has!("avx2") && has!("fma") {
                all.push(Self(Level::Avx2));
            }
        }
        all.push(Self(Level::Portable));
        all
    }

    /// The best that the processor has.
    pub(super) fn best() -> Self {
        Self::available()[0]
    }

    /// Whether products may use AMX tiles.
    pub(super) fn tiles(self) -> bool {
        match self.0 {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx => true,
            _ => false,
        }
    }

    /// Order of packed FP8 weights, see [`Simd::FP8_ORDER`].
    pub(super) fn fp8_order(self) -> [u8; 64] {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::Avx512::FP8_ORDER,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Level::Amx => avx512::Avx512::FP8_ORDER,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::Avx2::FP8_ORDER,
            Level::Portable => portable::Portable::FP8_ORDER,
        }
    }

    /// Runs a kernel.
    ///
    /// # Safety
    /// Whatever the kernel says of its fields.
    pub(super) unsafe fn run<K: Kernel>(self, kernel: K) -> K::Out {
        // SAFETY: `available` found the processor's features; the rest is the caller's.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => avx512::run(kernel),
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Level::Amx => avx512::run(kernel),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run(kernel),
                Level::Portable => kernel.run::<portable::Portable>(),
            }
        }
    }
}

#[cfg(test)]
mod tests;
