//! Prefill here, decode there: the KV moves, the tokens stay the same.

use std::sync::Arc;

use engine::{
    Options, Runner,
    api::{Engine, Event, Finish, Job, Phase},
};
use kv::{BLOCK_TOKENS, Blocks, complete_blocks};
use testkit::toy::ToyConfig;

use crate::rig::{Rig, Story, job, prompt, seeded};

fn prefill(tokens: Vec<u32>) -> Job {
    let mut job = job(tokens, 30);
    job.phase = Phase::Prefill;
    job.sampling = seeded(3);
    job
}

/// Copies what was told to be filled, and nothing else, as a transfer does: through pieces and their checksums.
pub fn transfer<R: Runner>(story: &Story, from: &Rig<R>, to: &Rig<R>, tokens: &[u32]) -> Blocks {
    let reservation = to.engine.pool().reserve(tokens, b"").unwrap();
    let blocks = story.blocks().unwrap();
    let format = from.engine.format().clone();
    let (source, target) = (from.engine.memory(), to.engine.memory());
    let send = |block: usize, layer: usize| {
        if block < reservation.cached_blocks() {
            return;
        }
        let target_id = reservation.ids()[block];
        let rows = BLOCK_TOKENS.min(tokens.len() - block * BLOCK_TOKENS);
        let span = format.span(layer, rows);
        let id = blocks.ids()[block];
        let mut payload = Vec::new();
        source
            .read(id.index(), span.clone(), &mut |b| {
                payload.extend_from_slice(b);
            })
            .unwrap();
        let pool = from.engine.pool();
        let sum = pool.sum_rows(&*source, &format, id, layer, rows).unwrap();
        let direct = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &payload);
        assert_eq!(
            sum, direct,
            "the sum was stored before the bytes were there"
        );
        target
            .write(target_id.index(), span, &mut |b| {
                b.copy_from_slice(&payload);
            })
            .unwrap();
    };
    for event in &story.events {
        match event {
            Event::Started { cached_tokens, .. } => {
                for block in 0..cached_tokens / BLOCK_TOKENS {
                    (0..format.layers).for_each(|layer| send(block, layer));
                }
            }
            Event::Filled { first, end, layers } => {
                for block in complete_blocks(*first, *end, tokens.len()) {
                    layers.clone().for_each(|layer| send(block, layer));
                }
            }
            _ => {}
        }
    }
    reservation.commit()
}

fn decode(rig: &mut Rig, mut tokens: Vec<u32>, first: u32, blocks: Blocks) -> Story {
    let prompt_tokens = tokens.len();
    tokens.push(first);
    let mut job = prefill(tokens);
    job.prompt_tokens = prompt_tokens;
    job.phase = Phase::Decode(blocks);
    rig.run(job)
}

/// What one engine says alone.
fn whole(tokens: &[u32]) -> Vec<u32> {
    let mut job = prefill(tokens.to_vec());
    job.phase = Phase::Whole;
    Rig::with_blocks(64).run(job).ids()
}

#[test]
fn a_sequence_goes_on_elsewhere_with_the_same_tokens() {
    for (len, chunk_tokens) in [(1, 64), (63, 64), (64, 64), (65, 7), (128, 100), (300, 256)] {
        let options = Options {
            chunk_tokens,
            ..Options::default()
        };
        let mut p = Rig::new(ToyConfig::default(), options);
        let mut d = Rig::with_blocks(64);
        let tokens = prompt(6, len);
        let expected = whole(&tokens);
        // The second time both sides have a prefix cached.
        for round in 0..2 {
            let story = p.run(prefill(tokens.clone()));
            assert_eq!(story.finish(), Some(Finish::HandOff));
            assert_eq!(story.ids(), expected[..1]);
            assert_eq!(story.cached_tokens().unwrap() > 0, round == 1 && len > 64);
            let blocks = transfer(&story, &p, &d, &tokens);
            drop(story);
            p.rest();
            let story = decode(&mut d, tokens.clone(), expected[0], blocks);
            assert_eq!(
                story.ids_from(1),
                expected[1..],
                "{len} tokens in chunks of {chunk_tokens}"
            );
            drop(story);
            d.rest();
        }
    }
}

