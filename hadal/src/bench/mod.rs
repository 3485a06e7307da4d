//! `hadal bench`: load on any OpenAI endpoint, and what came of it.
//!
//! [`load`] decides what is sent and when (closed loop, Poisson, or a recorded trace), [`drive`] sends it, [`report`]
//! turns the [`Record`](record::Record)s into percentiles.

mod args;
mod cold_start;
mod drive;
mod load;
mod prompts;
mod record;
mod report;
mod trace_file;

use std::{fs, process::ExitCode};

use anyhow::Context;
use tokio_util::sync::CancellationToken;

pub(crate) use args::Args;
use load::Load;

use crate::client::Client;

/// Runs a benchmark and prints its report.
///
/// # Errors
/// When the server cannot be reached, the trace cannot be read, or the report cannot be written.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(runs) = args.cold_start {
        return cold_start::run(&args, runs).await;
    }
    let client = Client::new(&args.url, args.api_key.clone())?;
    let model = client.model(args.model.as_deref()).await?;
    let max_len = args.max_len.or(model.max_model_len).context(
        "the server does not say how long prompt and answer may be (max_model_len); say it with --max-len TOKENS",
    )?;
    let load = Load::new(&args, max_len)?;
    eprintln!("{} at {}: {}", model.id, client.url(), load.describe());

    let stop = CancellationToken::new();
    let interrupt = stop.clone();
    let watch = tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupt.cancel();
        }
    });
    let driver = drive::Driver::new(client, model.id.clone(), args.request_timeout());
    if args.warmup > 0 {
        driver.warm_up(&load, args.warmup, &stop).await;
    }
    let run = driver.run(&load, args.duration(), &stop).await;
    watch.abort();

    let report = report::Report::new(&load, &model.id, &run);
    println!("{report}");
    if let Some(path) = &args.out {
        let text = serde_json::to_string_pretty(&report.to_json(&run))?;
        fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(if stop.is_cancelled() {
        ExitCode::from(130)
    } else if run.records.iter().any(|record| record.outcome.is_ok()) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
