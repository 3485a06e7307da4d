//! The `hadal` command: a whole deployment on one machine, ways to talk with it and to measure it, and every role that
//! a process of a deployment can play.

mod bench;
mod chat;
mod client;
#[cfg(test)]
mod fake_server;
mod format;
mod reference;
mod series;
mod sse;
mod trace;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use telemetry::announce;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Serve DeepSeek-V3 with prompt processing and token generation in pools of their own
#[derive(Debug, Parser)]
#[command(name = "hadal", version)]
struct Cli {
    #[command(flatten)]
    log: telemetry::log::Args,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Args),
    Chat(chat::Args),
    Bench(bench::Args),
    Trace(trace::Args),
    /// Compute prompts and push their KV to decode workers
    PrefillWorker(worker::cli::PrefillArgs),
    /// Generate tokens from KV that prefill workers push, or do both
    DecodeWorker(worker::cli::DecodeArgs),
    Router(router::cli::Args),
    /// Print the reference of flags or metrics in Markdown
    #[command(hide = true)]
    Reference {
        #[arg(value_enum)]
        page: reference::Page,
    },
}

impl Command {
    /// What this process itself logs. A command that speaks with a person prints what matters; unless asked, only
    /// warnings stand between. `up` passes on what it is asked: that is about the processes it starts.
    fn own_log(&self, log: &telemetry::log::Args) -> telemetry::log::Args {
        let is_role = matches!(
            self,
            Self::PrefillWorker(_) | Self::DecodeWorker(_) | Self::Router(_)
        );
        let mut own = log.clone();
        if matches!(self, Self::Up(_)) || (!is_role && own.log == "info") {
            own.log = "warn".into();
        }
        own
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: starting threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(run(cli));
    // Not dropped: that would wait for a thread that may sit in `read` on a terminal.
    runtime.shutdown_background();
    code
}

async fn run(Cli { log, command }: Cli) -> ExitCode {
    if let Err(error) = telemetry::log::init(&command.own_log(&log)) {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    let done = match command {
        Command::Up(args) => up::run(args, &log).await,
        Command::Chat(args) => chat::run(args).await,
        Command::Bench(args) => bench::run(args).await,
        Command::Trace(args) => trace::run(args).await,
        Command::PrefillWorker(args) => {
            return announce::exit_code(worker::cli::run_prefill(args).await);
        }
        Command::DecodeWorker(args) => {
            return announce::exit_code(worker::cli::run_decode(args).await);
        }
        Command::Router(args) => router::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Reference { page } => reference::print::<Cli>(page),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
