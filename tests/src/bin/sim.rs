//! Runs the simulator over many seeds: `cargo run --release -p hadal-tests --bin sim -- --seeds 20000`.

use std::{
    ops::ControlFlow,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use clap::Parser;
use hadal_tests::sim;
use telemetry::log;

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
    threads: usize,
    /// Run each seed twice; two runs that differ are bad as well
    #[arg(long)]
    twice: bool,
    /// Print plan and outcome of every seed
    #[arg(long)]
    verbose: bool,
    /// What everything simulated logs to standard error, as "debug" or "info,turmoil=trace": for one seed
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(log) = args.log.clone() {
        let log_format = log::Format::Text;
        if let Err(error) = log::init(&log::Args { log, log_format }) {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    let begun = Instant::now();
    let bad = AtomicU64::new(0);
    sim::seeds::each(args.from..args.from + args.seeds, args.threads, |seed| {
        bad.fetch_add(u64::from(!is_good(seed, &args)), Ordering::Relaxed);
        ControlFlow::Continue(())
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

fn is_good(seed: u64, args: &Args) -> bool {
    let report = sim::run(seed);
    if args.verbose || !report.violations.is_empty() {
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
    let again = if args.twice {
        sim::run(seed).trace
    } else {
        report.trace
    };
    if again != report.trace {
        eprintln!("seed {seed}: traces {:016x} and {again:016x}", report.trace);
    }
    report.violations.is_empty() && again == report.trace
}
