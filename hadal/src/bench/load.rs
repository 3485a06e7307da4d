//! What is sent and when: a closed loop, Poisson arrivals, or a trace. Pure: the same flags give the same requests.

use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

use super::{
    args::Args,
    prompts::Prompts,
    trace_file::{self, Entry, MOONCAKE_BLOCK_TOKENS},
};

/// Requests of a load that has no trace, where nobody says how many.
const DEFAULT_REQUESTS: usize = 100;

/// One request to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) prompt: Vec<u32>,
    pub(super) output_tokens: u64,
}

/// When requests start.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Arrivals {
    /// As soon as one of this many places is free.
    Closed(usize),
    /// At these times after the start.
    At(Arc<[Duration]>),
}

/// Lengths and contents of the requests.
#[derive(Clone, Debug)]
enum Source {
    Drawn {
        input: u64,
        output: u64,
        spread: f64,
        shared_prefix: f64,
    },
    Trace {
        entries: Arc<[Entry]>,
        scale: f64,
    },
}

/// A whole load.
#[derive(Clone, Debug)]
pub(super) struct Load {
    pub(super) arrivals: Arrivals,
    pub(super) requests: usize,
    source: Source,
    prompts: Prompts,
    max_len: u64,
}

impl Load {
    /// Reads the trace, if any, and checks that the requests fit into `max_len` tokens.
    pub(super) fn new(args: &Args, max_len: u64) -> anyhow::Result<Self> {
        ensure!(
            max_len >= 2,
            "a context of {max_len} tokens has no room for prompt and answer"
        );
        let prompts = Prompts {
            vocabulary: args.vocabulary,
            seed: args.seed,
        };
        if let Some(path) = &args.trace {
            let entries = trace_file::read(path, args.requests.unwrap_or(usize::MAX))?;
            let times = entries
                .iter()
                .map(|entry| entry.at.div_f64(args.speed))
                .collect();
            return Ok(Self {
                arrivals: Arrivals::At(times),
                requests: entries.len(),
                source: Source::Trace {
                    scale: scale(&entries, max_len),
                    entries: entries.into(),
                },
                prompts,
                max_len,
            });
        }
        let requests = args.requests.unwrap_or(DEFAULT_REQUESTS);
        let longest =
            ((args.input_tokens + args.output_tokens) as f64 * (1.0 + args.spread)).ceil();
        ensure!(
            longest as u64 <= max_len,
            "prompts of {} and answers of {} tokens do not fit into {max_len}; \
             choose smaller --input-tokens, --output-tokens or --spread",
            args.input_tokens,
            args.output_tokens,
        );
        ensure!(
            args.concurrency > 0,
            "--concurrency 0 would never send anything"
        );
        let arrivals = match args.rate {
            Some(rate) => Arrivals::At(poisson(rate, requests, args.seed)),
            None => Arrivals::Closed(args.concurrency),
        };
        let source = Source::Drawn {
            input: args.input_tokens,
            output: args.output_tokens,
            spread: args.spread,
            shared_prefix: args.shared_prefix,
        };
        Ok(Self {
            arrivals,
            requests,
            source,
            prompts,
            max_len,
        })
    }

    /// A load of equal requests.
    #[cfg(test)]
    pub(super) fn drawn(
        arrivals: Arrivals,
        requests: usize,
        (input, output): (u64, u64),
        prompts: Prompts,
    ) -> Self {
        let source = Source::Drawn {
            input,
            output,
            spread: 0.0,
            shared_prefix: 0.0,
        };
        Self {
            arrivals,
            requests,
            source,
            prompts,
            max_len: u64::MAX,
        }
    }

    /// Request `index` of the load.
    pub(super) fn job(&self, index: usize) -> Job {
        match &self.source {
            Source::Drawn {
                input,
                output,
                spread,
                shared_prefix,
            } => {
                let mut random = SmallRng::seed_from_u64(self.prompts.seed ^ !(index as u64));
                let mut length = |mean: u64| {
                    let factor = 1.0 + spread * (2.0 * random.random::<f64>() - 1.0);
                    ((mean as f64 * factor).round() as u64).max(1)
                };
                let (input, output) = (length(*input), length(*output));
                let shared = (input as f64 * shared_prefix) as u64;
                let prompt = self.prompts.with_prefix(index as u64, input, shared);
                Job {
                    prompt,
                    output_tokens: output,
                }
            }
            Source::Trace { entries, scale } => {
                let entry = &entries[index];
                let scaled = |tokens: u64| ((tokens as f64 * scale).round() as u64).max(1);
                let input = scaled(entry.input_tokens).min(self.max_len - 1);
                let output = scaled(entry.output_tokens).min(self.max_len - input);
                let prompt = if entry.blocks.is_empty() {
                    self.prompts.with_prefix(index as u64, input, 0)
                } else {
                    self.prompts.cut_from_blocks(
                        &entry.blocks,
                        scaled(MOONCAKE_BLOCK_TOKENS),
                        input,
                    )
                };
                Job {
                    prompt,
                    output_tokens: output,
                }
            }
        }
    }

