//! Number formats and random numbers on the host.

pub(crate) use kernels::cases::{Error, Random, bf16};

/// Value of an E4M3 byte.
pub(crate) fn e4m3(x: u8) -> f64 {
    let sign = if x & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(x >> 3 & 15), f64::from(x & 7));
    sign * match (exponent, x & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}
