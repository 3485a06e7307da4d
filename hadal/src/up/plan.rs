//! From flags to processes. Everything that can be known to fail is found here, all at once, before anything starts.

use std::{
    ffi::OsString,
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::{
    args::{Args, Mode},
    checkpoint::{self, Checkpoint},
    spec::{Role, Spec},
};
use crate::format;

/// How long each process may finish what it has. Shorter than the supervisor's patience, so that processes end by
/// themselves.
pub(super) const DRAIN_SECONDS: u64 = 8;

/// What to run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// The checkpoint.
    pub(super) model: PathBuf,
    /// Size of its weight files.
    pub(super) checkpoint_bytes: u64,
    /// This program, which plays every role.
    pub(super) program: PathBuf,
    /// The processes, workers first.
    pub(super) specs: Vec<Spec>,
    /// What requests must carry.
    pub(super) api_key: Option<String>,
}

impl Plan {
    /// Checks the flags against this machine. Logs and the list of workers will be in `folder`.
    ///
    /// # Errors
    /// Every problem that was found, with what to do about it.
    pub(super) fn try_new(
        args: Args,
        folder: &Path,
        log: &telemetry::log::Args,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let model = match args.model.clone() {
            Some(model) => model,
            None => default_model(&program)?,
        };
        // Children resolve it against the same directory, but a message with a whole path says more.
        let model = std::path::absolute(&model).unwrap_or(model);
        let mut problems = Vec::new();
        let checkpoint = Checkpoint::inspect(&model)
            .map_err(|problem| problems.push(problem))
            .ok();
        if let Some(checkpoint) = &checkpoint {
            let available = checkpoint::available_memory_bytes();
            problems.extend(memory_problem(checkpoint, &args, available));
        }
        for (flag, address) in [("--http", args.http), ("--grpc", args.grpc)] {
            if let Err(error) = TcpListener::bind(address) {
                problems.push(listen_problem(flag, address, &error));
            }
        }
        if args.mode == Mode::Combined && args.prefill.is_some() {
            problems.push(
                "--prefill does not go with --mode combined, whose workers (--decode) compute prompts themselves".into(),
            );
        }
        if args.api_key.as_ref().is_some_and(String::is_empty) {
            problems.push("--api-key is empty; leave it out to serve without a key".into());
        }
        let Some(checkpoint) = checkpoint.filter(|_| problems.is_empty()) else {
            bail!("{}", problems.join("\n"));
        };
        Ok(Self {
            specs: specs(&args, &model, folder, log),
            api_key: args.api_key,
            checkpoint_bytes: checkpoint.bytes,
            model,
            program,
        })
    }
}

fn default_model(program: &Path) -> anyhow::Result<PathBuf> {
    let mut starts: Vec<PathBuf> = std::env::current_dir().into_iter().collect();
    starts.push(program.to_owned());
    checkpoint::find_demo(&starts).context(
        "no checkpoint: run this inside a checkout of Hadal, which has one in models/demo, or name one with --model DIR",
    )
}

fn memory_problem(checkpoint: &Checkpoint, args: &Args, available: Option<u64>) -> Option<String> {
    let workers = u64::from(args.decode)
        + match args.mode {
            Mode::Disaggregated => u64::from(args.prefill()),
            Mode::Combined => 0,
        };
    let needed = checkpoint.memory_bytes(args.precision, workers);
    let available = available.filter(|&available| available < needed)?;
    Some(format!(
        "the weights need {} for {workers} workers, but only {} of memory are free: \
         use fewer workers (--prefill, --decode, --mode combined), a smaller --precision, or a smaller model",
        format::bytes(needed),
        format::bytes(available),
    ))
}

fn listen_problem(flag: &str, address: SocketAddr, error: &io::Error) -> String {
    let mut free = address;
    free.set_port(0);
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "{flag} {address} is taken: something else listens there (another `hadal up`?). \
             Stop it or choose another address; {flag} {free} takes any free port"
        ),
        io::ErrorKind::AddrNotAvailable => {
            format!(
                "{flag} {address} is no address of this machine; 127.0.0.1 and 0.0.0.0 always are"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!("{flag} {address} is not allowed to you; ports from 1024 up are")
        }
        _ => format!("cannot listen on {flag} {address}: {error}"),
    }
}

/// The processes: prefill, decode, router.
fn specs(args: &Args, model: &Path, folder: &Path, log: &telemetry::log::Args) -> Vec<Spec> {
    let mut specs = Vec::new();
    let (prefill, decode) = match args.mode {
        Mode::Disaggregated => (args.prefill(), Role::Decode),
        Mode::Combined => (0, Role::Combined),
    };
    for unit in 0..prefill {
        specs.push(worker(args, model, log, Role::Prefill, unit));
    }
    for unit in 0..args.decode {
        specs.push(worker(args, model, log, decode, unit));
    }
    specs.push(router(args, model, folder, log));
    specs
}

