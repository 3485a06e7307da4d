//! Workers listed in a file that somebody else keeps up to date: `{"workers": [{"role": "decode", "address":
//! "http://127.0.0.1:4242"}]}`. It is read again whenever its content changes.

use std::{collections::BTreeSet, io, path::PathBuf, sync::Arc, time::Duration};

use serde::Deserialize;
use telemetry::shutdown::Tasks;
use tokio::{sync::watch, time::sleep};
use tracing::warn;

use super::{Endpoints, normalise};

/// How often the file is looked at.
const INTERVAL: Duration = Duration::from_millis(200);

#[derive(Deserialize)]
struct File {
    workers: Vec<Entry>,
}

/// The role that the file may name is for people: the worker says its own.
#[derive(Deserialize)]
struct Entry {
    address: String,
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read the list of workers: {0}")]
    Read(#[from] io::Error),
    /// It is not what it should be.
    #[error("the list of workers is not valid: {0}")]
    Parse(#[from] serde_json::Error),
}

/// Follows the file at `path` in a task of `tasks`. While it cannot be read, the last good content stays true.
///
/// # Errors
/// When the file exists and cannot be used at the start. One that does not exist yet is an empty list.
pub async fn follow_file(path: PathBuf, tasks: &Tasks) -> Result<Endpoints, FileError> {
    let mut last = match tokio::fs::read(&path).await {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let first = if last.is_empty() {
        BTreeSet::new()
    } else {
        parse(&last)?
    };
    let (sender, endpoints) = watch::channel(Arc::new(first));
    let closing = tasks.closing().clone();
    tasks.spawn(
        "workers file",
        closing.run_until_cancelled_owned(async move {
            loop {
                sleep(INTERVAL).await;
                let Ok(content) = tokio::fs::read(&path).await else {
                    continue;
                };
                if content == last {
                    continue;
                }
                match parse(&content) {
                    Ok(addresses) => {
                        sender.send_replace(Arc::new(addresses));
                    }
                    Err(error) => {
                        warn!(path = %path.display(), %error, "the list of workers is kept");
                    }
                }
                last = content;
            }
        }),
    );
    Ok(endpoints)
}

fn parse(content: &[u8]) -> Result<BTreeSet<String>, FileError> {
    let file: File = serde_json::from_slice(content)?;
    Ok(file
        .workers
        .iter()
        .map(|entry| normalise(&entry.address))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_changed_file_changes_the_set_and_a_broken_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("workers.json");
        let tasks = Tasks::new();
        let mut endpoints = follow_file(path.clone(), &tasks).await.unwrap();
        assert!(endpoints.borrow().is_empty());
        let write = |content: &str| std::fs::write(&path, content).unwrap();
        write("{ broken");
        sleep(INTERVAL * 2).await;
        write(
            r#"{"workers":[{"role":"decode","address":"http://127.0.0.1:1"},{"address":"b:2"}]}"#,
        );
        let wait = tokio::time::timeout(Duration::from_secs(10), endpoints.changed());
        wait.await.unwrap().unwrap();
        let found: Vec<String> = endpoints.borrow().iter().cloned().collect();
        assert_eq!(found, ["127.0.0.1:1", "b:2"]);
        tasks.drain(Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_file_that_is_broken_at_the_start_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("workers.json");
        std::fs::write(&path, "[]").unwrap();
        assert!(follow_file(path, &Tasks::new()).await.is_err());
    }
}
