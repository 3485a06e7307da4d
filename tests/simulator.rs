//! Many seeds of the deterministic simulator, in a program of their own: what happens there cannot end these tests.

use std::process::Command;

use planted::Bug;

/// Seeds that every change is tested with, and those of `cargo xtask test --deep`.
const SEEDS: u64 = 1000;
const DEEP_SEEDS: u64 = 20_000;
/// Seeds that are run twice.
const REPEATED: u64 = 60;

/// What a run of the simulator said.
struct Said {
    /// None for a program that was ended by a signal.
    code: Option<i32>,
    text: String,
}

fn sim(args: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_sim"))
        .args(args)
        .output()
        .expect("the simulator starts");
    Said {
        code: output.status.code(),
        text: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn faults_never_change_an_answer_and_everything_comes_back() {
    let seeds = if std::env::var_os("HADAL_DEEP").is_some() {
        DEEP_SEEDS
    } else {
        SEEDS
    };
    let Said { code, text } = sim(&["--seeds", &seeds.to_string()]);
    assert_eq!(code, Some(0), "{text}");
    // "1000 seeds, 0 bad, 5000 answers, 30.0 s"
    let mut numbers = text
        .split(", ")
        .map(|part| part.split(' ').next()?.parse().ok());
    let mut number = || -> Option<u64> { numbers.next()? };
    let [run, bad, answers] = [number(), number(), number()];
    assert_eq!((run, bad), (Some(seeds), Some(0)), "{text}");
    // Refusing everything would break no rule either.
    assert!(answers > Some(seeds * 3), "too few answers: {text}");
}

/// In two processes, in which seeds meet in other ways: nothing of the process that outlives a run may matter.
#[test]
fn the_same_seed_gives_the_same_run() {
    let runs = |threads: &str| {
        let seeds = REPEATED.to_string();
        let Said { code, text } = sim(&["--seeds", &seeds, "--threads", threads, "--verbose"]);
        assert_eq!(code, Some(0), "{text}");
        let is_head = |line: &&str| line.starts_with("seed ");
        let mut heads: Vec<String> = text.lines().filter(is_head).map(Into::into).collect();
        heads.sort();
        heads
    };
    let (one, other) = (runs("1"), runs("2"));
    assert_eq!(one.len() as u64, REPEATED);
    assert_eq!(
        one, other,
        "is this built with `--cfg tokio_unstable` (.cargo/config.toml)?"
    );
    let trace = |line: &str| line.rsplit(' ').next().map(str::to_owned);
    assert_ne!(trace(&one[0]), trace(&one[1]));
}

#[test]
fn every_planted_bug_is_found() {
    for bug in Bug::ALL {
        let (bug, seeds) = (format!("{bug:?}"), (2 * SEEDS).to_string());
        let Said { code, text } = sim(&["--bug", &bug, "--seeds", &seeds, "--first"]);
        assert_eq!(code, Some(1), "{bug}: {text}");
        let violation = text.lines().find(|line| line.contains("VIOLATION"));
        println!("{bug}: {}", violation.expect("a bad seed says why").trim());
    }
}

/// tokio shuts a simulated host's runtime down when one of its tasks panics, and tasks that are dropped then may panic too.
#[test]
fn a_host_that_panics_is_a_bad_seed_and_not_the_end() {
    // A token too many is taken back: more than there are, which is an overflow.
    let Said { code, text } = sim(&["--bug", "TokenTwice", "--seeds", "40"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("40 seeds, "), "{text}");
    // A build without checks of arithmetic has wrong tokens instead.
    if cfg!(debug_assertions) {
        assert!(text.contains("VIOLATION Panic("), "{text}");
    }
}
