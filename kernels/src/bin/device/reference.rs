//! Number formats and random numbers on the host.

/// BF16 to f64.
pub(crate) fn bf16(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

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

/// The values of all E4M3 bytes.
pub(crate) fn e4m3_table() -> [f64; 256] {
    std::array::from_fn(|i| e4m3(i as u8))
}

/// Collects the relative error of an output against its reference: ||out - ref|| / ||ref||.
#[derive(Debug, Default)]
pub(crate) struct Error {
    difference: f64,
    reference: f64,
}

impl Error {
    /// Adds one element.
    pub(crate) fn add(&mut self, out: f64, reference: f64) {
        self.difference += (out - reference).powi(2);
        self.reference += reference.powi(2);
    }

    /// The relative error; NaN where anything was NaN, infinite where the reference is all zero and the output is not.
    pub(crate) fn relative(&self) -> f64 {
        if self.difference == 0.0 && self.reference == 0.0 {
            return 0.0;
        }
        (self.difference / self.reference).sqrt()
    }
}

/// Random numbers for shapes and contents (splitmix64).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// In [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}
