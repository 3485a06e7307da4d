//! What a process tells the one that started it: one JSON object a line on standard output, which carries nothing else.
//! `hadal up` reads these from its children; a person or a script can as well.

use std::{collections::BTreeMap, fmt, io, io::Write, process::ExitCode};

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Announcement {
    /// Start-up goes on.
    Loading {
        /// What is being done, in a few words ("weights", "warm-up").
        stage: String,
        /// Bytes (or other units of the stage) done.
        done: u64,
        /// Of how many; 0 where nobody knows.
        total: u64,
    },
    /// The process takes work.
    Ready {
        /// prefill, decode, combined or router.
        role: String,
        /// Its incarnation.
        incarnation: String,
        /// "host:port" for each thing it listens on: `grpc`, `kv`, `metrics`, `http`.
        addresses: BTreeMap<String, String>,
        /// Memory it planned with, in bytes.
        memory_bytes: u64,
    },
    /// It finishes what it has and takes no more.
    Draining {
        /// Requests that still run.
        running: u64,
    },
    /// It cannot go on.
    Failed {
        /// Why, and what to do about it.
        error: String,
    },
}

impl Announcement {
    /// Reads one line; `None` for anything that is not an announcement.
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }

    /// Writes the line to standard output.
    ///
    /// # Errors
    /// When standard output is closed.
    pub fn emit(&self) -> io::Result<()> {
        let mut line = serde_json::to_string(self).map_err(io::Error::other)?;
        line.push('\n');
        let mut out = io::stdout().lock();
        out.write_all(line.as_bytes())?;
        out.flush()
    }
}

/// The end of a process's `main`: tells the parent and the log why it failed, if it did.
pub fn exit_code<E: fmt::Display>(result: Result<(), E>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    // With `anyhow` the alternate form is the whole chain of causes.
    let error = format!("{error:#}");
    tracing::error!(error, "cannot go on");
    // A closed output means that the parent is gone and does not need to know.
    let _ = Announcement::Failed { error }.emit();
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_back_as_what_was_written() {
        let ready = Announcement::Ready {
            role: "decode".into(),
            incarnation: "decode-0-7f".into(),
            addresses: BTreeMap::from([("grpc".into(), "127.0.0.1:4242".into())]),
            memory_bytes: 1 << 20,
        };
        let line = serde_json::to_string(&ready).unwrap();
        assert!(
            line.starts_with(r#"{"event":"ready","role":"decode""#),
            "{line}"
        );
        assert_eq!(Announcement::parse(&line), Some(ready));
        assert_eq!(Announcement::parse("warming up"), None);
    }
}
