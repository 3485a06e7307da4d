//! Time from starting `hadal up` to the first token of its answer.

use std::{
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use indicatif::ProgressBar;
use serde_json::json;
use tokio::{io::AsyncReadExt, process::Command};

use super::args::Args;
use crate::format;

/// A start that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(120);
const QUESTION: &str = "What is 17 + 25?";

/// Starts `hadal up` `runs` times, one after the other.
pub(super) async fn run(args: &Args, runs: u32) -> anyhow::Result<ExitCode> {
    ensure!(runs > 0, "--cold-start needs at least one run");
    let mut times = Vec::new();
    let bar = ProgressBar::new(u64::from(runs));
    for _ in 0..runs {
        let started = tokio::time::timeout(LIMIT, first_token(args));
        times.push(
            started
                .await
                .context("`hadal up` did not answer in time")??,
        );
        bar.inc(1);
    }
    bar.finish_and_clear();
    times.sort_unstable();
    let (best, median, worst) = (times[0], times[times.len() / 2], times[times.len() - 1]);
    println!(
        "start to first token over {runs} runs: best {}, median {}, worst {}",
        format::duration(best),
        format::duration(median),
        format::duration(worst)
    );
    if let Some(path) = &args.out {
        let seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        let text = json!({"start_to_first_token_s": seconds}).to_string();
        std::fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn first_token(args: &Args) -> anyhow::Result<Duration> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    command.args(["up", "--quiet", "--once", QUESTION]);
    command.args(["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]);
    if let Some(checkpoint) = &args.checkpoint {
        command.arg("--model").arg(checkpoint);
    }
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting `hadal up`")?;
    let mut out = child.stdout.take().context("its output")?;
    // The answer streams to standard output and nothing else does.
    let mut byte = [0];
    let read = out.read(&mut byte).await.context("reading the answer")?;
    let elapsed = start.elapsed();
    let mut rest = Vec::new();
    out.read_to_end(&mut rest)
        .await
        .context("reading the answer")?;
    let status = child.wait().await.context("waiting for `hadal up`")?;
    ensure!(
        read == 1 && status.success(),
        "`hadal up --once` failed: {status}"
    );
    Ok(elapsed)
}
