//! From flags and environment variables to a running worker.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use kernels::Precision;

use crate::{Role, start};

/// Flags of a prefill worker.
#[derive(Clone, Debug, clap::Args)]
pub struct PrefillArgs {
    #[command(flatten)]
    common: CommonArgs,
}

/// Flags of a decode worker.
#[derive(Clone, Debug, clap::Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Where to take KV from prefill workers; port 0: the system chooses
    #[arg(
        long,
        env = "HADAL_KV_LISTEN",
        default_value = "127.0.0.1:0",
        value_name = "ADDR"
    )]
    kv_listen: SocketAddr,
    /// Where prefill workers reach --kv-listen, as HOST:PORT (default: the address it listens on)
    #[arg(long, env = "HADAL_KV_ADVERTISE", value_name = "ADDR")]
    kv_advertise: Option<String>,
    /// Compute prompts here as well, without a prefill pool
    #[arg(long, env = "HADAL_COMBINED")]
    combined: bool,
}

#[derive(Clone, Debug, clap::Args)]
struct CommonArgs {
    /// Directory of the checkpoint: config.json, safetensors and tokenizer as they were released
    #[arg(long, env = "HADAL_MODEL", value_name = "DIR")]
    model: PathBuf,
    /// How to compute (default: what the checkpoint is meant for)
    #[arg(long, env = "HADAL_PRECISION", value_name = "f32|bf16|w8a8|w8")]
    precision: Option<Precision>,
    /// What to compute on
    #[arg(
        long,
        env = "HADAL_BACKEND",
        value_enum,
        default_value = "auto",
        value_name = "B"
    )]
    backend: Backend,
    /// Name under which the model is served (default: the directory's name)
    #[arg(long, env = "HADAL_SERVED_NAME", value_name = "NAME")]
    served_name: Option<String>,
    /// The deployment this worker belongs to
    #[arg(
        long,
        env = "HADAL_DEPLOYMENT",
        default_value = "local",
        value_name = "NAME"
    )]
    deployment: String,
    /// The unit of the pool that this worker is part of
    #[arg(long, env = "HADAL_UNIT", default_value = "0", value_name = "NAME")]
    unit: String,
    /// Its rank within the unit
    #[arg(long, env = "HADAL_RANK", default_value_t = 0, value_name = "N")]
    rank: u32,
    /// Goes into the incarnation: the pod's UID, say (default: a random one)
    #[arg(long, env = "HADAL_POD_UID", value_name = "UID")]
    incarnation: Option<String>,
    /// Where to serve gRPC; port 0: the system chooses
    #[arg(
        long,
        env = "HADAL_LISTEN",
        default_value = "127.0.0.1:0",
        value_name = "ADDR"
    )]
    listen: SocketAddr,
    /// Where to serve /metrics, /health and /ready over HTTP; port 0: the system chooses
    #[arg(
        long,
        env = "HADAL_METRICS_LISTEN",
        default_value = "127.0.0.1:0",
        value_name = "ADDR"
    )]
    metrics_listen: SocketAddr,
    /// Tokens of prompt and answer together (default: what the model allows)
    #[arg(long, env = "HADAL_MAX_MODEL_LEN", value_name = "N")]
    max_model_len: Option<usize>,
    /// Memory for the KV cache, as 512MiB or 4GiB (default: what running sequences may need, as far as memory goes)
    #[arg(long, env = "HADAL_KV_MEMORY", value_parser = parse_bytes, value_name = "SIZE")]
    kv_memory: Option<usize>,
    /// Sequences that are computed together
    #[arg(
        long,
        env = "HADAL_MAX_RUNNING",
        default_value_t = 16,
        value_name = "N"
    )]
    max_running: usize,
    /// Sequences that may wait; more are refused
    #[arg(
        long,
        env = "HADAL_MAX_WAITING",
        default_value_t = 256,
        value_name = "N"
    )]
    max_waiting: usize,
    /// Tokens of one step over all sequences
    #[arg(
        long,
        env = "HADAL_STEP_TOKENS",
        default_value_t = 512,
        value_name = "N"
    )]
    step_tokens: usize,
    /// Prompt tokens of one sequence in a step
    #[arg(
        long,
        env = "HADAL_CHUNK_TOKENS",
        default_value_t = 256,
        value_name = "N"
    )]
    chunk_tokens: usize,
    /// Threads that compute (default: one for each processor)
    #[arg(long, env = "HADAL_THREADS", value_name = "N")]
    threads: Option<usize>,
    /// Seconds that a drain waits for what runs
    #[arg(
        long,
        env = "HADAL_DRAIN_SECONDS",
        default_value_t = 30,
        value_name = "S"
    )]
    drain_seconds: u64,
    /// Stop when standard input closes: for a process whose parent holds the other end
    #[arg(long)]
    exit_with_parent: bool,
}

/// What to compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// The best there is.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU (no build serves on one yet).
    Cuda,
}

/// Everything a worker process is told, checked.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) role: Role,
    pub(crate) model: PathBuf,
    pub(crate) precision: Option<Precision>,
    pub(crate) backend: Backend,
    pub(crate) served_name: String,
    pub(crate) deployment: String,
    pub(crate) unit: String,
    pub(crate) rank: u32,
    pub(crate) incarnation: Option<String>,
    pub(crate) listen: SocketAddr,
    /// Unless nothing is received.
    pub(crate) kv_listen: Option<SocketAddr>,
    pub(crate) kv_advertise: Option<String>,
    pub(crate) metrics_listen: SocketAddr,
    pub(crate) max_model_len: Option<usize>,
    pub(crate) kv_memory: Option<usize>,
    pub(crate) options: engine::Options,
    pub(crate) threads: Option<usize>,
    pub(crate) drain: Duration,
    pub(crate) exit_with_parent: bool,
}