fn worker(args: &Args, model: &Path, log: &telemetry::log::Args, role: Role, unit: u16) -> Spec {
    let name = format!("{}-{unit}", role.as_str());
    let command = if role == Role::Prefill {
        "prefill-worker"
    } else {
        "decode-worker"
    };
    let mut flags = Flags::new(command);
    flags.common(args, model, log);
    flags.pair("--unit", &name);
    flags.pair("--listen", "127.0.0.1:0");
    flags.pair("--metrics-listen", "127.0.0.1:0");
    flags.pair("--drain-seconds", DRAIN_SECONDS.to_string());
    if role != Role::Prefill {
        flags.pair("--kv-listen", "127.0.0.1:0");
    }
    if let Some(precision) = args.precision {
        flags.pair("--precision", precision.to_string());
    }
    if let Some(threads) = args.threads {
        flags.pair("--threads", threads.to_string());
    }
    if role == Role::Combined {
        flags.0.push("--combined".into());
    }
    Spec {
        name,
        role,
        args: flags.0,
        pinned: Vec::new(),
        env: Vec::new(),
    }
}

fn router(args: &Args, model: &Path, folder: &Path, log: &telemetry::log::Args) -> Spec {
    let mut flags = Flags::new("router");
    flags.common(args, model, log);
    flags.pair("--mode", args.mode.as_str());
    flags.pair("--drain-timeout-s", DRAIN_SECONDS.to_string());
    flags.pair("--workers-file", super::workers_file::path(folder));
    Spec {
        name: "router".into(),
        role: Role::Router,
        args: flags.0,
        pinned: vec![("--http", "http", args.http), ("--grpc", "grpc", args.grpc)],
        // In the environment, because every user of the machine can read a process's arguments.
        env: args
            .api_key
            .iter()
            .map(|key| ("HADAL_API_KEY".into(), key.into()))
            .collect(),
    }
}

struct Flags(Vec<OsString>);

impl Flags {
    fn new(command: &str) -> Self {
        Self(vec![command.into()])
    }

    fn pair(&mut self, flag: &str, value: impl Into<OsString>) {
        self.0.push(flag.into());
        self.0.push(value.into());
    }

    /// What every role takes.
    fn common(&mut self, args: &Args, model: &Path, log: &telemetry::log::Args) {
        self.pair("--model", model);
        self.pair("--log", &log.log);
        self.pair("--log-format", log.log_format.as_str());
        if let Some(name) = &args.served_name {
            self.pair("--served-name", name);
        }
        if let Some(tokens) = args.max_model_len {
            self.pair("--max-model-len", tokens.to_string());
        }
        self.0.push("--exit-with-parent".into());
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches};

    use super::*;

    fn args(line: &[&str]) -> Args {
        let command = Args::augment_args(clap::Command::new("up"));
        let matches = command
            .try_get_matches_from([&["up"], line].concat())
            .unwrap();
        Args::from_arg_matches(&matches).unwrap()
    }

    fn log() -> telemetry::log::Args {
        telemetry::log::Args {
            log: "info".into(),
            log_format: telemetry::log::Format::Text,
        }
    }

    fn names(line: &[&str]) -> Vec<String> {
        specs(&args(line), Path::new("/m"), Path::new("/run"), &log())
            .into_iter()
            .map(|spec| spec.name)
            .collect()
    }

    #[test]
    fn each_mode_has_its_pools() {
        assert_eq!(names(&[]), ["prefill-0", "decode-0", "decode-1", "router"]);
        assert_eq!(
            names(&["--mode", "combined", "--decode", "1"]),
            ["combined-0", "router"]
        );
    }

    #[test]
    fn the_key_is_never_among_the_arguments() {
        let specs = specs(
            &args(&["--api-key", "s3cret"]),
            Path::new("/m"),
            Path::new("/r"),
            &log(),
        );
        assert!(
            specs
                .iter()
                .all(|spec| spec.args.iter().all(|arg| arg != "s3cret"))
        );
        let router = specs.last().unwrap();
        assert_eq!(
            router.env,
            [("HADAL_API_KEY".into(), OsString::from("s3cret"))]
        );
    }

    #[test]
    fn too_little_memory_is_said_with_what_to_do() {
        let checkpoint = Checkpoint {
            bytes: 10 << 30,
            weight_bytes: 1,
        };
        let problem = memory_problem(&checkpoint, &args(&[]), Some(4 << 30)).unwrap();
        assert!(
            problem.contains("10.00 GiB") && problem.contains("--mode combined"),
            "{problem}"
        );
        assert_eq!(
            memory_problem(&checkpoint, &args(&[]), Some(11 << 30)),
            None
        );
        assert_eq!(memory_problem(&checkpoint, &args(&[]), None), None);
    }

    #[test]
    fn a_taken_port_is_said_with_a_way_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let error = TcpListener::bind(address).unwrap_err();
        let problem = listen_problem("--http", address, &error);
        assert!(
            problem.contains("is taken") && problem.contains("127.0.0.1:0"),
            "{problem}"
        );
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap().to_string();
        let args = args(&[
            "--model",
            "/nowhere",
            "--http",
            &taken,
            "--grpc",
            "127.0.0.1:0",
            "--mode",
            "combined",
            "--prefill",
            "2",
        ]);
        let error = Plan::try_new(args, Path::new("/run"), &log())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("/nowhere")
                && error.contains("is taken")
                && error.contains("--prefill does not go with"),
            "{error}"
        );
    }
}
