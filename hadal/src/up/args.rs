//! The flags of `hadal up`, as they were typed.

use std::{net::SocketAddr, path::PathBuf};

use clap::ValueEnum;
use kernels::Precision;

/// What is asked when nobody says otherwise. The demo checkpoint knows it.
const FIRST_QUESTION: &str = "What is 17 + 25?";

/// Run a whole deployment on this machine: prefill workers, decode workers and a router
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint directory [default: models/demo of the checkout]
    #[arg(long, env = "HADAL_MODEL", value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// Where the OpenAI API listens; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR")]
    pub(super) http: SocketAddr,
    /// Where the gRPC API listens; port 0 takes any free one
    #[arg(long, default_value = "127.0.0.1:8001", value_name = "ADDR")]
    pub(super) grpc: SocketAddr,
    /// Prefill workers [default: 1; none with `--mode combined`]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) prefill: Option<u16>,
    /// Decode workers (with `--mode combined`: workers that do both)
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) decode: u16,
    /// The model's name in the API [default: the checkpoint directory's name]
    #[arg(long, value_name = "NAME")]
    pub(super) served_name: Option<String>,
    /// Longest prompt and answer together, in tokens [default: what the checkpoint allows]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_model_len: Option<u32>,
    /// Requests must carry this key
    #[arg(
        long,
        env = "HADAL_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub(super) api_key: Option<String>,
    /// How the network computes: f32, bf16, w8a8 or w8 [default: what the checkpoint is meant for]
    #[arg(long, value_name = "P")]
    pub(super) precision: Option<Precision>,
    /// Prompt processing and generation in pools of their own, or in one
    #[arg(long, value_enum, default_value = "disaggregated", value_name = "MODE")]
    pub(super) mode: Mode,
    /// Threads of each worker [default: every worker decides for itself]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) threads: Option<u16>,
    /// Ask this, print the answer and exit
    #[arg(long, value_name = "QUESTION", conflicts_with_all = ["ask", "no_ask"])]
    pub(super) once: Option<String>,
    /// The first question
    #[arg(long, default_value = FIRST_QUESTION, value_name = "QUESTION")]
    ask: String,
    /// Ask nothing, only serve
    #[arg(long, conflicts_with = "ask")]
    no_ask: bool,
    /// Print only the answer and what goes wrong
    #[arg(long)]
    pub(super) quiet: bool,
    /// Keep the processes' logs here [default: a temporary directory, removed at the end]
    #[arg(long, value_name = "DIR")]
    pub(super) logs: Option<PathBuf>,
}

impl Args {
    /// Prefill workers, where they are a pool of their own.
    pub(super) fn prefill(&self) -> u16 {
        self.prefill.unwrap_or(1)
    }

    /// The question to begin with, if any.
    pub(super) fn question(&self) -> Option<String> {
        if self.no_ask {
            None
        } else {
            Some(self.once.as_ref().unwrap_or(&self.ask).clone())
        }
    }
}

/// Which pools there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Prompt processing and generation in pools of their own.
    Disaggregated,
    /// One pool whose workers do both.
    Combined,
}

impl Mode {
    /// The flag's value.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Disaggregated => "disaggregated",
            Self::Combined => "combined",
        }
    }
}
