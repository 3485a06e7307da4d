//! Choosing tokens, end to end.

use engine::{
    Options,
    api::{Event, Finish, Sampling},
};
use testkit::toy::ToyConfig;

use crate::rig::{Rig, greedy, job, prompt, seeded};

#[test]
fn a_seed_gives_the_same_tokens_on_every_engine_and_from_every_point() {
    let make = |tokens: Vec<u32>, prompt_tokens| {
        let mut job = job(tokens, 40);
        job.prompt_tokens = prompt_tokens;
        job.sampling = Sampling {
            top_p: 0.95,
            top_k: 40,
            ..seeded(77)
        };
        job
    };
    let mut rig = Rig::with_blocks(64);
    let whole = rig.run(make(prompt(1, 70), 70)).ids();
    assert_eq!(whole.len(), 40);
    // Replayed on another engine, among others, after 1, 13 and 39 tokens.
    for known in [1, 13, 39] {
        let mut other = Rig::with_blocks(64);
        let mut tokens = prompt(1, 70);
        tokens.extend(&whole[..known]);
        let mut stories = [
            other.submit(job(prompt(8, 33), 17)),
            other.submit(make(tokens, 70)),
        ];
        other.finish(&mut stories);
        assert_eq!(stories[1].ids_from(known), whole[known..]);
    }
    let other_seed = {
        let mut job = make(prompt(1, 70), 70);
        job.sampling.seed = 78;
        rig.run(job).ids()
    };
    assert_ne!(other_seed, whole);
}

#[test]
fn log_probabilities_are_those_of_the_networks_own_logits() {
    let config = ToyConfig::default();
    let tokens = prompt(4, 100);
    let mut job = job(tokens.clone(), 3);
    job.prompt_logprobs = true;
    job.sampling = Sampling {
        top_logprobs: Some(2),
        temperature: 0.7,
        presence_penalty: 1.0,
        ..seeded(5)
    };
    // Chunks end in the middle of the prompt.
    let options = Options {
        chunk_tokens: 30,
        ..Options::default()
    };
    let mut rig = Rig::new(config.clone(), options);
    let story = rig.run(job);
    let prompt_logprobs = story.events.iter().find_map(|event| match event {
        Event::PromptLogprobs(logprobs) => Some(logprobs),
        _ => None,
    });
    let prompt_logprobs = prompt_logprobs.unwrap();
    assert_eq!(prompt_logprobs.len(), 99);
    let mut sequence = tokens.clone();
    sequence.extend(story.ids());
    let reported = prompt_logprobs.iter().map(|t| (t.index, t));
    let chosen = story.tokens();
    let chosen = chosen.iter().map(|t| (t.index + tokens.len(), t));
    for (position, token) in reported.chain(chosen) {
        assert_eq!(token.token, sequence[position]);
        let logits = config.logits_after(&sequence[..position]);
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let direct = f64::from(logits[token.token as usize]) - sum.ln();
        assert!((f64::from(token.logprob.unwrap()) - direct).abs() < 1e-4);
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        assert!((f64::from(token.top[0].1) - (f64::from(best) - sum.ln())).abs() < 1e-4);
        assert_eq!(token.top.len(), 2);
    }
    rig.rest();
}

#[test]
fn stop_tokens_end_a_sequence_after_min_tokens() {
    let config = ToyConfig::default();
    let tokens = prompt(2, 40);
    let said = config.greedy(&tokens, 20);
    let mut rig = Rig::with_blocks(16);
    let mut stopped = job(tokens.clone(), 20);
    stopped.stop.tokens = vec![said[6]];
    let story = rig.run(stopped);
    assert_eq!(story.ids(), said[..7], "the stop token is told");
    assert_eq!(story.finish(), Some(Finish::Stop));
    let mut held = job(tokens, 20);
    held.stop.tokens = vec![said[6]];
    held.stop.min_tokens = 10;
    let story = rig.run(held);
    assert!(!story.ids()[..10].contains(&said[6]));
    assert!(story.ids().len() > 10);
    rig.rest();
}

#[test]
fn presence_penalty_and_bias_show_in_the_tokens() {
    let mut rig = Rig::with_blocks(16);
    let mut never_again = job(prompt(2, 10), 100);
    never_again.sampling.presence_penalty = 100.0;
    let mut ids = rig.run(never_again).ids();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 100, "no token came twice");
    let mut only = job(prompt(2, 10), 5);
    only.sampling.logit_bias = vec![(42, 100.0)];
    assert_eq!(rig.run(only).ids(), [42; 5]);
}

#[test]
fn no_tokens_wanted_gives_the_prompts_log_probabilities_alone() {
    let mut rig = Rig::with_blocks(16);
    let mut job = job(prompt(2, 70), 0);
    job.prompt_logprobs = true;
    job.sampling = greedy();
    let story = rig.run(job);
    assert_eq!(story.finish(), Some(Finish::Length));
    assert!(story.ids().is_empty());
    let logprobs = |e: &Event| matches!(e, Event::PromptLogprobs(l) if l.len() == 69);
    assert!(story.events.iter().any(logprobs));
    rig.rest();
}

#[test]
fn the_context_length_ends_a_sequence() {
    let config = ToyConfig {
        max_model_len: 50,
        ..ToyConfig::default()
    };
    let mut rig = Rig::new(config.clone(), Options::default());
    let story = rig.run(job(prompt(2, 40), 100));
    assert_eq!(story.ids(), config.greedy(&prompt(2, 40), 10));
    assert_eq!(story.finish(), Some(Finish::Length));
}
