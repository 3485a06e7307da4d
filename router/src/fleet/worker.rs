//! One life of one worker process, as the router sees it: who it is, what it can do, what it holds, how busy it is.

use std::{collections::HashSet, sync::Arc};

use parking_lot::{Mutex, RwLock};
use proto::v1::{self, Role, decode_client::DecodeClient, prefill_client::PrefillClient};
use tokio::time::Instant;

use super::{
    breaker::BreakerConfig,
    channel::Channel,
    tally::{Tallies, Tally},
};

/// A worker that is connected. A restarted process at the same address is another one.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Where it was reached, for logs.
    pub(crate) address: String,
    /// What it said about itself.
    pub(crate) facts: v1::DescribeResponse,
    identity: v1::Identity,
    channel: Channel,
    origin: http::Uri,
    tally: Arc<Tally>,
    breaker_config: BreakerConfig,
    report: Mutex<Report>,
    cached: RwLock<HashSet<u64>>,
}

/// What it said last about its load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Report {
    pub(crate) load: v1::Load,
    pub(crate) is_draining: bool,
}

/// Why a `DescribeResponse` cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the worker's description has no {0}")]
pub(crate) struct Nameless(&'static str);

impl Worker {
    pub(super) fn new(
        address: String,
        facts: v1::DescribeResponse,
        channel: Channel,
        origin: http::Uri,
        breaker_config: BreakerConfig,
        tallies: &Tallies,
    ) -> Result<Self, Nameless> {
        let identity = facts.identity.clone().ok_or(Nameless("identity"))?;
        if identity.incarnation.is_empty() {
            return Err(Nameless("incarnation"));
        }
        if identity.role() == Role::Unspecified {
            return Err(Nameless("role"));
        }
        let tally = tallies.of(&identity.incarnation);
        Ok(Self {
            tally,
            address,
            facts,
            identity,
            channel,
            origin,
            breaker_config,
            report: Mutex::default(),
            cached: RwLock::default(),
        })
    }

    pub(crate) fn role(&self) -> Role {
        self.identity.role()
    }

    pub(crate) fn revision(&self) -> &str {
        &self.identity.revision
    }

    pub(crate) fn incarnation(&self) -> &str {
        &self.identity.incarnation
    }

    pub(crate) fn prefill(&self) -> PrefillClient<Channel> {
        PrefillClient::with_origin(self.channel.clone(), self.origin.clone())
    }

    pub(crate) fn decode(&self) -> DecodeClient<Channel> {
        DecodeClient::with_origin(self.channel.clone(), self.origin.clone())
    }

    /// Whether new requests may go to it at `now`.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        !self.report.lock().is_draining && self.tally.allows(now)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.report.lock().is_draining
    }

    /// Takes a message of the worker's `Watch` stream.
    pub(crate) fn update(&self, message: &v1::WatchResponse) {
        *self.report.lock() = Report {
            load: message.load.unwrap_or_default(),
            is_draining: message.draining,
        };
        if message.stored.is_empty() && message.evicted.is_empty() {
            return;
        }
        let mut cached = self.cached.write();
        for hash in &message.evicted {
            cached.remove(hash);
        }
        // A worker cannot hold more than its blocks: whatever it says, the index stays that small.
        let limit = self.facts.total_blocks as usize;
        for hash in &message.stored {
            if cached.len() < limit {
                cached.insert(*hash);
            }
        }
    }

    /// Leading blocks of a prompt that it holds.
    pub(crate) fn cached_blocks(&self, hashes: &[u64]) -> usize {
        let cached = self.cached.read();
        hashes
            .iter()
            .take_while(|hash| cached.contains(hash))
            .count()
    }

    /// Sequences it has, by its own count or the router's, whichever is higher: its own includes those of other routers,
    /// the router's those that are on their way.
    pub(crate) fn load(&self) -> u32 {
        let load = self.report.lock().load;
        (load.running + load.waiting).max(self.tally.sequences())
    }

    /// Prompt tokens it still has to compute, counted likewise.
    pub(crate) fn pending_tokens(&self) -> u64 {
        self.report
            .lock()
            .load
            .waiting_tokens
            .max(self.tally.prompt_tokens())
    }

    pub(crate) fn free_blocks(&self) -> u32 {
        self.report.lock().load.free_blocks
    }
}

/// A sequence at a worker: counted as long as this lives.
#[derive(Debug)]
pub(crate) struct Assignment {
    worker: Arc<Worker>,
    prompt_tokens: u64,
    is_judged: bool,
}

impl Assignment {
    /// `prompt_tokens` are those that the worker has to compute.
    pub(crate) fn new(worker: Arc<Worker>, prompt_tokens: u64) -> Self {
        worker.tally.start(prompt_tokens);
        Self {
            worker,
            prompt_tokens,
            is_judged: false,
        }
    }

    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// The worker did what it should.
    pub(crate) fn succeed(&mut self) {
        self.is_judged = true;
        self.worker.tally.succeed();
    }

    /// The worker failed.
    pub(crate) fn fail(&mut self) {
        self.is_judged = true;
        let worker = &self.worker;
        worker.tally.fail(worker.breaker_config, Instant::now());
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.worker.tally.end(self.prompt_tokens, self.is_judged);
    }
}
