//! Between the wire and the engine's own types. Everything a peer says is checked here.

use engine::api::{Finish, Job, Limits, Phase, Sampling, Stop, Token};
use proto::v1;
use tonic::Status;

use crate::rpc::Context;

/// Most alternatives that may be asked for beside a token.
const MAX_TOP_LOGPROBS: u32 = 64;

/// A sequence as the engine takes it.
pub(crate) fn job(
    sequence: v1::Sequence,
    phase: Phase,
    context: &Context,
    limits: &Limits,
) -> Result<Job, Status> {
    let prompt_tokens = sequence.prompt_tokens as usize;
    let len = sequence.tokens.len();
    if prompt_tokens == 0 || prompt_tokens > len {
        let message = format!("prompt_tokens is {prompt_tokens} of {len} tokens");
        return Err(Status::invalid_argument(message));
    }
    tokens(&sequence.tokens, limits)?;
    let stop = sequence.stop.unwrap_or_default();
    if stop.max_tokens == 0 {
        return Err(Status::invalid_argument("stop.max_tokens is not set"));
    }
    Ok(Job {
        request: context.key.request.clone(),
        tokens: sequence.tokens,
        prompt_tokens,
        sampling: sampling(sequence.sampling.unwrap_or_default(), limits)?,
        stop: Stop {
            tokens: stop.token_ids,
            max_tokens: stop.max_tokens as usize,
            min_tokens: stop.min_tokens as usize,
        },
        prompt_logprobs: sequence.prompt_logprobs,
        cache_salt: sequence.cache_salt,
        deadline: context.deadline.into_std(),
        phase,
    })
}

/// Token ids that exist, and not too many.
pub(crate) fn tokens(tokens: &[u32], limits: &Limits) -> Result<(), Status> {
    if tokens.len() > limits.max_model_len {
        let (len, most) = (tokens.len(), limits.max_model_len);
        let message = format!("{len} tokens are more than the context length of {most}");
        return Err(Status::invalid_argument(message));
    }
    match tokens
        .iter()
        .find(|token| **token as usize >= limits.vocab_size)
    {
        Some(token) => Err(Status::invalid_argument(format!(
            "there is no token {token}"
        ))),
        None => Ok(()),
    }
}

fn sampling(sampling: v1::Sampling, limits: &Limits) -> Result<Sampling, Status> {
    let temperature = sampling.temperature.unwrap_or(0.0);
    let top_p = sampling.top_p.unwrap_or(1.0);
    let repetition_penalty = sampling.repetition_penalty.unwrap_or(1.0);
    let mut problems = Vec::new();
    let mut check = |name: &str, value: f32, right: bool| {
        if !right || !value.is_finite() {
            problems.push(format!("{name} is {value}"));
        }
    };
    check("temperature", temperature, temperature >= 0.0);
    check("top_p", top_p, top_p > 0.0 && top_p <= 1.0);
    check(
        "min_p",
        sampling.min_p,
        (0.0..=1.0).contains(&sampling.min_p),
    );
    check("presence_penalty", sampling.presence_penalty, true);
    check("frequency_penalty", sampling.frequency_penalty, true);
    check(
        "repetition_penalty",
        repetition_penalty,
        repetition_penalty > 0.0,
    );
    // In order of token: a map has none of its own.
    let mut logit_bias: Vec<(u32, f32)> = sampling.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    for (token, bias) in &logit_bias {
        check("logit_bias", *bias, (*token as usize) < limits.vocab_size);
    }
    if sampling
        .top_logprobs
        .is_some_and(|top| top > MAX_TOP_LOGPROBS)
    {
        problems.push(format!("top_logprobs is more than {MAX_TOP_LOGPROBS}"));
    }
    if !problems.is_empty() {
        return Err(Status::invalid_argument(problems.join(", ")));
    }
    Ok(Sampling {
        temperature,
        top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty,
        seed: sampling.seed,
        top_logprobs: sampling.top_logprobs,
        logit_bias,
    })
}

/// A token as it goes out.
pub(crate) fn token(token: Token) -> v1::Token {
    v1::Token {
        index: token.index as u32,
        token: token.token,
        logprob: token.logprob,
        top_logprobs: token
            .top
            .into_iter()
            .map(|(token, logprob)| v1::TokenLogprob { token, logprob })
            .collect(),
    }
}

/// Why a sequence ended, as it goes out. A hand-off is no end.
pub(crate) fn finish(finish: Finish) -> v1::FinishReason {
    match finish {
        Finish::Stop => v1::FinishReason::Stop,
        Finish::Length => v1::FinishReason::Length,
        Finish::HandOff => v1::FinishReason::Unspecified,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;
    use tonic::Code;

    use super::*;

    const LIMITS: Limits = Limits {
        max_model_len: 8,
        max_running: 1,
        max_waiting: 1,
        vocab_size: 100,
        kv_layers: 1,
        drafts: 0,
    };

    fn sequence() -> v1::Sequence {
        v1::Sequence {
            tokens: vec![1, 2, 3],
            prompt_tokens: 2,
            stop: Some(v1::Stop {
                max_tokens: 4,
                ..v1::Stop::default()
            }),
            ..v1::Sequence::default()
        }
    }

    fn convert(sequence: v1::Sequence) -> Result<Job, Status> {
        let context = Context {
            key: transfer::Key {
                request: "r".into(),
                attempt: 0,
            },
            deadline: Instant::now() + Duration::from_secs(1),
            headers: http::HeaderMap::new(),
        };
        job(sequence, Phase::Whole, &context, &LIMITS)
    }

    #[tokio::test]
    async fn unset_fields_are_neutral() {
        let job = convert(sequence()).unwrap();
        assert_eq!(
            (job.sampling.top_p, job.sampling.repetition_penalty),
            (1.0, 1.0)
        );
        assert_eq!(job.sampling.top_logprobs, None);
    }

    #[tokio::test]
    async fn what_makes_no_sense_is_refused_with_every_problem_named() {
        let with = |sampling| v1::Sequence {
            sampling: Some(sampling),
            ..sequence()
        };
        let bad = [
            v1::Sequence {
                tokens: vec![],
                ..sequence()
            },
            v1::Sequence {
                prompt_tokens: 0,
                ..sequence()
            },
            v1::Sequence {
                prompt_tokens: 4,
                ..sequence()
            },
            v1::Sequence {
                tokens: vec![1; 9],
                ..sequence()
            },
            v1::Sequence {
                tokens: vec![1, 100],
                ..sequence()
            },
            v1::Sequence {
                stop: None,
                ..sequence()
            },
            with(v1::Sampling {
                temperature: Some(f32::NAN),
                ..v1::Sampling::default()
            }),
            with(v1::Sampling {
                top_p: Some(0.0),
                ..v1::Sampling::default()
            }),
            with(v1::Sampling {
                top_logprobs: Some(65),
                ..v1::Sampling::default()
            }),
            with(v1::Sampling {
                logit_bias: [(100, 1.0)].into(),
                ..v1::Sampling::default()
            }),
        ];
        for sequence in bad {
            let shown = format!("{sequence:?}");
            assert_eq!(
                convert(sequence).unwrap_err().code(),
                Code::InvalidArgument,
                "{shown}"
            );
        }
        let two = v1::Sampling {
            temperature: Some(-1.0),
            min_p: 2.0,
            ..v1::Sampling::default()
        };
        let status = convert(with(two)).unwrap_err();
        assert_eq!(status.message(), "temperature is -1, min_p is 2");
    }
}
