//! Runs the simulator over many seeds: `cargo run --release -p hadal-tests --bin sim -- --seeds 20000`.

use std::{
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use clap::Parser;
use hadal_tests::sim;

/// Lets seeds happen and prints those that did what must never happen.
#[derive(Debug, Parser)]
struct Args {
    /// First seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Number of seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: u64,
    /// Print plan and outcome of every seed
    #[arg(long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let begun = Instant::now();
    let (next, bad) = (AtomicU64::new(args.from), AtomicU64::new(0));
    let end = args.from + args.seeds;
    std::thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    bad.fetch_add(u64::from(!is_good(seed, args.verbose)), Ordering::Relaxed);
                }
            });
        }
    });
    let bad = bad.into_inner();
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!("{} seeds, {bad} bad, {seconds:.1} s", args.seeds);
    if bad == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn is_good(seed: u64, verbose: bool) -> bool {
    let report = sim::run(seed);
    if verbose || !report.violations.is_empty() {
        let plan = sim::Plan::of(seed);
        eprintln!(
            "seed {seed}: {:.1} s simulated, trace {:016x}",
            report.took.as_secs_f64(),
            report.trace
        );
        for (at, fault) in &plan.faults {
            eprintln!("  {:.3} s {fault:?}", at.as_secs_f64());
        }
        for (ask, outcome) in plan.asks.iter().zip(&report.outcomes) {
            let (prompt, got) = (ask.prompt.len(), outcome.tokens.len());
            eprintln!(
                "  {:.3} s {prompt} + {} tokens: {got} came, {:?}",
                ask.at.as_secs_f64(),
                ask.count,
                outcome.ends
            );
        }
        for violation in &report.violations {
            eprintln!("  VIOLATION {violation}");
        }
    }
    report.violations.is_empty()
}
