use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU64, Ordering},
};

use planted::Bug;

use super::*;

/// Seeds that every change is tested with, and those of `cargo xtask test --deep`.
const SEEDS: u64 = 1000;
const DEEP_SEEDS: u64 = 20_000;
/// Threads that run seeds.
const THREADS: usize = 2;

/// Seeds of `0..end` whose run is bad, with what it did; stops at the first if `first`.
fn bad_seeds(end: u64, first: bool, is_bad: impl Fn(u64) -> Option<String> + Sync) -> Vec<String> {
    let next = AtomicU64::new(0);
    let bad = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end || (first && !bad.lock().is_empty()) {
                        return;
                    }
                    if let Some(what) = is_bad(seed) {
                        bad.lock().push(format!("seed {seed}: {what}"));
                    }
                }
            });
        }
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

/// Not all seeds repeat to the bit: tokio wakes the receivers of a watch channel, and picks among ready branches of a
/// `select!` (tonic's server has some), by randomness of its own that a stable build can not seed. Hadal's own code
/// leaves nothing to it, so that those are few; a run that went wrong is found again within a few tries.
#[test]
fn most_seeds_give_the_same_run_twice() {
    const REPEATED: u64 = 40;
    let differ = bad_seeds(REPEATED, false, |seed| {
        let (one, other) = (run(seed), run(seed));
        let is_same =
            (one.trace, one.took, &one.outcomes) == (other.trace, other.took, &other.outcomes);
        (!is_same).then(|| format!("{:016x} and {:016x}", one.trace, other.trace))
    });
    assert!(differ.len() as u64 <= REPEATED / 3, "{}", differ.join("\n"));
    assert_ne!(run(1).trace, run(2).trace);
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
