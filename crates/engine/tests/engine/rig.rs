//! An engine under test and what its sequences told.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use engine::{
    Options, Runner,
    api::{Engine, Error, Event, Finish, Job, Phase, Running, Sampling, Stop, Token},
    driver::{Driver, Handle, Progress, Surroundings, build},
};
use kv::Pool;
use testkit::toy::{Toy, ToyConfig};
use tokio::sync::mpsc;

/// Far beyond any test.
pub fn never() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

pub fn greedy() -> Sampling {
    Sampling {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
        top_logprobs: None,
        logit_bias: Vec::new(),
    }
}

pub fn seeded(seed: u64) -> Sampling {
    Sampling {
        temperature: 1.0,
        seed,
        ..greedy()
    }
}

pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|i| (i * 31 + seed * 17) % 300)
        .collect()
}

pub fn job(tokens: Vec<u32>, max_tokens: usize) -> Job {
    Job {
        request: "test".into(),
        prompt_tokens: tokens.len(),
        tokens,
        sampling: greedy(),
        stop: Stop {
            max_tokens,
            ..Stop::default()
        },
        prompt_logprobs: false,
        cache_salt: Vec::new(),
        deadline: never(),
        phase: Phase::Whole,
    }
}

/// An engine whose steps the test makes, over blocks that are poisoned when freed.
pub struct Rig<R = Toy> {
    pub engine: Arc<Handle>,
    pub driver: Driver<R>,
    pub violations: mpsc::UnboundedReceiver<String>,
}

impl Rig {
    pub fn new(config: ToyConfig, options: Options) -> Self {
        let (toy, violations) = Toy::new(config);
        Self {
            violations,
            ..Self::over(toy, options)
        }
    }

    /// `blocks` blocks and the default options.
    pub fn with_blocks(blocks: usize) -> Self {
        let config = ToyConfig {
            blocks,
            ..ToyConfig::default()
        };
        Self::new(config, Options::default())
    }
}

impl<R: Runner> Rig<R> {
    pub fn over(runner: R, options: Options) -> Self {
        let pool = Pool::poisoning(runner.memory(), "revision");
        let surroundings = Surroundings {
            clock: Instant::now,
            wake: Arc::new(|| ()),
        };
        let (engine, driver) = build(runner, pool, options, surroundings).unwrap();
        Self {
            engine,
            driver,
            violations: mpsc::unbounded_channel().1,
        }
    }

    pub fn submit(&self, job: Job) -> Story {
        Story::new(self.engine.submit(job).unwrap())
    }

    /// Steps until all stories have ended.
    pub fn finish(&mut self, stories: &mut [Story]) {
        for _ in 0..100_000 {
            self.driver.tick();
            let mut ended = true;
            for story in &mut *stories {
                story.read();
                ended &= story.has_ended();
            }
            if ended {
                return;
            }
        }
        panic!("stuck: {stories:?}");
    }

    /// Runs one job to its end.
    pub fn run(&mut self, job: Job) -> Story {
        let mut stories = [self.submit(job)];
        self.finish(&mut stories);
        let [story] = stories;
        story
    }

    /// Steps until nothing is left to do; then every block must be back and no KV may have been wrong.
    pub fn rest(&mut self) {
        for _ in 0..1000 {
            if self.driver.tick() == Progress::Idle {
                let usage = self.engine.pool().check_integrity().unwrap();
                assert_eq!((usage.used, usage.quarantined), (0, 0), "{usage:?}");
                assert_eq!(self.violations.try_recv().ok(), None);
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

/// What one sequence told.
#[derive(Debug)]
pub struct Story {
    /// `None` once the reader is dropped.
    pub running: Option<Running>,
    pub events: Vec<Event>,
}

impl Story {
    pub fn new(running: Running) -> Self {
        Self {
            running: Some(running),
            events: Vec::new(),
        }
    }

    pub fn read(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        while let Ok(event) = running.events.try_recv() {
            assert!(!self.is_over(), "{event:?} after the end");
            self.events.push(event);
        }
        self.running = Some(running);
    }

    fn is_over(&self) -> bool {
        matches!(
            self.events.last(),
            Some(Event::Finished(_) | Event::Failed(_))
        )
    }

    pub fn has_ended(&self) -> bool {
        self.running.is_none() || self.is_over()
    }

    pub fn tokens(&self) -> Vec<Token> {
        let tokens = self.events.iter().filter_map(|event| match event {
            Event::Token(token) => Some(token.clone()),
            _ => None,
        });
        tokens.collect()
    }

    /// Token ids, whose indexes must count up from `first`.
    pub fn ids_from(&self, first: usize) -> Vec<u32> {
        let tokens = self.tokens();
        for (i, token) in tokens.iter().enumerate() {
            assert_eq!(token.index, first + i);
        }
        tokens.iter().map(|t| t.token).collect()
    }

    pub fn ids(&self) -> Vec<u32> {
        self.ids_from(0)
    }

    pub fn finish(&self) -> Option<Finish> {
        match self.events.last() {
            Some(Event::Finished(finish)) => Some(*finish),
            _ => None,
        }
    }

    pub fn failure(&self) -> Option<Error> {
        match self.events.last() {
            Some(Event::Failed(error)) => Some(error.clone()),
            _ => None,
        }
    }

    pub fn cached_tokens(&self) -> Option<usize> {
        self.events.iter().find_map(|event| match event {
            Event::Started { cached_tokens, .. } => Some(*cached_tokens),
            _ => None,
        })
    }

    pub fn blocks(&self) -> Option<Arc<kv::Blocks>> {
        self.events.iter().find_map(|event| match event {
            Event::Started { blocks, .. } => blocks.clone(),
            _ => None,
        })
    }
}
