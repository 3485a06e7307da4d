//! The flags of `hadal bench`.

use std::{path::PathBuf, time::Duration};

/// Put load on an OpenAI endpoint and report latencies and throughput
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// The server's address
    #[arg(
        long,
        env = "HADAL_URL",
        default_value = "http://127.0.0.1:8000",
        value_name = "URL"
    )]
    pub(super) url: String,
    /// The server's key
    #[arg(
        long,
        env = "HADAL_API_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    pub(super) api_key: Option<String>,
    /// Which model [default: the first that the server offers]
    #[arg(long, value_name = "NAME")]
    pub(super) model: Option<String>,

    /// Closed loop: this many requests at any time, the next as soon as one ends
    #[arg(long, default_value_t = 4, value_name = "N", conflicts_with_all = ["rate", "trace"])]
    pub(super) concurrency: usize,
    /// Open loop: requests a second at random (Poisson) times, whether or not earlier ones ended
    #[arg(long, value_name = "R", conflicts_with = "trace", value_parser = positive)]
    pub(super) rate: Option<f64>,
    /// Replay a recorded trace: Mooncake JSONL or Azure CSV
    #[arg(long, value_name = "FILE")]
    pub(super) trace: Option<PathBuf>,
    /// Replay this many times faster than recorded
    #[arg(long, default_value_t = 1.0, value_name = "X", requires = "trace", value_parser = positive)]
    pub(super) speed: f64,

    /// Requests at most [default: 100, or the whole trace]
    #[arg(long, value_name = "N")]
    pub(super) requests: Option<usize>,
    /// Seconds at most; what runs then is cut off and not counted
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    duration: u64,
    /// Seconds that one request may take
    #[arg(long, default_value_t = 120, value_name = "SECONDS")]
    timeout: u64,
    /// Requests before the measurement begins
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(super) warmup: usize,

    /// Mean prompt length in tokens (a trace brings its own)
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    pub(super) input_tokens: u64,
    /// Mean answer length in tokens (a trace brings its own)
    #[arg(long, default_value_t = 32, value_name = "TOKENS")]
    pub(super) output_tokens: u64,
    /// Lengths are drawn evenly from mean x (1 - spread) to mean x (1 + spread)
    #[arg(long, default_value_t = 0.0, value_name = "0..1", value_parser = fraction)]
    pub(super) spread: f64,
    /// Part of each prompt that all prompts share, to exercise the prefix cache
    #[arg(long, default_value_t = 0.0, value_name = "0..1", value_parser = fraction)]
    pub(super) shared_prefix: f64,
    /// Longest prompt and answer together; a trace is scaled to it [default: what the server says]
    #[arg(long, value_name = "TOKENS")]
    pub(super) max_len: Option<u64>,
    /// Token ids of prompts are drawn from this many, after the special ones
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) vocabulary: u32,
    /// Same seed, same load
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(super) seed: u64,

    /// Write the report and every request's figures here, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
    /// Instead of all that: start `hadal up --once` this many times and report the time to the first token
    #[arg(long, value_name = "RUNS", conflicts_with_all = ["rate", "trace", "concurrency"])]
    pub(super) cold_start: Option<u32>,
    /// Checkpoint for --cold-start [default: models/demo of the checkout]
    #[arg(long, value_name = "DIR", requires = "cold_start")]
    pub(super) checkpoint: Option<PathBuf>,
}

impl Args {
    pub(super) fn duration(&self) -> Duration {
        Duration::from_secs(self.duration)
    }

    pub(super) fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|&v: &f64| v.is_finite() && v > 0.0)
        .ok_or("not above 0".into())
}

fn fraction(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|v| (0.0..=1.0).contains(v))
        .ok_or("not between 0 and 1".into())
}
