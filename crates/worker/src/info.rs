//! What every worker answers: who it is, what it is doing, and that it should leave.

use std::{sync::Arc, time::Duration};

use proto::v1::{self, worker_server::Worker};
use tokio::{sync::watch, time::Instant};
use tonic::{Request, Response, Status};

use crate::{rpc::Answers, shared::Shared};

/// Changes are looked for so often.
const TICK: Duration = Duration::from_millis(50);
/// A message at least so often, so that a watcher knows a silent worker from a dead one.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The `Worker` service.
#[derive(Clone)]
pub(crate) struct InfoService {
    pub(crate) shared: Arc<Shared>,
    /// Dropped when the worker leaves: watchers' streams end.
    pub(crate) leaving: watch::Receiver<()>,
}

#[tonic::async_trait]
impl Worker for InfoService {
    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let config = &self.shared.config;
        let identity = &config.identity;
        let engine = &self.shared.engine;
        let limits = engine.limits();
        let kv_address = if identity.role.receives() {
            config.kv_address.clone()
        } else {
            String::new()
        };
        Ok(Response::new(v1::DescribeResponse {
            identity: Some(v1::Identity {
                deployment: identity.deployment.clone(),
                role: v1::Role::from(identity.role).into(),
                unit: identity.unit.clone(),
                rank: identity.rank,
                incarnation: identity.incarnation.clone(),
                revision: identity.revision.clone(),
            }),
            kv_address,
            kv_fingerprint: engine.format().fingerprint().to_vec(),
            block_tokens: kv::BLOCK_TOKENS as u32,
            total_blocks: engine.pool().usage().total as u32,
            max_model_len: limits.max_model_len as u32,
            max_running: limits.max_running as u32,
            model: config.model.clone(),
            precision: config.precision.clone(),
            vocab_size: limits.vocab_size as u32,
        }))
    }

    type WatchStream = Answers<v1::WatchResponse>;

    async fn watch(
        &self,
        _: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let watching = Watching {
            shared: Arc::clone(&self.shared),
            leaving: self.leaving.clone(),
            version: 0,
            sequence: 0,
            last: None,
            sent: Instant::now(),
        };
        let stream = futures::stream::unfold(watching, |mut watching| async move {
            let message = watching.next().await?;
            Some((Ok(message), watching))
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let running = self.shared.begin_drain(request.into_inner());
        Ok(Response::new(v1::DrainResponse { running }))
    }
}

/// One watcher.
struct Watching {
    shared: Arc<Shared>,
    leaving: watch::Receiver<()>,
    /// Of the prefix cache, as last told.
    version: u64,
    sequence: u64,
    last: Option<(v1::Load, bool)>,
    sent: Instant,
}

impl Watching {
    /// The next message, or `None` when the worker leaves.
    async fn next(&mut self) -> Option<v1::WatchResponse> {
        loop {
            let first = self.last.is_none();
            let state = (self.shared.load(), self.shared.drain.is_on());
            let (stored, evicted) = if first {
                self.snapshot()
            } else {
                self.changes()
            };
            let same = self.last == Some(state) && stored.is_empty() && evicted.is_empty();
            if !same || self.sent.elapsed() >= HEARTBEAT {
                self.sequence += 1;
                self.sent = Instant::now();
                self.last = Some(state);
                let (load, draining) = state;
                let sequence = self.sequence;
                let load = Some(load);
                return Some(v1::WatchResponse {
                    sequence,
                    load,
                    stored,
                    evicted,
                    draining,
                });
            }
            tokio::select! {
                biased;
                _ = self.leaving.changed() => return None,
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    fn snapshot(&mut self) -> (Vec<u64>, Vec<u64>) {
        let snapshot = self.shared.engine.pool().snapshot();
        self.version = snapshot.version;
        (snapshot.hashes, Vec::new())
    }

    fn changes(&mut self) -> (Vec<u64>, Vec<u64>) {
        let Some(changes) = self.shared.engine.pool().changes(self.version) else {
            // Too far behind to say what was lost: a hash too many costs the router a guess, no more.
            return self.snapshot();
        };
        self.version = changes.version;
        (changes.stored, changes.evicted)
    }
}

impl Shared {
    /// What the worker is doing now.
    pub(crate) fn load(&self) -> v1::Load {
        let load = self.engine.load();
        let usage = self.engine.pool().usage();
        v1::Load {
            running: load.running as u32,
            waiting: load.waiting as u32,
            waiting_tokens: load.waiting_tokens as u64,
            free_blocks: usage.available() as u32,
            total_blocks: usage.total as u32,
            cached_blocks: usage.cached as u32,
        }
    }
}
