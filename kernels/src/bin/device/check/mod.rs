//! Every kernel against float64, and beside the CPU backend where it has the operation.

mod blas;
mod gemm;
pub(crate) mod mla;
mod pointwise;
pub(crate) mod prefill;
pub(crate) mod routing;
mod sampling;

use kernels::cases::{Error, Judged, Operation};
use kernels::cpu::Cpu;

use crate::harness::{Harness, Result};

/// Operations of the largest case that the CPU is given too.
const CPU_WORK: f64 = 2e10;

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
    /// The CPU backend's error against the same float64 results, and whether it is within its own bound with nothing wrong.
    cpu: Option<(f64, bool)>,
}

impl Found {
    /// A result with everything exact but the error.
    pub(crate) fn new(error: &Error, bound: f64, repeats: bool, wrong: usize) -> Self {
        Self {
            error: error.relative(),
            bound,
            repeats,
            wrong,
            cpu: None,
        }
    }

    fn is_right(&self) -> bool {
        let cpu = self.cpu.is_none_or(|(_, right)| right);
        self.error <= self.bound && self.repeats && self.wrong == 0 && cpu
    }
}

/// What a kernel left.
pub(crate) struct Ran<T> {
    /// As every backend's is judged.
    pub(crate) out: T,
    /// Two runs gave the same bits.
    pub(crate) repeats: bool,
    /// Elements touched that should not have been, or the other way round.
    pub(crate) wrong: usize,
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

    /// A case of the list that the CPU backend is checked with too; `inputs` makes it, `gpu` computes it.
    pub(crate) fn shared<O: Operation>(
        name: String,
        inputs: impl Fn() -> O + 'static,
        gpu: impl Fn(&Harness, &O) -> Result<Ran<O::Out>> + 'static,
    ) -> Self {
        Self::new(name, move |h| {
            let case = inputs();
            let ran = gpu(h, &case)?;
            let Judged { error, wrong } = case.judge(&ran.out);
            let mut cpu = None;
            if case.work() < CPU_WORK {
                let threads = std::thread::available_parallelism()?.get();
                let judged = case.judge(&case.cpu(&Cpu::new(threads))?);
                let right = judged.error <= O::CPU_BOUND && judged.wrong == 0;
                cpu = Some((judged.error, right));
            }
            Ok(Found {
                error,
                bound: O::BOUND,
                repeats: ran.repeats,
                wrong: wrong + ran.wrong,
                cpu,
            })
        })
    }
}

/// Runs the cases whose name contains `filter`; true when all are right.
pub(crate) fn run(harness: &Harness, filter: &str) -> bool {
    let mut right = true;
    let mut count = 0;
    println!(
        "{:<64} {:>10} {:>8} {:>10} {:>7} {:>6}",
        "case", "error", "bound", "CPU error", "repeats", "wrong"
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
            "{:<64} {:>10.2e} {:>8.0e} {:>10} {:>7} {:>6} {}",
            case.name,
            found.error,
            found.bound,
            found
                .cpu
                .map_or("-".into(), |(error, _)| format!("{error:.2e}")),
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
