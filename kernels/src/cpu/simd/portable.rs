//! Plain arrays: the meaning of every operation, and the fall-back for other processors.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every method is the trait's"
)]

use half::bf16;

use super::{LANES, Simd};
use crate::fp8;

#[derive(Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn map2(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    const WIDE: bool = false;
    const FP8_ORDER: [u8; 64] = {
        let mut order = [0; 64];
        let mut i = 0;
        while i < 64 {
            order[i] = i as u8;
            i += 1;
        }
        order
    };

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        p.cast::<V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn load_first(p: *const f32, n: usize) -> V {
        let mut v = [0.0; LANES];
        p.copy_to_nonoverlapping(v.as_mut_ptr(), n);
        v
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: V) {
        p.cast::<V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: V) -> V {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn zero_below(y: V, x: V, limit: V) -> V {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    unsafe fn pow2(n: V) -> V {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum4(v: [V; 4]) -> [f32; 4] {
        v.map(|mut v| {
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    v[i] += v[i + half];
                }
            }
            v[0]
        })
    }
    #[inline(always)]
    unsafe fn bf16_pair(p: *const bf16) -> [V; 2] {
        let words = std::slice::from_raw_parts(p, 2 * LANES);
        [0, 1].map(|odd| std::array::from_fn(|i| words[2 * i + odd].to_f32()))
    }
    #[inline(always)]
    unsafe fn bf16(p: *const bf16) -> V {
        let words = std::slice::from_raw_parts(p, LANES);
        std::array::from_fn(|i| words[i].to_f32())
    }
    #[inline(always)]
    unsafe fn fp8_rows(p: *const u8, _: bool) -> [[V; 2]; 2] {
        let bytes = std::slice::from_raw_parts(p, 64);
        [0, 32].map(|row| {
            [0, 16].map(|half| std::array::from_fn(|i| fp8::decode(bytes[row + half + i])))
        })
    }
    #[inline(always)]
    unsafe fn store_fp8(p: *mut u8, v: V) {
        p.cast::<[u8; LANES]>().write(v.map(fp8::encode));
    }
}
