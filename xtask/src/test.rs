//! `cargo xtask test`: every check and every test, and one line at the end that says how it went.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::{
    docs, layers, licences, python, run,
    suites::{Counts, Suites},
    workspace,
};

/// What to run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Also what takes long: ignored tests (CUDA kernels on the host among them), more seeds where a test takes HADAL_DEEP
    #[arg(long)]
    deep: bool,
    /// Only tests, not formatting, layers, licences, lints, CUDA kernels and pages
    #[arg(long)]
    tests_only: bool,
    /// Only tests whose name holds this
    filter: Option<String>,
}

/// Runs everything, also after a failure: one run should show all that is wrong.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut steps = Steps::default();
    if !args.tests_only {
        steps.step("formatting", || {
            run::run(workspace::cargo().args(["fmt", "--all", "--check"]))
        });
        steps.step("layers", layers::run);
        steps.step("licences", licences::run);
        steps.step("lints", || {
            run::run(workspace::cargo().args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]))
        });
    }
    let mut counts = Counts::default();
    let mut hadal = None;
    steps.step("build", || {
        hadal = Some(workspace::build_hadal()?);
        Ok(())
    });
    if !args.tests_only {
        steps.step("CUDA kernels", compile_kernels);
    }
    if let Some(hadal) = hadal {
        steps.step("tests", || tests(args, &hadal, &mut counts));
        if !args.tests_only {
            steps.step("pages", || docs::run(true, &hadal));
        }
    }
    steps.finish(counts)
}

/// Compiles every CUDA kernel with a compiler from the package registry: no GPU and no toolkit needed.
fn compile_kernels() -> anyhow::Result<()> {
    let python = python::interpreter("cuda", "kernels/cuda/requirements.txt")?;
    run::run(Command::new(python).arg(workspace::root().join("kernels/cuda/compile.py")))
}

fn tests(args: &Args, hadal: &Path, counts: &mut Counts) -> anyhow::Result<()> {
    let python = python::interpreter("e2e", "tests/e2e/requirements.txt")
        .context("installing what the end-to-end tests need")?;
    let mut command = workspace::cargo();
    command.args(["test", "--workspace", "--no-fail-fast"]);
    command
        .env("CARGO_TERM_COLOR", "never")
        .env("HADAL_TEST_PYTHON", python)
        .env("HADAL_TEST_PROGRAM", hadal);
    if let Some(filter) = &args.filter {
        command.arg(filter);
    }
    if args.deep {
        command
            .env("HADAL_DEEP", "1")
            .args(["--", "--include-ignored"]);
    }
    let mut suites = Suites::default();
    let passed = run::watch(command, |line| suites.line(line))?;
    suites.end();
    *counts = suites.counts;
    if !passed {
        // Once more at the end, where it is found.
        for output in &suites.broken {
            println!("\n==> broken\n{}", output.join("\n"));
        }
        let (broken, failed) = (suites.broken.len(), counts.failed);
        ensure!(broken > 0, "the tests could not be built");
        bail!("{failed} tests failed, in {broken} test programs that broke");
    }
    ensure!(counts.passed > 0, "no test ran");
    Ok(())
}

/// What was done, how long it took, and what went wrong.
#[derive(Default)]
struct Steps {
    done: Vec<(&'static str, Duration, anyhow::Result<()>)>,
}

impl Steps {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> anyhow::Result<()>) {
        eprintln!("==> {name}");
        let start = Instant::now();
        let result = work();
        if let Err(error) = &result {
            eprintln!("error: {name}: {error:#}");
        }
        self.done.push((name, start.elapsed(), result));
    }

    fn finish(self, counts: Counts) -> anyhow::Result<()> {
        println!();
        for (name, took, result) in &self.done {
            let word = if result.is_ok() { "ok" } else { "FAILED" };
            println!("{name:12} {word:8} {:>6.1} s", took.as_secs_f64());
        }
        let broken = self
            .done
            .iter()
            .filter(|(.., result)| result.is_err())
            .count();
        let Counts {
            passed,
            failed,
            ignored,
        } = counts;
        println!("{passed} passed, {failed} failed, {ignored} ignored");
        if broken > 0 {
            bail!("{broken} of {} steps failed", self.done.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_broken_step_fails_the_whole_run() {
        let mut steps = Steps::default();
        steps.step("good", || Ok(()));
        assert!(steps.finish(Counts::default()).is_ok());
        let mut steps = Steps::default();
        steps.step("bad", || bail!("broken"));
        steps.step("good", || Ok(()));
        assert!(steps.finish(Counts::default()).is_err());
    }
}
