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

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
