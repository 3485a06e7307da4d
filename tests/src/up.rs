//! `hadal up` as a child process, followed through what it prints.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        OnceLock,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};

/// How long a deployment may take to start, or a test to see what it waits for. Generous: machines of tests are slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The `hadal` program: the one that HADAL_TEST_PROGRAM names, or built when the first test asks for it.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(built) = std::env::var_os("HADAL_TEST_PROGRAM") {
            return built.into();
        }
        let output = Command::new(env!("CARGO"))
            .args(["build", "--package", "hadal", "--message-format", "json"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "hadal must build");
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .expect("cargo names the executable")
    })
}

/// Runs `hadal` to its end.
pub fn hadal(args: &[&str]) -> Output {
    command(args).output().expect("hadal starts")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(program());
    // Variables that a developer may have set must not leak into a test.
    for name in ["HADAL_MODEL", "HADAL_API_KEY", "HADAL_URL", "RUST_LOG"] {
        command.env_remove(name);
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// A running deployment. Dropping it kills the parent, and the children follow.
#[derive(Debug)]
pub struct Up {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    members: BTreeMap<String, Member>,
}

/// A process of the deployment, as of its last start.
#[derive(Clone, Debug)]
pub struct Member {
    /// Process id.
    pub pid: u32,
    /// Where it listens: gRPC of a worker, HTTP of the router.
    pub address: String,
    /// How often it was ready so far.
    pub lives: u32,
}

impl Up {
    /// Starts `hadal up --model MODEL --no-ask` with more flags, and waits until it serves.
    pub fn start(model: &Path, flags: &[&str]) -> Self {
        let model = model.to_str().expect("a path of UTF-8");
        let fixed = [
            "up",
            "--model",
            model,
            "--no-ask",
            "--http",
            "127.0.0.1:0",
            "--grpc",
            "127.0.0.1:0",
        ];
        let mut child = command(&[&fixed, flags].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("hadal starts");
        let stderr = child.stderr.take().expect("a pipe was asked for");
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut up = Self {
            child,
            lines,
            seen: Vec::new(),
            members: BTreeMap::new(),
        };
        up.wait_for("that it serves", |up| {
            up.seen.last().is_some_and(|l| l.contains("Ctrl-C stops"))
        });
        up
    }

    /// The router's HTTP address.
    pub fn http(&self) -> String {
        self.member("router").address.clone()
    }

    /// What is known of a process.
    pub fn member(&self, name: &str) -> &Member {
        self.members
            .get(name)
            .expect("a process of this name was ready")
    }

    /// Ids of the parent and of every child as of its last start.
    pub fn pids(&self) -> Vec<u32> {
        self.members
            .values()
            .map(|member| member.pid)
            .chain([self.child.id()])
            .collect()
    }

    /// Sends a signal ("KILL", "TERM", "INT", "STOP", "CONT") to a process of the deployment.
    pub fn signal(&self, name: &str, signal: &str) {
        kill(self.member(name).pid, signal);
    }

    /// Sends a signal to the parent.
    pub fn signal_parent(&self, signal: &str) {
        kill(self.child.id(), signal);
    }

    /// Waits until the process was ready `lives` times.
    pub fn wait_for_life(&mut self, name: &str, lives: u32) {
        let what = format!("life {lives} of {name}");
        self.wait_for(&what, |up| {
            up.members.get(name).is_some_and(|m| m.lives >= lives)
        });
    }

    /// Waits for the parent to end and gives its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status.code();
            }
            thread::sleep(Duration::from_millis(10));
        }
        unreachable!("hadal up does not end; it printed {:#?}", self.seen);
    }

    /// Everything that was printed so far.
    pub fn printed(&mut self) -> String {
        while let Ok(line) = self.lines.try_recv() {
            self.read(line);
        }
        self.seen.join("\n")
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            match self
                .lines
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(line) => self.read(line),
                Err(RecvTimeoutError::Timeout) => {
                    unreachable!("waited too long for {what}; printed: {:#?}", self.seen)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("hadal up ended before {what}; printed: {:#?}", self.seen)
                }
            }
        }
    }

    fn read(&mut self, line: String) {
        if let Some((name, pid, address)) = parse_ready(&line) {
            let lives = self.members.get(name).map_or(0, |member| member.lives) + 1;
            let member = Member {
                pid,
                address: address.to_owned(),
                lives,
            };
            self.members.insert(name.to_owned(), member);
        }
        self.seen.push(line);
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads "  decode-0     ready at 127.0.0.1:4242 after 123 ms (metrics at 127.0.0.1:4243, pid 7)".
fn parse_ready(line: &str) -> Option<(&str, u32, &str)> {
    let (name, rest) = line.trim_start().split_once(" ready at ")?;
    let (address, rest) = rest.split_once(' ')?;
    let pid = rest.rsplit_once("pid ")?.1.strip_suffix(')')?;
    Some((name.trim(), pid.parse().ok()?, address))
}

fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status();
    assert!(
        status.expect("kill runs").success(),
        "process {pid} must be there to be signalled"
    );
}

/// Whether a process exists and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

/// Waits until none of the processes is alive; gives those that are.
pub fn wait_until_gone(pids: &[u32]) -> Vec<u32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left: Vec<u32> = pids.iter().copied().filter(|&pid| is_alive(pid)).collect();
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_about_a_ready_process_is_read() {
        let line = "  decode-0     ready at 127.0.0.1:4242 after 123 ms (metrics at 127.0.0.1:4243, pid 7)";
        assert_eq!(parse_ready(line), Some(("decode-0", 7, "127.0.0.1:4242")));
        assert_eq!(parse_ready("  decode-0     was killed (signal 9)"), None);
    }

    #[test]
    fn this_process_is_alive() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(0));
    }
}
