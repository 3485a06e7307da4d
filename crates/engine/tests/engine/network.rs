//! The engine over the real network, on a small random checkpoint: bits may not depend on anything but the sequence.

use std::{path::Path, sync::Arc};

use engine::{
    Options,
    api::{Engine, Finish, Job, Phase, Sampling},
    network::NetworkRunner,
};
use kernels::{Cpu, Precision};
use model::{Checkpoint, Form, Limits, Network, Sequence};

use crate::{
    phases::transfer,
    rig::{Rig, Story, job, seeded},
};

type RealRig = Rig<NetworkRunner<Cpu>>;

/// `form` is that of prompts.
fn limits(form: Form) -> Limits {
    let max_expanded_context = match form {
        Form::Expanded => 512,
        Form::Absorbed => 0,
    };
    Limits {
        max_tokens: 256,
        max_sequences: 16,
        max_context: 512,
        max_expanded_context,
        expanded_from: 1,
        max_states: 16,
        mtp: true,
    }
}

fn load(path: &Path, form: Form) -> Network<Cpu> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let backend = Arc::new(Cpu::new(1));
    Network::load(
        backend,
        &checkpoint,
        Precision::W8A8,
        limits(form),
        &mut |_| (),
    )
    .unwrap()
}

fn checkpoint() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    testkit::checkpoint::write_tiny(folder.path(), 7).unwrap();
    folder
}

fn rig(path: &Path, blocks: usize, chunk_tokens: usize) -> RealRig {
    rig_with(path, Form::Expanded, blocks, chunk_tokens)
}

fn rig_with(path: &Path, form: Form, blocks: usize, chunk_tokens: usize) -> RealRig {
    let options = Options {
        step_tokens: 256,
        chunk_tokens,
        ..Options::default()
    };
    let runner = NetworkRunner::new(load(path, form), blocks, "r".into()).unwrap();
    Rig::over(runner, options)
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + seed * 13) % 200).collect()
}

fn sampled(tokens: Vec<u32>, max_tokens: usize) -> Job {
    let mut job = job(tokens, max_tokens);
    job.sampling = Sampling {
        temperature: 0.8,
        top_p: 0.9,
        ..seeded(11)
    };
    job
}

