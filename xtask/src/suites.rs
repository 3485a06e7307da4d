//! What a run of `cargo test` did, read from its output.

use std::mem;

/// Tests that were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub ignored: u64,
}

/// The test programs of a run, each with its output.
#[derive(Debug, Default)]
pub(crate) struct Suites {
    /// Tests of all programs that ended by themselves.
    pub counts: Counts,
    /// Output of each program that failed, or died before it could say so.
    pub broken: Vec<Vec<String>>,
    /// Output of the program that runs.
    running: Vec<String>,
}

impl Suites {
    /// Takes the next line of output.
    pub(crate) fn line(&mut self, line: &str) {
        if is_header(line) {
            self.end();
        } else if self.running.is_empty() {
            return;
        }
        self.running.push(line.to_owned());
        let Some(counts) = parse_result(line) else {
            return;
        };
        self.counts.passed += counts.passed;
        self.counts.failed += counts.failed;
        self.counts.ignored += counts.ignored;
        let output = mem::take(&mut self.running);
        if line.starts_with("test result: FAILED") {
            self.broken.push(output);
        }
    }

    /// The program that runs ends here: broken, if it did not say how its tests went.
    pub(crate) fn end(&mut self) {
        if !self.running.is_empty() {
            let mut output = mem::take(&mut self.running);
            output.push("(ended without a result)".into());
            self.broken.push(output);
        }
    }
}

/// Whether cargo says with this line that it starts a test program.
fn is_header(line: &str) -> bool {
    let line = line.trim_start();
    (line.starts_with("Running ") && line.ends_with(')')) || line.starts_with("Doc-tests ")
}

/// Reads "test result: ok. 5 passed; 0 failed; 1 ignored; ...".
fn parse_result(line: &str) -> Option<Counts> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut numbers = counts
        .split("; ")
        .map(|part| part.split(' ').next()?.parse().ok());
    let mut number = || numbers.next()?;
    Some(Counts {
        passed: number()?,
        failed: number()?,
        ignored: number()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(output: &str) -> Suites {
        let mut suites = Suites::default();
        for line in output.lines() {
            suites.line(line);
        }
        suites.end();
        suites
    }

    #[test]
    fn results_of_a_suite_are_read() {
        let line = "test result: ok. 12 passed; 1 failed; 3 ignored; 0 measured; 0 filtered out";
        let (passed, failed, ignored) = (12, 1, 3);
        let expected = Counts {
            passed,
            failed,
            ignored,
        };
        assert_eq!(parse_result(line), Some(expected));
        assert_eq!(parse_result("test a_b ... ok"), None);
    }

    const GOOD: &str = "   Compiling one v0.1.0
     Running unittests src/lib.rs (target/debug/deps/one-1)

running 2 tests
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out
";
    const BAD: &str = "     Running tests/two.rs (target/debug/deps/two-1)
test a ... FAILED
test result: FAILED. 4 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
error: test failed, to rerun pass `-p two`
";
    const DEAD: &str = "     Running tests/three.rs (target/debug/deps/three-1)
running 3 tests
thread caused non-unwinding panic. aborting.
";

    #[test]
    fn what_failed_is_kept_whole_and_what_went_well_is_counted() {
        let suites = read(&[GOOD, BAD, "   Doc-tests one\n", GOOD].concat());
        assert_eq!(suites.counts.passed, 8);
        assert_eq!(suites.counts.failed, 1);
        assert_eq!(suites.broken.len(), 2);
        assert_eq!(suites.broken[0].len(), 3);
        assert!(suites.broken[0][0].contains("two.rs"));
        assert!(suites.broken[1][0].contains("Doc-tests one"));
    }

    #[test]
    fn a_program_that_died_is_broken_wherever_it_stands() {
        for output in [[DEAD, GOOD].concat(), [GOOD, DEAD].concat()] {
            let suites = read(&output);
            assert_eq!(suites.counts.failed, 0);
            let [broken] = &suites.broken[..] else {
                panic!("{suites:?}");
            };
            assert!(broken[0].contains("three.rs"));
            assert!(broken.iter().any(|line| line.contains("aborting")));
            assert!(
                broken
                    .last()
                    .is_some_and(|line| line.contains("without a result"))
            );
        }
    }
}
