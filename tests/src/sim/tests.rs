use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
};

use planted::Bug;

use super::*;

/// Seeds that every change is tested with, and those of `cargo xtask test --deep`.
const SEEDS: u64 = 1000;
const DEEP_SEEDS: u64 = 20_000;
/// Seeds that are run twice.
const REPEATED: u64 = 60;
/// Threads that run seeds.
const THREADS: usize = 2;

/// Seeds of `0..end` whose run is bad, with what it did; begins no further one after the first if `first`.
fn bad_seeds(end: u64, first: bool, is_bad: impl Fn(u64) -> Option<String> + Sync) -> Vec<String> {
    let bad = Mutex::new(Vec::new());
    seeds::each(0..end, THREADS, |seed| match is_bad(seed) {
        Some(what) => {
            bad.lock().push(format!("seed {seed}: {what}"));
            if first {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        }
        None => ControlFlow::Continue(()),
    });
    bad.into_inner()
}

#[test]
fn faults_never_change_an_answer_and_everything_comes_back() {
    let seeds = if std::env::var_os("HADAL_DEEP").is_some() {
        DEEP_SEEDS
    } else {
        SEEDS
    };
    let answered = AtomicU64::new(0);
    let bad = bad_seeds(seeds, false, |seed| {
        let report = run(seed);
        let finished = report
            .outcomes
            .iter()
            .filter(|o| matches!(o.ends[..], [End::Finished(_)]));
        answered.fetch_add(finished.count() as u64, Ordering::Relaxed);
        (!report.violations.is_empty()).then(|| format!("{:?}", report.violations))
    });
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    // Refusing everything would break no rule either.
    let answered = answered.into_inner();
    assert!(
        answered > seeds * 3,
        "only {answered} requests were answered"
    );
}

/// The second time in the opposite order, so that nothing of the process that outlives a run may matter.
#[test]
fn the_same_seed_gives_the_same_run() {
    let traces = |seed_of: fn(u64) -> u64| {
        let traces = Mutex::new(BTreeMap::new());
        seeds::each(0..REPEATED, THREADS, |number| {
            let seed = seed_of(number);
            let trace = run(seed).trace;
            traces.lock().insert(seed, trace);
            ControlFlow::Continue(())
        });
        traces.into_inner()
    };
    let (one, other) = (traces(|n| n), traces(|n| REPEATED - 1 - n));
    let differ: Vec<_> = one
        .keys()
        .filter(|&seed| one[seed] != other[seed])
        .collect();
    assert!(
        differ.is_empty(),
        "seeds {differ:?}: is this built with `--cfg tokio_unstable` (.cargo/config.toml)?"
    );
    assert_ne!(one[&1], one[&2]);
}

#[test]
fn every_planted_bug_is_found() {
    // A broken assertion of the code finds a bug as well; its message does not belong into a passing test's output.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !planted::any() {
            hook(panic);
        }
    }));
    let missed: Vec<Bug> = Bug::ALL
        .into_iter()
        .filter(|&bug| {
            let found = bad_seeds(2 * SEEDS, true, |seed| {
                match catch_unwind(AssertUnwindSafe(|| planted::with(bug, || run(seed)))) {
                    Ok(report) if report.violations.is_empty() => None,
                    Ok(report) => Some(format!("{:?}", report.violations)),
                    Err(_) => Some("an assertion failed".into()),
                }
            });
            eprintln!(
                "{bug:?}: {}",
                found.first().map_or("not found", |what| what)
            );
            found.is_empty()
        })
        .collect();
    assert_eq!(missed, []);
}
