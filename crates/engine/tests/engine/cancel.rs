//! Whatever ends when: every block comes back.

use engine::{
    Options,
    api::{Engine, Phase},
};
use testkit::toy::ToyConfig;

use crate::rig::{Rig, Story, job, prompt, seeded};

/// A small generator of choices, the same in every run.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % n
    }
}

#[test]
fn ten_thousand_random_cancels_leave_every_block_where_it_was() {
    let config = ToyConfig {
        blocks: 9,
        max_rows: 6,
        vocab_size: 300,
        ..ToyConfig::default()
    };
    let options = Options {
        max_running: 6,
        max_waiting: 8,
        step_tokens: 48,
        chunk_tokens: 20,
    };
    let mut rig = Rig::new(config, options);
    let mut choices = Choices(42);
    let mut alive: Vec<Story> = Vec::new();
    let mut cancelled = 0;
    while cancelled < 10_000 {
        if alive.len() < 12 {
            let family = choices.below(4) as u32;
            // Most prompts end close to a block's end, so that they soon need another.
            let len = 64 * (1 + choices.below(2)) - choices.below(4);
            let mut job = job(prompt(family, len), 1 + choices.below(120));
            job.sampling = seeded(u64::from(family));
            if choices.below(6) == 0 {
                job.phase = Phase::Prefill;
            }
            if let Ok(running) = rig.engine.submit(job) {
                alive.push(Story::new(running));
            }
        }
        rig.driver.tick();
        for story in &mut alive {
            // Some readers are slow.
            if choices.below(4) > 0 {
                story.read();
            }
        }
        for _ in 0..choices.below(2) {
            if !alive.is_empty() {
                let i = choices.below(alive.len());
                alive.swap_remove(i);
                cancelled += 1;
            }
        }
        if choices.below(50) == 0 {
            rig.engine.pool().check_integrity().unwrap();
        }
    }
    let preemptions = rig.engine.counters().preemptions;
    assert!(
        preemptions > 10,
        "blocks were not scarce: {preemptions} preemptions"
    );
    drop(alive);
    rig.rest();
}

#[test]
fn a_cancel_at_every_point_of_a_life_frees_everything() {
    for phase in [false, true] {
        for steps in 0..40 {
            let mut rig = Rig::with_blocks(16);
            let mut job = job(prompt(1, 100), 30);
            if phase {
                job.phase = Phase::Prefill;
            }
            let mut story = rig.submit(job);
            for _ in 0..steps {
                rig.driver.tick();
                story.read();
            }
            drop(story);
            rig.rest();
        }
    }
}
