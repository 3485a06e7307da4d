//! From a row of logits to a token. Pure: the same row, settings, history and index give the same token.
//!
//! Order: bias, stop tokens held back, penalties, temperature, min-p, top-k, top-p, draw. Greedy stops after the
//! penalties. Everything after the temperature works on weights relative to the best token's, in float64, so that
//! no sum depends on how many tokens were dropped before.

mod logprobs;
mod philox;

use std::collections::{BTreeMap, BTreeSet};

use logprobs::{LogSoftmax, best_first};

use crate::api::{Sampling, Stop, Token};

/// What a sequence has seen, for penalties.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    prompt: BTreeSet<u32>,
    output: BTreeMap<u32, u32>,
}

impl History {
    /// The history of a sequence whose first `prompt_tokens` tokens are the prompt, as far as `sampling` needs it.
    pub(crate) fn new(tokens: &[u32], prompt_tokens: usize, sampling: &Sampling) -> Self {
        let (prompt, output) = tokens.split_at(prompt_tokens);
        let mut history = Self::default();
        if penalises_repetition(sampling) {
            history.prompt.extend(prompt);
        }
        for &token in output {
            history.push(token);
        }
        history
    }

    /// One token more was produced.
    pub(crate) fn push(&mut self, token: u32) {
        *self.output.entry(token).or_default() += 1;
    }
}

/// Logits that are no distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadLogits {
    /// Some are NaN or +inf.
    #[error("logits are not numbers")]
    NotANumber,
    /// No token is possible.
    #[error("no token is possible")]
    Empty,
}

/// Chooses tokens; holds scratch memory only.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    adjusted: Vec<f32>,
    /// (weight, token)
    candidates: Vec<(f64, u32)>,
}

impl Sampler {
    /// Chooses token `index` (counted from the end of the prompt) of a sequence from its row of logits.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        stop: &Stop,
        history: &History,
        index: usize,
    ) -> Result<Token, BadLogits> {
        check(logits)?;
        self.adjusted.clear();
        self.adjusted.extend_from_slice(logits);
        adjust(&mut self.adjusted, sampling, stop, history, index);
        let token = if sampling.temperature == 0.0 {
            argmax(&self.adjusted)
        } else {
            self.draw(sampling, index)
        };
        let token = token.ok_or(BadLogits::Empty)?;
        Ok(report(logits, token, index, sampling.top_logprobs))
    }

    /// Draws from the adjusted logits.
    fn draw(&mut self, sampling: &Sampling, index: usize) -> Option<u32> {
        let best = argmax(&self.adjusted)?;
        let max = self.adjusted[best as usize];
        let temperature = f64::from(sampling.temperature);
        let least = f64::from(sampling.min_p);
        self.candidates.clear();
        let weights = self.adjusted.iter().zip(0u32..).map(|(&x, token)| {
            let weight = (f64::from(x - max) / temperature).exp();
            (weight, token)
        });
        self.candidates
            .extend(weights.filter(|&(weight, _)| weight > 0.0 && weight >= least));

        let top_k = sampling.top_k as usize;
        if top_k > 0 && top_k < self.candidates.len() {
            self.sort_best(0, top_k);
            self.candidates.truncate(top_k);
        }
        if sampling.top_p < 1.0 {
            self.keep_top_p(f64::from(sampling.top_p));
        }
        let total: f64 = self.candidates.iter().map(|c| c.0).sum();
        let mut left = philox::uniform(sampling.seed, index as u64) * total;
        for &(weight, token) in &self.candidates {
            left -= weight;
            if left < 0.0 {
                return Some(token);
            }
        }
        // Only rounding comes here: the draw was all but the whole sum.
        self.candidates.last().map(|c| c.1)
    }

    /// Keeps the smallest set of best candidates with at least `top_p` of the weight.
    fn keep_top_p(&mut self, top_p: f64) {
        let total: f64 = self.candidates.iter().map(|c| c.0).sum();
        let mut kept = 0.0;
        let mut sorted = 0;
        for i in 0..self.candidates.len() {
            if i == sorted {
                // A few candidates carry nearly all of the weight: sorting all of a vocabulary would be waste.
                sorted = (sorted * 4).max(64).min(self.candidates.len());
                self.sort_best(i, sorted);
            }
            kept += self.candidates[i].0;
            if kept >= top_p * total {
                self.candidates.truncate(i + 1);
                return;
            }
        }
    }

    /// Brings the best candidates of `first..` into order at `first..end`.
    fn sort_best(&mut self, first: usize, end: usize) {
        let logits = &self.adjusted;
        let best = |a: &(f64, u32), b: &(f64, u32)| best_first(logits, a.1, b.1);
        if end < self.candidates.len() {
            self.candidates[first..].select_nth_unstable_by(end - first - 1, best);
        }
        self.candidates[first..end].sort_unstable_by(best);
    }
}

/// The token with what is to be told about it. `logits` are the model's own.
pub(crate) fn report(logits: &[f32], token: u32, index: usize, top: Option<u32>) -> Token {
    let softmax = top.map(|_| LogSoftmax::new(logits));
    Token {
        index,
        token,
        logprob: softmax.map(|softmax| softmax.of(logits[token as usize])),
        top: match (softmax, top) {
            (Some(softmax), Some(n)) => softmax.top(logits, n as usize),
            _ => Vec::new(),
        },
    }
}

/// Fails on logits that no softmax can take.
pub(crate) fn check(logits: &[f32]) -> Result<(), BadLogits> {
    // NaN and +inf are exactly what is not below infinity.
    let numbers = logits.iter().all(|&x| x < f32::INFINITY);
    if numbers {
        Ok(())
    } else {
        Err(BadLogits::NotANumber)
    }
}

/// The most likely token, the first of equals; `None` if none is possible.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = (f32::NEG_INFINITY, None);
    for (&x, token) in logits.iter().zip(0u32..) {
        if x > best.0 {
            best = (x, Some(token));
        }
    }
    best.1
}

#[expect(clippy::float_cmp, reason = "exactly 1 switches it off")]
fn penalises_repetition(sampling: &Sampling) -> bool {
    sampling.repetition_penalty != 1.0
}

fn adjust(logits: &mut [f32], sampling: &Sampling, stop: &Stop, history: &History, index: usize) {
    for &(token, bias) in &sampling.logit_bias {
        if let Some(x) = logits.get_mut(token as usize) {
            *x += bias;
        }
    }
    if index < stop.min_tokens {
        for &token in &stop.tokens {
            if let Some(x) = logits.get_mut(token as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
    if penalises_repetition(sampling) {
        let mut penalise = |token: u32| {
            let x = &mut logits[token as usize];
            *x = if *x > 0.0 {
                *x / sampling.repetition_penalty
            } else {
                *x * sampling.repetition_penalty
            };
        };
        let generated = history.output.keys();
        history.prompt.iter().copied().for_each(&mut penalise);
        generated
            .copied()
            .filter(|token| !history.prompt.contains(token))
            .for_each(penalise);
    }
    if sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        for (&token, &count) in &history.output {
            logits[token as usize] -=
                sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        }
    }
    // Settings can be absurd without being wrong; what comes of them must still be a distribution.
    for x in logits {
        *x = x.min(f32::MAX);
    }
}

#[cfg(test)]
mod tests;
