//! Hadal's own build tasks: `cargo xtask <task>`.

mod docs;
mod layers;
mod licences;
mod python;
mod run;
mod suites;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Hadal's own build tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what tests need and run every check and test
    Test(test::Args),
    /// Check that no crate depends on one it must not know
    Layers,
    /// Check that everything we build on may be used and comes from the registry
    Licences,
    /// Write the generated reference in docs/ and ARCHITECTURE.md
    Docs {
        /// Write nothing; fail if something would change
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Test(args) => test::run(&args),
        Task::Layers => layers::run(),
        Task::Licences => licences::run(),
        Task::Docs { check } => workspace::build_hadal().and_then(|hadal| docs::run(check, &hadal)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
