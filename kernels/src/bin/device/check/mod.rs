//! Every kernel against float64.

mod blas;
mod gemm;
pub(crate) mod mla;
mod pointwise;
pub(crate) mod prefill;
pub(crate) mod routing;
mod sampling;

use crate::harness::{Harness, Result};
use crate::reference::Error;

/// What a case found.
#[derive(Debug)]
pub(crate) struct Found {
    /// Relative error against float64.
    pub(crate) error: f64,
    /// Largest error that is right.
    pub(crate) bound: f64,
    /// Two runs gave the same bits.
    pub(crate) repeats: bool,
    /// Elements that should have been written and were not, or the other way round; wrong choices; and the like.
    pub(crate) wrong: usize,
}

impl Found {
    /// A result with everything exact but the error.
    pub(crate) fn new(error: &Error, bound: f64, repeats: bool, wrong: usize) -> Self {
        Self {
            error: error.relative(),
            bound,
            repeats,
            wrong,
        }
    }

    fn is_right(&self) -> bool {
        self.error <= self.bound && self.repeats && self.wrong == 0
    }
}

type Run = Box<dyn Fn(&Harness) -> Result<Found>>;

/// A named case.
pub(crate) struct Case {
    name: String,
    run: Run,
}

impl Case {
    /// A case.
    pub(crate) fn new(name: String, run: impl Fn(&Harness) -> Result<Found> + 'static) -> Self {
        Self {
            name,
            run: Box::new(run),
        }
    }
}

/// Runs the cases whose name contains `filter`; true when all are right.
pub(crate) fn run(harness: &Harness, filter: &str) -> bool {
    let mut right = true;
    let mut count = 0;
    println!(
        "{:<64} {:>10} {:>8} {:>7} {:>6}",
        "case", "error", "bound", "repeats", "wrong"
    );
    let cases = gemm::cases()
        .into_iter()
        .chain(mla::cases())
        .chain(prefill::cases())
        .chain(pointwise::cases())
        .chain(routing::cases())
        .chain(sampling::cases())
        .chain(blas::cases());
    for case in cases.filter(|case| case.name.contains(filter)) {
        count += 1;
        let found = match (case.run)(harness) {
            Ok(found) => found,
            Err(error) => {
                right = false;
                println!("{:<64} FAILED: {error}", case.name);
                continue;
            }
        };
        right &= found.is_right();
        println!(
            "{:<64} {:>10.2e} {:>8.0e} {:>7} {:>6} {}",
            case.name,
            found.error,
            found.bound,
            if found.repeats { "yes" } else { "NO" },
            found.wrong,
            if found.is_right() { "right" } else { "WRONG" }
        );
    }
    println!(
        "{count} cases, {}",
        if right { "all right" } else { "NOT all right" }
    );
    right
}
