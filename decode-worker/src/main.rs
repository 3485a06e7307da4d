//! The decode worker: takes KV from prefill workers and generates.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Generate the answers of a Hadal deployment from KV that prefill workers push
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(flatten)]
    log: telemetry::log::Args,
    #[command(flatten)]
    args: worker::cli::DecodeArgs,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Cli { log, args } = Cli::parse();
    if let Err(error) = telemetry::log::init(&log) {
        return telemetry::announce::exit_code(Err(error));
    }
    telemetry::announce::exit_code(worker::cli::run_decode(args).await)
}
