//! Figures for people.

use std::time::Duration;

/// Bytes in binary units.
pub(crate) fn bytes(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

/// A duration with three significant digits.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        s if s < 0.0995 => format!("{:.1} ms", s * 1e3),
        s if s < 0.9995 => format!("{:.0} ms", s * 1e3),
        s if s < 100.0 => format!("{s:.2} s"),
        s => format!("{s:.0} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_keep_three_digits() {
        let format = |seconds| duration(Duration::from_secs_f64(seconds));
        assert_eq!(format(0.0123), "12.3 ms");
        assert_eq!(format(0.123), "123 ms");
        assert_eq!(format(1.234), "1.23 s");
        assert_eq!(format(123.4), "123 s");
    }

    #[test]
    fn bytes_are_in_binary_units() {
        assert_eq!(bytes(1 << 20), "1.00 MiB");
    }
}
