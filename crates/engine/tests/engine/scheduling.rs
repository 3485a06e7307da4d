//! Who runs when never changes what is said.

use std::time::{Duration, Instant};

use engine::{
    Options,
    api::{Engine, Error, Event, Finish, Refused},
    driver::Progress,
};
use testkit::toy::ToyConfig;

use crate::rig::{Rig, Story, greedy, job, prompt, seeded};

fn toy() -> ToyConfig {
    ToyConfig::default()
}

#[test]
fn batch_mates_do_not_change_tokens() {
    let mut alone = Rig::with_blocks(64);
    let lone: Vec<_> = (0..12)
        .map(|i| alone.run(job(prompt(i, 20 + 9 * i as usize), 30)).ids())
        .collect();
    alone.rest();
    let mut together = Rig::with_blocks(64);
    let mut stories: Vec<Story> = (0..12)
        .map(|i| together.submit(job(prompt(i, 20 + 9 * i as usize), 30)))
        .collect();
    together.finish(&mut stories);
    for (i, (story, lone)) in stories.iter().zip(&lone).enumerate() {
        assert_eq!(&story.ids(), lone);
        let expected = toy().greedy(&prompt(i as u32, 20 + 9 * i), 30);
        assert_eq!(&expected, lone);
        assert_eq!(story.finish(), Some(Finish::Length));
    }
    drop(stories);
    together.rest();
}

#[test]
fn chunk_sizes_do_not_change_tokens() {
    let tokens = prompt(5, 333);
    let expected = toy().greedy(&tokens, 20);
    for chunk_tokens in [1, 7, 64, 500] {
        let options = Options {
            chunk_tokens,
            ..Options::default()
        };
        let mut rig = Rig::new(toy(), options);
        let mut stories = vec![
            rig.submit(job(tokens.clone(), 20)),
            rig.submit(job(prompt(9, 100), 20)),
        ];
        rig.finish(&mut stories);
        assert_eq!(stories[0].ids(), expected, "chunks of {chunk_tokens}");
        drop(stories);
        rig.rest();
    }
}

#[test]
fn preempted_sequences_go_on_with_the_same_tokens() {
    // 12 blocks hold two of these sequences to their ends, but six start.
    let mut rig = Rig::with_blocks(12);
    let jobs = |sampling: fn(u64) -> _| {
        move |i: u32| {
            let mut job = job(prompt(i, 90), 250);
            job.sampling = sampling(u64::from(i));
            job
        }
    };
    for make in [jobs(|_| greedy()), jobs(seeded)] {
        let before = rig.engine.counters().preemptions;
        let mut stories: Vec<Story> = (0..6).map(|i| rig.submit(make(i))).collect();
        rig.finish(&mut stories);
        assert!(rig.engine.counters().preemptions > before);
        for (i, story) in stories.iter().enumerate() {
            let mut alone = Rig::with_blocks(64);
            assert_eq!(story.ids(), alone.run(make(i as u32)).ids());
        }
        drop(stories);
        rig.rest();
    }
}

#[test]
fn the_oldest_is_never_preempted() {
    let mut rig = Rig::with_blocks(6);
    let mut stories: Vec<Story> = (0..3)
        .map(|i| rig.submit(job(prompt(i, 60), 200)))
        .collect();
    while !stories[0].has_ended() {
        assert_eq!(rig.driver.tick(), Progress::Worked);
        let before = stories[0].events.len();
        stories.iter_mut().for_each(Story::read);
        assert!(
            stories[0].events.len() > before,
            "every step takes the oldest on"
        );
    }
    rig.finish(&mut stories);
    drop(stories);
    rig.rest();
}

#[test]
fn a_prefix_that_is_cached_is_not_computed_and_changes_nothing() {
    let mut rig = Rig::with_blocks(64);
    let mut long = prompt(1, 200);
    assert_eq!(rig.run(job(long.clone(), 5)).cached_tokens(), Some(0));
    // Another question with the same first 150 tokens.
    long.truncate(150);
    long.extend([7, 8, 9]);
    let computed = rig.engine.counters().computed_tokens;
    let story = rig.run(job(long.clone(), 10));
    assert_eq!(story.cached_tokens(), Some(128));
    assert_eq!(story.ids(), toy().greedy(&long, 10));
    assert_eq!(
        rig.engine.counters().computed_tokens - computed,
        153 - 128 + 9
    );
    // Of a prompt that is cached whole, the last token is computed for its logits.
    let whole = prompt(1, 128);
    let story = rig.run(job(whole.clone(), 3));
    assert_eq!(story.cached_tokens(), Some(64));
    assert_eq!(story.ids(), toy().greedy(&whole, 3));
    // Another tenant shares nothing.
    let mut other = job(prompt(1, 200), 5);
    other.cache_salt = b"other".to_vec();
    assert_eq!(rig.run(other).cached_tokens(), Some(0));
    rig.rest();
}

