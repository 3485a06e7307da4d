//! Percentiles and rates of a run, for people and as JSON.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde_json::{Value, json};

use super::{
    load::Load,
    record::{Run, Timing},
};
use crate::format;

/// The figures of a run.
#[derive(Clone, Debug)]
pub(super) struct Report {
    load: String,
    model: String,
    wall: Duration,
    completed: usize,
    cut_off: usize,
    failures: BTreeMap<String, usize>,
    input_tokens: u64,
    output_tokens: u64,
    latencies: Vec<(&'static str, Distribution)>,
}

/// Mean and percentiles of a set of durations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Distribution {
    count: usize,
    mean: Duration,
    p50: Duration,
    p90: Duration,
    p99: Duration,
    max: Duration,
}

impl Distribution {
    fn of(mut values: Vec<Duration>) -> Self {
        values.sort_unstable();
        let Some(&max) = values.last() else {
            return Self::default();
        };
        Self {
            count: values.len(),
            mean: values.iter().sum::<Duration>() / u32::try_from(values.len()).unwrap_or(u32::MAX),
            p50: nearest_rank(&values, 0.50),
            p90: nearest_rank(&values, 0.90),
            p99: nearest_rank(&values, 0.99),
            max,
        }
    }

    fn to_json(self) -> Value {
        json!({
            "count": self.count,
            "mean_s": self.mean.as_secs_f64(),
            "p50_s": self.p50.as_secs_f64(),
            "p90_s": self.p90.as_secs_f64(),
            "p99_s": self.p99.as_secs_f64(),
            "max_s": self.max.as_secs_f64(),
        })
    }
}

/// The smallest value that at least this part of the (sorted) values does not exceed.
fn nearest_rank(sorted: &[Duration], part: f64) -> Duration {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

impl Report {
    pub(super) fn new(load: &Load, model: &str, run: &Run) -> Self {
        let mut failures = BTreeMap::new();
        let mut timings: Vec<&Timing> = Vec::new();
        let mut input_tokens = 0;
        for record in &run.records {
            match &record.outcome {
                Ok(timing) => {
                    timings.push(timing);
                    input_tokens += record.input_tokens;
                }
                Err(why) => *failures.entry(why.clone()).or_default() += 1,
            }
        }
        let of = |pick: &dyn Fn(&Timing) -> Vec<Duration>| {
            Distribution::of(timings.iter().flat_map(|timing| pick(timing)).collect())
        };
        Self {
            load: load.describe(),
            model: model.to_owned(),
            wall: run.wall,
            completed: timings.len(),
            cut_off: run.cut_off,
            failures,
            input_tokens,
            output_tokens: timings.iter().map(|timing| timing.output_tokens).sum(),
            latencies: vec![
                (
                    "time_to_first_token",
                    of(&|timing| vec![timing.first_token]),
                ),
                ("inter_token_latency", of(&|timing| timing.gaps.clone())),
                (
                    "time_per_output_token",
                    of(&|timing| timing.per_token().into_iter().collect()),
                ),
                ("end_to_end", of(&|timing| vec![timing.total])),
            ],
        }
    }

    fn rate(&self, count: f64) -> f64 {
        if self.wall.is_zero() {
            0.0
        } else {
            count / self.wall.as_secs_f64()
        }
    }

    /// The report with every request's figures.
    pub(super) fn to_json(&self, run: &Run) -> Value {
        let latencies: serde_json::Map<String, Value> = self
            .latencies
            .iter()
            .map(|(name, distribution)| ((*name).to_owned(), distribution.to_json()))
            .collect();
        let requests: Vec<Value> = run
            .records
            .iter()
            .map(|record| match &record.outcome {
                Ok(timing) => json!({
                    "due_s": record.due.as_secs_f64(),
                    "input_tokens": record.input_tokens,
                    "output_tokens": timing.output_tokens,
                    "first_token_s": timing.first_token.as_secs_f64(),
                    "total_s": timing.total.as_secs_f64(),
                }),
                Err(why) => json!({
                    "due_s": record.due.as_secs_f64(),
                    "input_tokens": record.input_tokens,
                    "error": why,
                }),
            })
            .collect();
        json!({
            "load": self.load,
            "model": self.model,
            "wall_s": self.wall.as_secs_f64(),
            "completed": self.completed,
            "failed": self.failures,
            "cut_off": self.cut_off,
            "requests_per_s": self.rate(self.completed as f64),
            "input_tokens_per_s": self.rate(self.input_tokens as f64),
            "output_tokens_per_s": self.rate(self.output_tokens as f64),
            "latencies": latencies,
            "requests": requests,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.model, self.load)?;
        write!(
            f,
            "{} completed in {}",
            self.completed,
            format::duration(self.wall)
        )?;
        for (why, count) in &self.failures {
            write!(f, ", {count} {why}")?;
        }
        if self.cut_off > 0 {
            write!(f, ", {} cut off", self.cut_off)?;
        }
        writeln!(
            f,
            "\n{:.2} requests/s, {:.1} tokens/s in, {:.1} tokens/s out",
            self.rate(self.completed as f64),
            self.rate(self.input_tokens as f64),
            self.rate(self.output_tokens as f64),
        )?;
        write!(f, "{:24}", "")?;
        for column in ["mean", "p50", "p90", "p99", "max"] {
            write!(f, "{column:>10}")?;
        }
        for (name, distribution) in &self.latencies {
            write!(f, "\n{:24}", name.replace('_', " "))?;
            let Distribution {
                count: _,
                mean,
                p50,
                p90,
                p99,
                max,
            } = *distribution;
            for value in [mean, p50, p90, p99, max] {
                write!(f, "{:>10}", format::duration(value))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let ms = |value| Duration::from_millis(value);
        let distribution = Distribution::of((1..=200).rev().map(ms).collect());
        assert_eq!(
            distribution,
            Distribution {
                count: 200,
                mean: Duration::from_micros(100_500),
                p50: ms(100),
                p90: ms(180),
                p99: ms(198),
                max: ms(200),
            }
        );
        assert_eq!(Distribution::of(vec![ms(7)]).p50, ms(7));
        assert_eq!(Distribution::of(Vec::new()), Distribution::default());
    }
}
