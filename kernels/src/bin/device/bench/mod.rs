//! Times beside the best public kernels' (measured on one H200 with the same method, see kernels/cuda/README.md).

mod blas;
mod gemm;
mod mla;
mod small;

use crate::harness::{Harness, Result, Timing};

type Run = Box<dyn Fn(&Harness) -> Result<Timing>>;

/// A timed case.
pub(crate) struct Case {
    name: String,
    /// The best public kernel's microseconds on an H200, and its name.
    peer: Option<(f64, &'static str)>,
    /// Bytes that must move through device memory at least.
    bytes: f64,
    /// Operations that must be done at least.
    flops: f64,
    run: Run,
}

/// Buffer sets that make weights cold: 512 MB of them.
fn sets(bytes: usize) -> usize {
    ((512 << 20) / bytes).clamp(2, 40)
}

/// Times the cases whose name contains `filter`; true when all ran.
pub(crate) fn run(harness: &Harness, filter: &str) -> Result<bool> {
    let mut complete = true;
    println!("copy ruler before: {:.0} GB/s", harness.copy_rate()?);
    println!(
        "{:<64} {:>9} {:>8} {:>7} {:>9} {:>6} {:>6}  burst ms, peer",
        "case", "us", "GB/s", "TFLOP/s", "peer us", "ratio", "MHz"
    );
    let cases = gemm::cases()
        .into_iter()
        .chain(blas::cases())
        .chain(mla::cases())
        .chain(small::cases());
    for case in cases.filter(|case| case.name.contains(filter)) {
        let timing = match (case.run)(harness) {
            Ok(timing) => timing,
            Err(error) => {
                complete = false;
                println!("{:<64} FAILED: {error}", case.name);
                continue;
            }
        };
        let (peer, ratio, name) = match case.peer {
            Some((us, name)) => (format!("{us:.1}"), format!("{:.2}", timing.us / us), name),
            None => ("-".into(), "-".into(), ""),
        };
        println!(
            "{:<64} {:>9.2} {:>8.0} {:>7.0} {:>9} {:>6} {:>6.0}  {:.1} {}",
            case.name,
            timing.us,
            case.bytes / timing.us / 1e3,
            case.flops / timing.us / 1e6,
            peer,
            ratio,
            timing.mhz,
            timing.burst_ms,
            name
        );
    }
    println!("copy ruler after: {:.0} GB/s", harness.copy_rate()?);
    Ok(complete)
}
