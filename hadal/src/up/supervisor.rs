//! One process kept running: started, listened to, started again with backoff when it dies, stopped when asked.
//!
//! Children lead process groups of their own, so that Ctrl-C reaches only the parent, and hold a pipe from it on
//! standard input: closing the pipe asks a child to drain, and the kernel closes it too when the parent is killed.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use telemetry::announce::Announcement;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::{backoff::Backoff, spec::Spec};

/// How long a child may drain once it was asked to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// Lines of a dead process's log that are shown.
const LOG_TAIL_LINES: usize = 15;

/// What happened to the process of a slot.
#[derive(Debug)]
pub(super) struct Event {
    /// Index of its [`Spec`].
    pub(super) slot: usize,
    /// What.
    pub(super) change: Change,
}

/// A step in a process's life.
#[derive(Debug)]
pub(super) enum Change {
    /// It runs under this id.
    Spawned(u32),
    /// It loads.
    Loading {
        stage: String,
        done: u64,
        total: u64,
    },
    /// It takes work at these addresses.
    Ready {
        addresses: BTreeMap<String, String>,
        after: Duration,
    },
    /// It died.
    Died {
        why: String,
        log_tail: String,
        again_in: Option<Duration>,
    },
}

/// Everything that supervising takes.
pub(super) struct Supervisor {
    pub(super) slot: usize,
    pub(super) spec: Spec,
    pub(super) program: PathBuf,
    pub(super) folder: PathBuf,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) stop: CancellationToken,
    pub(super) abort: CancellationToken,
}

/// How a life ended.
enum End {
    Stopped,
    Died {
        why: String,
        /// Whether `why` is what the process itself said.
        in_its_words: bool,
        lived: Duration,
        was_ready: bool,
    },
}

impl Supervisor {
    /// Runs until it is told to stop, or until a process dies that was never ready: what cannot start the first time
    /// will not start the second time.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut ever_ready = false;
        loop {
            let (why, in_its_words, lived) = match self.live().await {
                End::Stopped => return,
                End::Died {
                    why,
                    in_its_words,
                    lived,
                    was_ready,
                } => {
                    ever_ready |= was_ready;
                    (why, in_its_words, lived)
                }
            };
            let again_in = ever_ready.then(|| backoff.after_life_of(lived));
            // Its log would only say it again.
            let log_tail = if in_its_words {
                String::new()
            } else {
                tail(&self.log_path())
            };
            self.tell(Change::Died {
                why,
                log_tail,
                again_in,
            })
            .await;
            let Some(pause) = again_in else { return };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stop.cancelled() => return,
            }
        }
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join(format!("{}.log", self.spec.name))
    }

    async fn tell(&self, change: Change) {
        // Nobody listens any more once everything stops.
        let _ = self
            .events
            .send(Event {
                slot: self.slot,
                change,
            })
            .await;
    }

    fn spawn(&self) -> std::io::Result<Child> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())?;
        let mut command = Command::new(&self.program);
        command.args(&self.spec.args);
        for (flag, _, address) in &self.spec.pinned {
            command.arg(flag).arg(address.to_string());
        }
        command
            .envs(self.spec.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    }

    async fn live(&mut self) -> End {
        let born = Instant::now();
        let died = |why, in_its_words, was_ready| End::Died {
            why,
            in_its_words,
            lived: born.elapsed(),
            was_ready,
        };
        let mut child = match self.spawn() {
            Ok(child) => child,
            Err(error) => return died(format!("cannot start: {error}"), true, false),
        };
        self.tell(Change::Spawned(child.id().unwrap_or_default()))
            .await;
        let out = child
            .stdout
            .take()
            .expect("asked for a pipe when it was spawned");
        let mut lines = BufReader::new(out).lines();
        let (mut failure, mut was_ready) = (None, false);
        loop {
            tokio::select! {
                announcement = next_announcement(&mut lines) => match announcement {
                    Some(Announcement::Failed { error }) => failure = Some(error),
                    Some(Announcement::Loading { stage, done, total }) => {
                        self.tell(Change::Loading { stage, done, total }).await;
                    }
                    Some(Announcement::Ready { addresses, .. }) => {
                        was_ready = true;
                        self.pin(&addresses);
                        self.tell(Change::Ready { addresses, after: born.elapsed() }).await;
                    }
                    Some(Announcement::Draining { .. }) => {}
                    // Standard output ended: so does the process, or it is as good as dead.
                    None => {
                        let status = self.reap(&mut child).await;
                        let in_its_words = failure.is_some();
                        return died(failure.unwrap_or(status), in_its_words, was_ready);
                    }
                },
                () = self.stop.cancelled() => {
                    self.reap(&mut child).await;
                    return End::Stopped;
                }
            }
        }
    }

    /// Where the system chose a port, the next life must take the same one: clients know it by now.
    fn pin(&mut self, addresses: &BTreeMap<String, String>) {
        for (_, name, address) in &mut self.spec.pinned {
            if let Some(announced) = addresses.get(*name).and_then(|a| a.parse().ok()) {
                *address = announced;
            }
        }
    }

    /// Asks the child to stop, waits for it, kills it at the deadline or when told to hurry. Says how it ended.
    async fn reap(&self, child: &mut Child) -> String {
        drop(child.stdin.take());
        let status = tokio::select! {
            status = child.wait() => Some(status),
            () = tokio::time::sleep(DRAIN) => None,
            () = self.abort.cancelled() => None,
        };
        let status = match status {
            Some(status) => status,
            None => match child.kill().await {
                Ok(()) => child.wait().await,
                Err(error) => Err(error),
            },
        };
        status.map_or_else(|error| error.to_string(), describe)
    }
}