#[test]
fn the_engine_says_what_the_network_says() {
    let folder = checkpoint();
    let network = load(folder.path(), Form::Absorbed);
    let cache = network.cache(4).unwrap();
    let mut scratch = network.scratch().unwrap();
    let mut tokens = prompt(1, 100);
    let mut logits = Vec::new();
    for _ in 0..12 {
        // All anew for every token: no cache, no batch, no chunks.
        let whole = Sequence {
            tokens: &tokens,
            first: 0,
            blocks: &[2, 0, 3],
            form: Form::Absorbed,
            logits: tokens.len() - 1..tokens.len(),
            state: None,
        };
        network
            .forward(&mut scratch, &[whole], &cache, &mut |_| Ok(()), &mut logits)
            .unwrap();
        let best =
            (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        tokens.push(best as u32);
    }
    let mut rig = rig_with(folder.path(), Form::Absorbed, 16, 33);
    let story = rig.run(job(prompt(1, 100), 12));
    assert_eq!(story.ids(), tokens[100..]);
    assert_eq!(story.finish(), Some(Finish::Length));
    let experts = rig.engine.experts();
    // Every computed token chose the same number of experts in every layer with experts.
    let computed = rig.engine.counters().computed_tokens;
    for row in 0..experts.layers().len() - 1 {
        let choices: u64 = experts.row(row).iter().sum();
        assert!(
            choices > 0 && choices.is_multiple_of(computed),
            "{choices} choices of {computed} tokens"
        );
    }
    drop(story);
    rig.rest();
}

#[test]
fn chunks_batches_prefixes_and_preemption_change_no_token() {
    for form in [Form::Expanded, Form::Absorbed] {
        nothing_changes_a_token(form);
    }
}

fn nothing_changes_a_token(form: Form) {
    let folder = checkpoint();
    let expected: Vec<Vec<u32>> = (0..5)
        .map(|i| {
            rig_with(folder.path(), form, 32, 256)
                .run(sampled(prompt(i, 60 + 30 * i as usize), 40))
                .ids()
        })
        .collect();
    for (blocks, chunk_tokens) in [(32, 1), (32, 7), (10, 64)] {
        let mut rig = rig_with(folder.path(), form, blocks, chunk_tokens);
        // The second round finds prefixes in the cache.
        for _ in 0..2 {
            let mut stories: Vec<Story> = (0..5)
                .map(|i| rig.submit(sampled(prompt(i, 60 + 30 * i as usize), 40)))
                .collect();
            rig.finish(&mut stories);
            for (story, expected) in stories.iter().zip(&expected) {
                assert_eq!(
                    &story.ids(),
                    expected,
                    "{blocks} blocks, chunks of {chunk_tokens}"
                );
            }
            drop(stories);
            rig.rest();
        }
        let counters = rig.engine.counters();
        assert!(counters.cached_tokens > 0);
        assert!(
            blocks > 10 || counters.preemptions > 0,
            "blocks were not scarce"
        );
    }
}

#[test]
fn the_next_turn_says_what_it_would_say_without_a_cache() {
    let folder = checkpoint();
    let mut rig = rig(folder.path(), 16, 100);
    let mut tokens = prompt(1, 100);
    tokens.extend(rig.run(sampled(tokens.clone(), 120)).ids());
    tokens.extend([1, 2, 3]);
    let next = rig.run(sampled(tokens.clone(), 20));
    // The block with the first turn's last prompt tokens holds generated ones too.
    assert_eq!(next.cached_tokens(), Some(64));
    let mut fresh = rig_with(folder.path(), Form::Expanded, 16, 256);
    assert_eq!(next.ids(), fresh.run(sampled(tokens, 20)).ids());
}

#[test]
fn a_replay_takes_no_later_prompts_kv_for_its_generated_tokens() {
    let folder = checkpoint();
    let mut rig = rig(folder.path(), 16, 100);
    let asked = prompt(1, 100);
    let answer = rig_with(folder.path(), Form::Expanded, 16, 256)
        .run(sampled(asked.clone(), 120))
        .ids();
    // The cache has all of it as somebody's prompt.
    let later = [&asked[..], &answer, &[1, 2, 3]].concat();
    rig.run(sampled(later, 2));
    let mut replay = sampled([&asked[..], &answer[..60]].concat(), 120);
    replay.prompt_tokens = 100;
    let replayed = rig.run(replay);
    assert_eq!(replayed.cached_tokens(), Some(64));
    assert_eq!(replayed.ids_from(60), answer[60..]);
}

#[test]
fn a_sequence_goes_on_in_another_network_with_the_same_tokens() {
    let folder = checkpoint();
    let tokens = prompt(3, 150);
    let expected = rig(folder.path(), 16, 256)
        .run(sampled(tokens.clone(), 30))
        .ids();
    let mut p = rig(folder.path(), 16, 50);
    let mut d = rig(folder.path(), 16, 50);
    for _ in 0..2 {
        let mut prefill = sampled(tokens.clone(), 30);
        prefill.phase = Phase::Prefill;
        let story = p.run(prefill);
        assert_eq!(story.finish(), Some(Finish::HandOff));
        let blocks = transfer(&story, &p, &d, &tokens);
        let mut all = tokens.clone();
        all.extend(story.ids());
        let mut decode = sampled(all, 30);
        decode.prompt_tokens = 150;
        decode.phase = Phase::Decode(blocks);
        let rest = d.run(decode);
        assert_eq!([story.ids(), rest.ids_from(1)].concat(), expected);
        drop((story, rest));
        p.rest();
        d.rest();
    }
}

#[test]
fn a_checkpoint_starts_on_its_own_thread_and_answers() {
    let folder = checkpoint();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let config = engine::cpu::Config {
        max_model_len: Some(512),
        threads: Some(1),
        ..engine::cpu::Config::default()
    };
    let mut steps = 0;
    let engine = engine::cpu::start_checkpoint(&checkpoint, &config, &mut |_| steps += 1).unwrap();
    assert!(steps > 1, "progress is told");
    let mut running = engine.submit(sampled(prompt(1, 40), 10)).unwrap();
    let mut tokens = Vec::new();
    while let Some(event) = running.events.blocking_recv() {
        if let engine::api::Event::Token(token) = event {
            tokens.push(token.token);
        }
    }
    let mut alone = rig(folder.path(), 16, 256);
    assert_eq!(tokens, alone.run(sampled(prompt(1, 40), 10)).ids());
    assert_eq!(engine.pool().check_integrity().unwrap().used, 0);
}

#[test]
fn memory_that_will_not_do_is_an_error_before_anything_loads() {
    let folder = checkpoint();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let start = |config| match engine::cpu::start_checkpoint(&checkpoint, &config, &mut |_| ()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it started"),
    };
    let small = start(engine::cpu::Config {
        kv_bytes: Some(100_000),
        ..engine::cpu::Config::default()
    });
    assert!(small.contains("lower the maximum length"), "{small}");
    let long = start(engine::cpu::Config {
        max_model_len: Some(1 << 30),
        ..engine::cpu::Config::default()
    });
    assert!(long.contains("knows positions up to"), "{long}");
}