#[test]
fn generated_blocks_are_found_by_the_next_turn() {
    let mut rig = Rig::with_blocks(64);
    let mut tokens = prompt(3, 50);
    let answer = rig.run(job(tokens.clone(), 100)).ids();
    tokens.extend(answer);
    tokens.extend([1, 2, 3]);
    let story = rig.run(job(tokens.clone(), 5));
    assert_eq!(story.cached_tokens(), Some(128));
    assert_eq!(story.ids(), toy().greedy(&tokens, 5));
    rig.rest();
}

#[test]
fn a_slow_reader_pauses_its_own_sequence_only() {
    let mut rig = Rig::with_blocks(64);
    let mut slow = rig.submit(job(prompt(1, 30), 400));
    let mut quick = [rig.submit(job(prompt(2, 30), 400))];
    rig.finish(&mut quick);
    assert_eq!(quick[0].ids().len(), 400);
    assert_eq!(rig.driver.tick(), Progress::Stuck);
    slow.read();
    assert!(slow.ids().len() < 60, "it was paused");
    let mut slow = [slow];
    rig.finish(&mut slow);
    assert_eq!(slow[0].ids(), toy().greedy(&prompt(1, 30), 400));
    drop((slow, quick));
    rig.rest();
}

#[test]
fn sequences_end_at_their_deadline_wherever_they_are() {
    let options = Options {
        max_running: 1,
        ..Options::default()
    };
    let mut rig = Rig::new(toy(), options);
    let soon = |tokens, n| {
        let mut job = job(tokens, n);
        job.deadline = Instant::now() + Duration::from_millis(30);
        job
    };
    let mut stories = [
        rig.submit(soon(prompt(1, 10), 2000)),
        rig.submit(soon(prompt(2, 10), 10)),
    ];
    let patience = Instant::now() + Duration::from_secs(5);
    while !stories[1].has_ended() && Instant::now() < patience {
        rig.driver.tick();
        // The first is not read, so it pauses and can not end otherwise.
        stories[1].read();
    }
    stories[0].read();
    for story in &stories {
        assert!(
            matches!(story.failure(), Some(Error::Deadline)),
            "{story:?}"
        );
    }
    drop(stories);
    rig.rest();
}

#[test]
fn draining_takes_nothing_new_and_ends_what_is_left() {
    let mut rig = Rig::with_blocks(64);
    let mut stories = [
        rig.submit(job(prompt(1, 10), 20)),
        rig.submit(job(prompt(2, 10), 1000)),
    ];
    rig.driver.tick();
    rig.engine.drain(Instant::now() + Duration::from_millis(50));
    let refused = rig.engine.submit(job(prompt(3, 10), 1));
    assert!(matches!(refused, Err(Refused::Draining)));
    for _ in 0..19 {
        rig.driver.tick();
    }
    stories[0].read();
    assert_eq!(stories[0].finish(), Some(Finish::Length));
    std::thread::sleep(Duration::from_millis(50));
    rig.finish(&mut stories);
    assert!(matches!(stories[1].failure(), Some(Error::Draining)));
    drop(stories);
    rig.rest();
}

#[test]
fn a_full_queue_refuses() {
    let options = Options {
        max_running: 1,
        max_waiting: 2,
        ..Options::default()
    };
    let mut rig = Rig::new(toy(), options);
    let mut stories = vec![
        rig.submit(job(prompt(1, 10), 3)),
        rig.submit(job(prompt(2, 10), 3)),
    ];
    let refused = rig.engine.submit(job(prompt(3, 10), 3));
    assert!(matches!(refused, Err(Refused::QueueFull { waiting: 2 })));
    rig.driver.tick();
    assert_eq!(rig.engine.load().running, 1);
    stories.push(rig.submit(job(prompt(3, 10), 3)));
    rig.finish(&mut stories);
    drop(stories);
    rig.rest();
}

