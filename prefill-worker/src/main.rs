//! The prefill worker: computes prompts and pushes their KV to decode workers.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Compute prompts of a Hadal deployment and push their KV to decode workers
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    log: telemetry::log::Args,
    #[command(flatten)]
    args: worker::cli::PrefillArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { log, args } = Cli::parse();
    if let Err(error) = telemetry::log::init(&log) {
        return telemetry::announce::exit_code(Err(error));
    }
    telemetry::announce::exit_code(worker::cli::run_prefill(args).await)
}