/// Runs a prefill worker until it is told to stop.
///
/// # Errors
/// What keeps it from serving, with what to do about it.
pub async fn run_prefill(args: PrefillArgs) -> anyhow::Result<()> {
    let settings = Settings::new(args.common, Role::Prefill, None)?;
    start::run(settings).await
}

/// Runs a decode worker until it is told to stop.
///
/// # Errors
/// What keeps it from serving, with what to do about it.
pub async fn run_decode(args: DecodeArgs) -> anyhow::Result<()> {
    let DecodeArgs {
        common,
        kv_listen,
        kv_advertise,
        combined,
    } = args;
    let role = if combined {
        Role::Combined
    } else {
        Role::Decode
    };
    let settings = Settings::new(common, role, Some((kv_listen, kv_advertise)))?;
    start::run(settings).await
}

impl Settings {
    /// # Errors
    /// Every problem of the flags at once.
    fn new(
        args: CommonArgs,
        role: Role,
        kv: Option<(SocketAddr, Option<String>)>,
    ) -> anyhow::Result<Self> {
        // Every flag has to be used.
        let CommonArgs {
            model,
            precision,
            backend,
            served_name,
            deployment,
            unit,
            rank,
            incarnation,
            listen,
            metrics_listen,
            max_model_len,
            kv_memory,
            max_running,
            max_waiting,
            step_tokens,
            chunk_tokens,
            threads,
            drain_seconds,
            exit_with_parent,
        } = args;
        let (kv_listen, kv_advertise) = kv.unzip();
        let kv_advertise = kv_advertise.flatten();
        let mut problems = Vec::new();
        if !model.is_dir() {
            problems.push(format!("--model {} is not a directory", model.display()));
        }
        for (flag, value) in [
            ("--max-model-len", max_model_len.unwrap_or(1)),
            ("--kv-memory", kv_memory.unwrap_or(1)),
            ("--max-running", max_running),
            ("--max-waiting", max_waiting),
            ("--step-tokens", step_tokens),
            ("--chunk-tokens", chunk_tokens),
            ("--threads", threads.unwrap_or(1)),
        ] {
            if value == 0 {
                problems.push(format!("{flag} is 0"));
            }
        }
        if chunk_tokens > step_tokens {
            problems.push(format!(
                "--chunk-tokens {chunk_tokens} is more than --step-tokens {step_tokens}"
            ));
        }
        if max_running > step_tokens {
            problems.push(format!(
                "--max-running {max_running} is more than --step-tokens {step_tokens}: each \
                 running sequence needs a token of every step"
            ));
        }
        if let (Some(listen), None) = (kv_listen, &kv_advertise)
            && listen.ip().is_unspecified()
        {
            problems.push(format!(
                "--kv-listen {listen} is every address of this machine: say with --kv-advertise \
                 HOST:PORT which one prefill workers reach"
            ));
        }
        anyhow::ensure!(problems.is_empty(), "{}", problems.join("\n"));
        let served_name = served_name.unwrap_or_else(|| {
            let name = model
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            name.unwrap_or_else(|| "model".into())
        });
        Ok(Self {
            role,
            model,
            precision,
            backend,
            served_name,
            deployment,
            unit,
            rank,
            incarnation,
            listen,
            kv_listen,
            kv_advertise,
            metrics_listen,
            max_model_len,
            kv_memory,
            options: engine::Options {
                max_running,
                max_waiting,
                step_tokens,
                chunk_tokens,
            },
            threads,
            drain: Duration::from_secs(drain_seconds),
            exit_with_parent,
        })
    }
}

/// Reads "512MiB", "4GiB", "1000000".
fn parse_bytes(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: usize = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        unit => return Err(format!("{unit:?} is no unit: use B, KiB, MiB, GiB or TiB")),
    };
    let number: usize = digits
        .trim()
        .parse()
        .map_err(|_| format!("{digits:?} is no number"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| "that is more than there can be".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Decode {
        #[command(flatten)]
        args: DecodeArgs,
    }

    fn settings(flags: &[&str]) -> anyhow::Result<Settings> {
        let flags = ["worker"].iter().chain(flags);
        let DecodeArgs {
            common,
            kv_listen,
            kv_advertise,
            ..
        } = Decode::parse_from(flags).args;
        Settings::new(common, Role::Decode, Some((kv_listen, kv_advertise)))
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let flags = [
            "--model",
            "/nowhere/at/all",
            "--max-running",
            "0",
            "--chunk-tokens",
            "600",
            "--kv-listen",
            "0.0.0.0:0",
        ];
        let message = settings(&flags).unwrap_err().to_string();
        for part in [
            "--model /nowhere",
            "--max-running is 0",
            "--chunk-tokens 600",
            "--kv-advertise",
        ] {
            assert!(message.contains(part), "{part} is not in {message}");
        }
    }

    #[test]
    fn a_model_is_served_under_its_directory_s_name() {
        let directory = std::env::temp_dir();
        let settings = settings(&["--model", directory.to_str().unwrap()]).unwrap();
        assert_eq!(
            settings.served_name,
            directory.file_name().unwrap().to_str().unwrap()
        );
    }

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("7"), Ok(7));
        for bad in ["", "MiB", "4GB", "99999999TiB", "-1"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
