//! FP8 E4M3FN and its block scales (report section 3.3): exact conversions that every backend and converter agrees on.

/// Values that share one scale: columns of an activation row, rows and columns of a weight block.
pub const BLOCK: usize = 128;

/// Largest finite E4M3FN value.
pub const MAX: f32 = 448.0;

/// Smallest |x|max that an activation block is scaled by, so that a row of zeros has a scale.
pub const MIN_AMAX: f32 = 1e-4;

/// Every byte's value.
pub const VALUES: [f32; 256] = values();

const fn values() -> [f32; 256] {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = value(byte as u8);
        byte += 1;
    }
    table
}

const fn value(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3 & 15) as u32, (byte & 7) as u32);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if byte & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// The value of a byte.
pub fn decode(byte: u8) -> f32 {
    VALUES[byte as usize]
}

/// Whether a byte is a normal number: neither zero nor subnormal nor NaN.
pub fn is_normal(byte: u8) -> bool {
    (8..0x7f).contains(&(byte & 0x7f))
}

/// The nearest byte, ties to even; finite values saturate at 448, infinities and NaN become NaN so that they stay
/// visible.
pub fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if !magnitude.is_finite() {
        return sign | 0x7f;
    }
    if magnitude < 1.0 / 64.0 {
        // Below the smallest normal value the format counts in steps of 2^-9.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    sign | (rounded - (120 << 3)).min(0x7e) as u8
}

/// Scale of an activation block with largest magnitude `amax`: `max(amax, 1e-4) / 448`.
pub fn scale(amax: f32) -> f32 {
    amax.max(MIN_AMAX) / MAX
}

/// [`scale`] rounded up to a power of two, on the bits, so that exact powers stay.
pub fn scale_ue8m0(amax: f32) -> f32 {
    let bits = scale(amax).to_bits();
    let up = u32::from(bits & 0x7f_ffff != 0);
    f32::from_bits(((bits >> 23) + up) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_those_of_the_format() {
        // Worked by hand: the smallest subnormal, ties to even, saturation.
        for (x, byte) in [
            (1.0 / 512.0, 0x01),
            (0.0009, 0x00),
            (0.00098, 0x01),
            (0.9, 0x36),
            (17.0, 0x58),
            (17.9, 0x59),
            (19.0, 0x5a),
            (21.0, 0x5a),
            (149.3333, 0x71),
            (247.9, 0x77),
            (248.0, 0x78),
            (500.0, 0x7e),
        ] {
            assert_eq!(encode(x), byte, "{x}");
            assert_eq!(encode(-x), byte | 0x80, "-{x}");
        }
    }

    #[test]
    fn every_byte_survives_decoding_and_encoding() {
        for byte in 0..=255u8 {
            assert_eq!(encode(decode(byte)), byte);
        }
    }

    #[test]
    fn encoding_finds_the_nearest_value_for_every_magnitude() {
        let finite: Vec<f32> = (0..0x7f).map(decode).collect();
        for step in 0..200_000 {
            let x = step as f32 * (500.0 / 200_000.0);
            let got = (decode(encode(x)) - x.min(MAX)).abs();
            let best = finite
                .iter()
                .map(|v| (v - x.min(MAX)).abs())
                .fold(f32::MAX, f32::min);
            assert_eq!(got, best, "{x}");
        }
    }

    #[test]
    fn infinities_and_nan_stay_visible() {
        assert!(decode(encode(f32::INFINITY)).is_nan());
        assert!(decode(encode(f32::NEG_INFINITY)).is_nan());
        assert!(decode(encode(f32::NAN)).is_nan());
    }

    #[test]
    fn scales_follow_the_report() {
        // By hand, for a largest value of 3.
        assert!((scale(3.0) - 0.006_696_43).abs() < 1e-8);
        assert_eq!(encode(1.0 / scale(3.0)), 0x71);
        assert_eq!(scale_ue8m0(3.0), 1.0 / 128.0);
        assert_eq!(scale_ue8m0(448.0), 1.0);
        assert_eq!(scale_ue8m0(448.5), 2.0);
        assert_eq!(scale(0.0), 1e-4 / 448.0);
    }
}
