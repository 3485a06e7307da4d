//! What an engine takes and what it can never run. Checked before anything is queued.

use kv::{BLOCK_TOKENS, blocks_for};

use crate::api::{Job, Limits, Phase, Refused, Sampling};

/// Checks a job against the limits of an engine with `total_blocks` blocks.
///
/// # Errors
/// [`Refused::Invalid`], saying what is wrong.
pub fn validate(job: &Job, limits: &Limits, total_blocks: usize) -> Result<(), Refused> {
    tokens(job, limits, total_blocks)
        .and_then(|()| sampling(&job.sampling, limits))
        .map_err(Refused::Invalid)
}

fn tokens(job: &Job, limits: &Limits, total_blocks: usize) -> Result<(), String> {
    let len = job.tokens.len();
    if job.prompt_tokens == 0 || job.prompt_tokens > len {
        return Err(format!(
            "a sequence of {len} tokens can not have a prompt of {}",
            job.prompt_tokens
        ));
    }
    if let Some(token) = job
        .tokens
        .iter()
        .find(|&&t| t as usize >= limits.vocab_size)
    {
        return Err(format!(
            "token {token} is outside the vocabulary of {}",
            limits.vocab_size
        ));
    }
    let generated = len - job.prompt_tokens;
    let nothing_wanted = job.stop.max_tokens == 0 && generated == 0;
    if generated >= job.stop.max_tokens && !nothing_wanted {
        return Err(format!(
            "{generated} tokens exist already, {} are wanted",
            job.stop.max_tokens
        ));
    }
    if len + usize::from(!nothing_wanted) > limits.max_model_len {
        return Err(format!(
            "{len} tokens leave no room for an answer: prompt and output together have at most {}",
            limits.max_model_len
        ));
    }
    let blocks = blocks_for(len);
    if blocks > total_blocks {
        return Err(format!(
            "{len} tokens need {blocks} KV blocks, {total_blocks} exist"
        ));
    }
    match &job.phase {
        Phase::Decode(_) if len < 2 => Err("nothing of one token can be computed elsewhere".into()),
        Phase::Decode(_) if job.prompt_logprobs => {
            Err("log probabilities of the prompt come from prefill".into())
        }
        Phase::Decode(held) if held.ids().len() * BLOCK_TOKENS < len - 1 => Err(format!(
            "{} blocks can not hold the KV of {} tokens",
            held.ids().len(),
            len - 1
        )),
        Phase::Decode(_) | Phase::Prefill | Phase::Whole => Ok(()),
    }
}

fn sampling(sampling: &Sampling, limits: &Limits) -> Result<(), String> {
    let Sampling {
        temperature,
        top_p,
        top_k: _,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        seed: _,
        top_logprobs: _,
        logit_bias,
    } = sampling;
    let finite = f32::MIN..=f32::MAX;
    let ranges = [
        ("temperature", *temperature, 0.0..=f32::MAX),
        ("top_p", *top_p, f32::MIN_POSITIVE..=1.0),
        ("min_p", *min_p, 0.0..=1.0),
        ("presence_penalty", *presence_penalty, finite.clone()),
        ("frequency_penalty", *frequency_penalty, finite.clone()),
        (
            "repetition_penalty",
            *repetition_penalty,
            f32::MIN_POSITIVE..=f32::MAX,
        ),
    ];
    if let Some((name, value, range)) = ranges.iter().find(|(_, v, range)| !range.contains(v)) {
        return Err(format!(
            "{name} is {value}, must be from {:e} to {:e}",
            range.start(),
            range.end()
        ));
    }
    let bad = logit_bias
        .iter()
        .find(|(token, bias)| *token as usize >= limits.vocab_size || !finite.contains(bias));
    match bad {
        Some((token, bias)) => Err(format!("logit_bias of token {token} can not be {bias}")),
        None => Ok(()),
    }
}