/// The next announcement; lines that are none are skipped. `None` at the end of the output.
async fn next_announcement(lines: &mut Lines<BufReader<ChildStdout>>) -> Option<Announcement> {
    while let Ok(Some(line)) = lines.next_line().await {
        if let Some(announcement) = Announcement::parse(&line) {
            return Some(announcement);
        }
    }
    None
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(9)) => "was killed (signal 9; out of memory?)".into(),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// The last lines of a log, each with its end.
fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines = VecDeque::with_capacity(LOG_TAIL_LINES);
    for line in text.lines() {
        if lines.len() == LOG_TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(format!("{line}\n"));
    }
    Vec::from(lines).concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::spec::Role;

    #[test]
    fn only_the_end_of_a_log_is_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text: Vec<String> = (0..100).map(|line| line.to_string()).collect();
        fs::write(file.path(), text.join("\n")).unwrap();
        let tail = tail(file.path());
        assert!(
            tail.starts_with("85\n") && tail.ends_with("\n99\n"),
            "{tail}"
        );
    }

    fn supervise(script: &str, folder: &Path, stop: &CancellationToken) -> mpsc::Receiver<Event> {
        let (events, receiver) = mpsc::channel(64);
        let spec = Spec {
            name: "child".into(),
            role: Role::Decode,
            args: vec!["-c".into(), script.into()],
            pinned: Vec::new(),
            env: Vec::new(),
        };
        let supervisor = Supervisor {
            slot: 0,
            spec,
            program: "/bin/sh".into(),
            folder: folder.to_owned(),
            events,
            stop: stop.clone(),
            abort: CancellationToken::new(),
        };
        tokio::spawn(supervisor.run());
        receiver
    }

    const READY: &str = r#"echo '{"event":"ready","role":"decode","incarnation":"i","addresses":{"grpc":"127.0.0.1:1"},"memory_bytes":0}'"#;

    #[tokio::test]
    async fn a_process_that_dies_after_it_was_ready_is_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let mut events = supervise(
            &format!("{READY}; echo oops >&2; exit 3"),
            folder.path(),
            &stop,
        );
        let (mut spawned, mut deaths) = (0, 0);
        while deaths < 2 {
            match events.recv().await.unwrap().change {
                Change::Spawned(_) => spawned += 1,
                Change::Died {
                    why,
                    log_tail,
                    again_in,
                } => {
                    deaths += 1;
                    assert_eq!(why, "exited with code 3");
                    assert!(log_tail.ends_with("oops\n"));
                    assert!(again_in.is_some());
                }
                Change::Ready { addresses, .. } => assert_eq!(addresses["grpc"], "127.0.0.1:1"),
                Change::Loading { .. } => unreachable!("the script loads nothing"),
            }
        }
        assert_eq!(spawned, 2);
        stop.cancel();
    }

    #[tokio::test]
    async fn a_process_that_never_was_ready_is_given_up_with_its_own_words() {
        let folder = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let script = r#"echo 'no such model' >&2; echo '{"event":"failed","error":"no such model"}'; exit 1"#;
        let mut events = supervise(script, folder.path(), &stop);
        let last = loop {
            if let Change::Died {
                why,
                log_tail,
                again_in,
            } = events.recv().await.unwrap().change
            {
                break (why, log_tail, again_in);
            }
        };
        assert_eq!(last, ("no such model".into(), String::new(), None));
        assert!(
            events.recv().await.is_none(),
            "it must not be started again"
        );
    }

    #[tokio::test]
    async fn stopping_closes_the_child_s_input_and_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let mark = folder.path().join("drained");
        let script = format!("{READY}; cat >/dev/null; touch {}", mark.display());
        let mut events = supervise(&script, folder.path(), &stop);
        while !matches!(events.recv().await.unwrap().change, Change::Ready { .. }) {}
        stop.cancel();
        assert!(events.recv().await.is_none(), "no death is reported");
        assert!(mark.exists());
    }
}
