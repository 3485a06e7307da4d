//! The router as a process of its own.

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(name = "router", version, about = "Hadal's router")]
struct Cli {
    #[command(flatten)]
    log: telemetry::log::Args,
    #[command(flatten)]
    args: router::cli::Args,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    telemetry::log::init(&cli.log)?;
    router::run(cli.args).await
}