#[test]
fn what_can_never_run_is_refused_with_the_reason() {
    let rig = Rig::with_blocks(2);
    let refused = |job| match rig.engine.submit(job) {
        Err(Refused::Invalid(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(job(vec![], 1)).contains("prompt"));
    assert!(refused(job(vec![300], 1)).contains("vocabulary of 300"));
    assert!(refused(job(prompt(0, 2048), 1)).contains("at most 2048"));
    assert!(refused(job(prompt(0, 129), 1)).contains("3 KV blocks, 2 exist"));
    let mut bad = job(vec![1], 1);
    bad.sampling.top_p = 0.0;
    assert!(refused(bad).contains("top_p"));
    let mut bad = job(vec![1], 1);
    bad.sampling.temperature = f32::NAN;
    assert!(refused(bad).contains("temperature"));
    let mut bad = job(vec![1], 1);
    bad.sampling.logit_bias = vec![(1, f32::INFINITY)];
    assert!(refused(bad).contains("logit_bias"));
}

#[test]
fn a_sequence_that_outgrows_the_pool_fails_and_others_go_on() {
    let mut rig = Rig::with_blocks(3);
    let mut stories = [
        rig.submit(job(prompt(1, 100), 1000)),
        rig.submit(job(prompt(2, 20), 10)),
    ];
    rig.finish(&mut stories);
    let failure = stories[0].failure();
    assert!(
        matches!(
            failure,
            Some(Error::OutOfBlocks {
                needed: 4,
                total: 3
            })
        ),
        "{failure:?}"
    );
    assert_eq!(stories[1].ids(), toy().greedy(&prompt(2, 20), 10));
    drop(stories);
    rig.rest();
}

#[test]
fn poisoned_logits_fail_one_sequence_and_leave_its_mates_alone() {
    let config = ToyConfig {
        poison_token: Some(299),
        ..toy()
    };
    let mut rig = Rig::new(config, Options::default());
    let mut stories = [
        rig.submit(job(vec![5, 299], 10)),
        rig.submit(job(vec![5, 6], 4)),
    ];
    rig.finish(&mut stories);
    assert!(matches!(stories[0].failure(), Some(Error::Network(_))));
    assert_eq!(stories[1].ids(), toy().greedy(&[5, 6], 4));
    let started = |story: &Story| matches!(story.events[0], Event::Started { .. });
    assert!(stories.iter().all(started));
    drop(stories);
    rig.rest();
}

#[test]
fn kv_that_gave_impossible_logits_is_not_found_again() {
    let tokens = prompt(1, 150);
    let poison = ToyConfig {
        poison_token: Some(298),
        ..toy()
    };
    let mut rig = Rig::new(poison, Options::default());
    rig.run(job(tokens.clone(), 1));
    let cached = rig.engine.pool().usage().cached;
    assert_eq!(cached, 2);
    let mut bad = tokens;
    bad.push(298);
    assert!(rig.run(job(bad, 1)).failure().is_some());
    assert_eq!(rig.engine.pool().usage().cached, 0);
    rig.rest();
}

#[test]
fn an_engine_whose_driver_is_gone_says_so_and_takes_nothing() {
    let rig = Rig::with_blocks(8);
    let mut story = rig.submit(job(prompt(1, 30), 100));
    assert_eq!(rig.engine.broken(), None);
    drop(rig.driver);
    story.read();
    assert!(story.running.unwrap().events.is_closed());
    assert!(rig.engine.broken().is_some());
    let refused = rig.engine.submit(job(prompt(1, 30), 100));
    assert!(matches!(refused, Err(Refused::Broken(_))));
}

#[test]
fn dropping_the_last_handle_ends_everything() {
    let mut rig = Rig::with_blocks(8);
    let mut story = rig.submit(job(prompt(1, 30), 100));
    rig.driver.tick();
    let pool = rig.engine.pool().clone();
    drop(rig.engine);
    assert_eq!(rig.driver.tick(), Progress::Stopped);
    story.read();
    assert!(matches!(story.failure(), Some(Error::Draining)));
    assert_eq!(pool.check_integrity().unwrap().used, 0);
}
