//! The answers that an undisturbed engine gives.

use std::{future::Future, time::Duration};

use engine::{
    Options,
    api::{Engine, Event, Job, Phase, Sampling, Stop},
};

use super::plan::Ask;
use testkit::{scripted::Scripted, toy::ToyConfig};

/// What one engine, alone and undisturbed, answers to each of `asks`.
///
/// # Panics
/// If the engine does not answer: the test is wrong then.
pub(super) fn answers(config: &ToyConfig, asks: &[Ask]) -> Vec<Vec<u32>> {
    let config = ToyConfig {
        blocks: 96,
        ..config.clone()
    };
    simulated(async {
        let scripted = Scripted::new(
            &config,
            Options::default(),
            Duration::from_micros(10),
            false,
        );
        tokio::spawn(scripted.stepper.run());
        let mut answers = Vec::new();
        for ask in asks {
            answers.push(answer(&*scripted.engine, ask).await);
        }
        answers
    })
}

fn simulated<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.expect("a runtime without I/O").block_on(work)
}

async fn answer(engine: &dyn Engine, ask: &Ask) -> Vec<u32> {
    let sampling = Sampling {
        temperature: ask.temperature,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: ask.seed,
        top_logprobs: None,
        logit_bias: Vec::new(),
    };
    let job = Job {
        request: "oracle".into(),
        tokens: ask.prompt.clone(),
        prompt_tokens: ask.prompt.len(),
        sampling,
        stop: Stop {
            max_tokens: ask.count,
            ..Stop::default()
        },
        prompt_logprobs: false,
        cache_salt: Vec::new(),
        deadline: (tokio::time::Instant::now() + Duration::from_secs(3600)).into_std(),
        phase: Phase::Whole,
    };
    let mut running = engine.submit(job).expect("an idle engine takes it");
    let mut tokens = Vec::new();
    loop {
        match running
            .events
            .recv()
            .await
            .expect("an event before the end")
        {
            Event::Token(token) => tokens.push(token.token),
            Event::Finished(_) => return tokens,
            Event::Failed(error) => unreachable!("nothing disturbs it: {error}"),
            _ => {}
        }
    }
}
