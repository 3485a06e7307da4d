//! `hadal up`: prefill workers, decode workers and a router as processes on this machine, over one checkpoint.
//!
//! [`Plan`] says what to run, [`supervisor`] keeps each process running, [`Cluster`] follows them all,
//! tells the router who is there and shows it, [`ask`] puts the first question. Logs are in the [`Folder`] of the run.

mod args;
mod ask;
mod backoff;
mod checkpoint;
mod cluster;
mod folder;
mod plan;
mod screen;
mod spec;
mod supervisor;
mod workers_file;

use std::process::ExitCode;

use anyhow::Context;
use telemetry::shutdown::{Tasks, on_signals};
use tokio_util::sync::CancellationToken;

pub(crate) use args::Args;
use cluster::Cluster;
use folder::Folder;
use plan::Plan;
use screen::Screen;

use crate::format;

/// Starts everything, asks the first question, keeps serving until it is told to stop.
///
/// # Errors
/// When something cannot start, or the first question of `--once` gets no answer.
pub(crate) async fn run(args: Args, log: &telemetry::log::Args) -> anyhow::Result<ExitCode> {
    let screen = Screen::new(args.quiet);
    let question = args.question();
    let once = args.once.is_some();
    let folder = Folder::open(args.logs.as_deref())?;
    let plan = Plan::try_new(args, folder.path(), log)?;
    let tasks = Tasks::new();
    let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
    on_signals(&tasks, stop.clone(), abort.clone()).context("installing signal handlers")?;

    screen.line(&format!(
        "hadal {}: {} ({})",
        env!("CARGO_PKG_VERSION"),
        plan.model.display(),
        format::bytes(plan.checkpoint_bytes),
    ));
    let mut cluster = Cluster::start(&plan, folder, screen, &abort)?;
    let result = serve(&mut cluster, &plan, question.as_deref(), once, &stop).await;
    let stopped = cluster.stop().await;
    tasks.drain(std::time::Duration::from_secs(1)).await;
    let code = result?;
    stopped?;
    Ok(code)
}

/// What happens between start and stop.
async fn serve(
    cluster: &mut Cluster,
    plan: &Plan,
    question: Option<&str>,
    once: bool,
    stop: &CancellationToken,
) -> anyhow::Result<ExitCode> {
    tokio::select! {
        ready = cluster.ready() => ready?,
        () = stop.cancelled() => return Ok(ExitCode::from(130)),
    }
    let client = cluster.client(plan.api_key.clone())?;
    if let Some(question) = question {
        let workers = cluster.worker_metrics();
        let asked = tokio::select! {
            answer = ask::ask(&client, question, &workers) => answer,
            never = cluster.follow() => match never? {},
            () = stop.cancelled() => return Ok(ExitCode::from(130)),
        };
        match asked {
            Ok(report) => cluster.screen().line(&report.to_string()),
            Err(error) if once => return Err(error),
            Err(error) => cluster
                .screen()
                .problem(&format!("the first question failed: {error:#}")),
        }
    }
    if once {
        return Ok(ExitCode::SUCCESS);
    }
    cluster.screen().line(&how_to_ask(&client, plan).await?);
    tokio::select! {
        never = cluster.follow() => match never? {},
        () = stop.cancelled() => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The lines that say how to ask the next question.
async fn how_to_ask(client: &crate::client::Client, plan: &Plan) -> anyhow::Result<String> {
    let model = client.model(None).await?.id;
    let url = client.url();
    let (header, key) = if plan.api_key.is_some() {
        (
            " -H \"Authorization: Bearer $HADAL_API_KEY\"",
            " (with HADAL_API_KEY set)",
        )
    } else {
        ("", "")
    };
    let body = serde_json::json!({
        "model": model,
        "stream": true,
        "messages": [{"role": "user", "content": "What is 17 + 25?"}],
    });
    Ok(format!(
        "\nServing {model} at {url}/v1. Ask the next one{key}:\n\
         \x20 curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{body}'\n\
         \x20 hadal chat --url {url}\n\
         Ctrl-C stops everything."
    ))
}
