//! Runs the simulator over many seeds: `cargo run --release -p hadal-tests --bin sim -- --seeds 20000`.

use std::{
    fmt::Write as _,
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Instant,
};

use clap::Parser;
use hadal_tests::sim::{self, End, Plan, Report};
use planted::Bug;
use telemetry::log;

/// Lets seeds happen and prints those that did what must never happen. Exit code 0: all seeds were good; 1: some were bad;
/// anything else: they could not run.
#[derive(Debug, Parser)]
struct Args {
    /// First seed
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Number of seeds
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// Threads
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Begin no further seed after a bad one
    #[arg(long)]
    first: bool,
    /// Run each seed twice; two runs that differ are bad as well
    #[arg(long)]
    twice: bool,
    /// Break the code in this way, which seeds should show
    #[arg(long, value_parser = bug)]
    bug: Option<Bug>,
    /// Print plan and outcome of every seed
    #[arg(long)]
    verbose: bool,
    /// What everything simulated logs to standard error, as "debug" or "info,turmoil=trace": for one seed
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

fn bug(name: &str) -> Result<Bug, String> {
    let name_of = |bug: &Bug| format!("{bug:?}");
    Bug::ALL
        .into_iter()
        .find(|bug| name_of(bug) == name)
        .ok_or_else(|| format!("there are {}", Bug::ALL.each_ref().map(name_of).join(", ")))
}

/// What came of all seeds.
#[derive(Debug, Default)]
struct Tally {
    run: AtomicU64,
    bad: AtomicU64,
    answers: AtomicU64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(log) = args.log.clone() {
        let log_format = log::Format::Text;
        if let Err(error) = log::init(&log::Args { log, log_format }) {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    }
    let begun = Instant::now();
    let tally = Tally::default();
    run_all(&args, &tally);
    let [run, bad, answers] = [tally.run, tally.bad, tally.answers].map(AtomicU64::into_inner);
    let seconds = begun.elapsed().as_secs_f64();
    eprintln!("{run} seeds, {bad} bad, {answers} answers, {seconds:.1} s");
    ExitCode::from(u8::from(bad > 0))
}

/// Runs the seeds, spread over threads, each in one of them.
fn run_all(args: &Args, tally: &Tally) {
    let (next, over) = (AtomicU64::new(args.from), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed - args.from >= args.seeds {
                        return;
                    }
                    if !is_good(seed, args, tally) && args.first {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// Runs a seed, counts it, and prints what came of it where somebody wants to know.
fn is_good(seed: u64, args: &Args, tally: &Tally) -> bool {
    let run = || sim::run(seed, args.bug);
    let report = run();
    let again = args.twice.then(|| run().trace);
    let is_same = again.is_none_or(|again| again == report.trace);
    let is_good = report.violations.is_empty() && is_same;
    let is_answer = |outcome: &&sim::Outcome| matches!(outcome.ends[..], [End::Finished(_)]);
    let answers = report.outcomes.iter().filter(is_answer).count();
    tally.run.fetch_add(1, Ordering::Relaxed);
    tally.bad.fetch_add(u64::from(!is_good), Ordering::Relaxed);
    tally.answers.fetch_add(answers as u64, Ordering::Relaxed);
    if args.verbose || !is_good {
        // In one piece: other threads print as well.
        eprint!("{}", describe(seed, &report, again.filter(|_| !is_same)));
    }
    is_good
}

/// The plan of a seed and what came of it; `again` is the trace of a second run that did something else.
fn describe(seed: u64, report: &Report, again: Option<u64>) -> String {
    let plan = Plan::of(seed);
    let mut shown = format!(
        "seed {seed}: {:.1} s simulated, trace {:016x}\n",
        report.took.as_secs_f64(),
        report.trace
    );
    let mut line = |line: std::fmt::Arguments<'_>| {
        writeln!(shown, "  {line}").expect("a string takes everything");
    };
    for (at, fault) in &plan.faults {
        line(format_args!("{:.3} s {fault:?}", at.as_secs_f64()));
    }
    for (ask, outcome) in plan.asks.iter().zip(&report.outcomes) {
        line(format_args!(
            "{:.3} s {} + {} tokens: {} came, {:?}",
            ask.at.as_secs_f64(),
            ask.prompt.len(),
            ask.count,
            outcome.tokens.len(),
            outcome.ends
        ));
    }
    if let Some(again) = again {
        line(format_args!("DIFFERS: trace {again:016x} the second time"));
    }
    for violation in &report.violations {
        line(format_args!("VIOLATION {violation}"));
    }
    shown
}