    /// One line for people and for the report.
    pub(super) fn describe(&self) -> String {
        let when = match &self.arrivals {
            Arrivals::Closed(places) => format!("closed loop of {places}"),
            Arrivals::At(times) => {
                let span = times.last().copied().unwrap_or_default().as_secs_f64();
                if span > 0.0 {
                    let rate = times.len() as f64 / span;
                    format!("open loop of {rate:.1} requests/s over {span:.1} s")
                } else {
                    "all at once".into()
                }
            }
        };
        let what = match &self.source {
            Source::Drawn {
                input,
                output,
                spread,
                ..
            } => {
                format!("{input} tokens in, {output} out, spread {spread}")
            }
            Source::Trace { scale, .. } => format!("recorded lengths x {scale:.4}"),
        };
        format!("{} requests, {when}, {what}", self.requests)
    }
}

/// The factor that makes the longest request of a trace fit. Never above 1: a trace is not made heavier than it was.
fn scale(entries: &[Entry], max_len: u64) -> f64 {
    let longest = entries
        .iter()
        .map(|entry| entry.input_tokens + entry.output_tokens)
        .max();
    (max_len as f64 / longest.unwrap_or(1).max(1) as f64).min(1.0)
}

/// Times of `requests` arrivals at `rate` a second with exponential gaps.
fn poisson(rate: f64, requests: usize, seed: u64) -> Arc<[Duration]> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut now = 0.0;
    (0..requests)
        .map(|_| {
            // 1 - u is in (0, 1], whose logarithm is finite.
            now -= (1.0 - random.random::<f64>()).ln() / rate;
            Duration::from_secs_f64(now)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(source: Source, requests: usize, max_len: u64) -> Load {
        let prompts = Prompts {
            vocabulary: 100,
            seed: 3,
        };
        Load {
            arrivals: Arrivals::Closed(1),
            requests,
            source,
            prompts,
            max_len,
        }
    }

    #[test]
    fn a_description_says_when_requests_come() {
        let source = Source::Drawn {
            input: 8,
            output: 2,
            spread: 0.0,
            shared_prefix: 0.0,
        };
        let mut load = load(source, 4, 100);
        let mut described = |times: [u64; 4]| {
            load.arrivals = Arrivals::At(times.map(Duration::from_secs).into());
            load.describe()
        };
        assert!(described([0, 1, 1, 2]).contains("open loop of 2.0 requests/s over 2.0 s"));
        assert!(described([0; 4]).contains("all at once"));
    }

    #[test]
    fn poisson_arrivals_keep_their_rate() {
        let times = poisson(50.0, 10_000, 1);
        assert!(times.windows(2).all(|pair| pair[0] <= pair[1]));
        let rate = 10_000.0 / times.last().unwrap().as_secs_f64();
        assert!((rate - 50.0).abs() < 2.0, "{rate}");
    }

    #[test]
    fn drawn_lengths_stay_within_their_spread() {
        let source = Source::Drawn {
            input: 100,
            output: 10,
            spread: 0.5,
            shared_prefix: 0.0,
        };
        let load = load(source, 200, 1000);
        let lengths: Vec<usize> = (0..200).map(|index| load.job(index).prompt.len()).collect();
        assert!(lengths.iter().all(|length| (50..=150).contains(length)));
        assert!(lengths.iter().min() < Some(&70) && lengths.iter().max() > Some(&130));
        assert_eq!(load.job(5), load.job(5));
    }

    #[test]
    fn a_trace_is_scaled_so_that_every_request_fits() {
        let entry = |input_tokens, output_tokens| Entry {
            at: Duration::ZERO,
            input_tokens,
            output_tokens,
            blocks: vec![1, 2],
        };
        let entries = [entry(126_000, 2_000), entry(600, 40), entry(1, 1)];
        let source = Source::Trace {
            scale: scale(&entries, 4096),
            entries: entries.into(),
        };
        let load = load(source, 3, 4096);
        for index in 0..3 {
            let job = load.job(index);
            assert!(!job.prompt.is_empty() && job.output_tokens > 0);
            assert!(job.prompt.len() as u64 + job.output_tokens <= 4096);
        }
        assert_eq!(load.job(1).prompt.len(), 19, "600 x 4096 / 128000");
    }
}