#[test]
fn blocks_of_a_transfer_outlive_the_sequence_until_the_sender_is_done() {
    let mut p = Rig::with_blocks(8);
    let story = p.run(prefill(prompt(1, 100)));
    let blocks = story.blocks().unwrap();
    drop(story);
    p.driver.tick();
    assert_eq!(p.engine.pool().usage().used, 2);
    assert_eq!(Arc::strong_count(&blocks), 1);
    drop(blocks);
    p.rest();
}

#[test]
fn a_first_token_that_ends_the_sequence_is_not_handed_off() {
    let mut p = Rig::with_blocks(8);
    let first = whole(&prompt(1, 100))[0];
    let mut job = prefill(prompt(1, 100));
    job.stop.tokens = vec![first];
    assert_eq!(p.run(job).finish(), Some(Finish::Stop));
    let mut job = prefill(prompt(1, 100));
    job.stop.max_tokens = 1;
    assert_eq!(p.run(job).finish(), Some(Finish::Length));
    p.rest();
}

#[test]
fn every_layer_of_every_token_is_told_exactly_once() {
    let options = Options {
        chunk_tokens: 50,
        ..Options::default()
    };
    let mut p = Rig::new(ToyConfig::default(), options);
    p.run(prefill(prompt(1, 130)));
    let story = p.run(prefill(prompt(1, 200)));
    assert_eq!(story.cached_tokens(), Some(128));
    let mut told = vec![[0; 3]; 200];
    for event in &story.events {
        if let Event::Filled { first, end, layers } = event {
            for layer in layers.clone() {
                (*first..*end).for_each(|token| told[token][layer] += 1);
            }
        }
    }
    assert!(told[..128].iter().all(|t| *t == [0; 3]));
    assert!(told[128..].iter().all(|t| *t == [1; 3]), "{told:?}");
}

#[test]
fn a_decoding_sequence_that_is_preempted_is_computed_anew() {
    let mut p = Rig::with_blocks(64);
    let mut d = Rig::with_blocks(5);
    let prompts = [prompt(1, 100), prompt(2, 100)];
    let mut stories = Vec::new();
    for tokens in &prompts {
        let story = p.run(prefill(tokens.clone()));
        let blocks = transfer(&story, &p, &d, tokens);
        let mut all = tokens.clone();
        all.extend(story.ids());
        let mut job = prefill(all);
        job.prompt_tokens = 100;
        job.stop.max_tokens = 120;
        job.phase = Phase::Decode(blocks);
        stories.push(d.submit(job));
    }
    d.finish(&mut stories);
    assert!(d.engine.counters().preemptions > 0);
    for (story, tokens) in stories.iter().zip(&prompts) {
        let mut job = prefill(tokens.clone());
        job.phase = Phase::Whole;
        job.stop.max_tokens = 120;
        let expected = Rig::with_blocks(64).run(job).ids();
        assert_eq!(story.ids_from(1), expected[1..]);
    }
    drop(stories);
    d.rest();
}

#[test]
fn wrong_bytes_are_seen() {
    // The toy network is the judge of all tests here and in the simulator: it must not be blind.
    let mut p = Rig::with_blocks(8);
    let mut d = Rig::with_blocks(8);
    let tokens = prompt(1, 100);
    let story = p.run(prefill(tokens.clone()));
    let blocks = transfer(&story, &p, &d, &tokens);
    let at = d.engine.format().span(1, 10).end - 1;
    let id = blocks.ids()[0].index();
    d.engine
        .memory()
        .write(id, at..at + 1, &mut |b| b[0] ^= 1)
        .unwrap();
    decode(&mut d, tokens, story.ids()[0], blocks);
    let seen = d.violations.try_recv().unwrap();
    assert!(seen.contains("layer 1, position 9"), "{seen}");
}
