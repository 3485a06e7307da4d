//! The workers that are connected now. [`Fleet`] is the list; a task for each address that discovery names keeps it true.

mod breaker;
mod channel;
mod link;
mod tally;
mod worker;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use telemetry::shutdown::Tasks;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use breaker::BreakerConfig;
pub(crate) use channel::Died;
use tally::Tallies;
pub(crate) use worker::{Assignment, Worker};

use crate::{discovery::Endpoints, seams::Seams};

/// How the router treats its workers' connections.
#[derive(Clone, Copy, Debug)]
pub struct FleetConfig {
    /// Longest time for connecting and for each of the first answers.
    pub answer: Duration,
    /// A worker that does not answer a ping for this long is gone.
    pub silence: Duration,
    /// First and longest pause before an address is tried again.
    pub reconnect: (Duration, Duration),
    /// When a worker that fails gets no more requests.
    pub breaker: BreakerConfig,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(5),
            silence: Duration::from_secs(3),
            reconnect: (Duration::from_millis(50), Duration::from_secs(2)),
            breaker: BreakerConfig {
                failures: 5,
                open: Duration::from_secs(5),
            },
        }
    }
}

impl FleetConfig {
    fn keepalive(self) -> channel::Keepalive {
        channel::Keepalive {
            interval: self.silence / 3,
            timeout: self.silence,
        }
    }
}

/// The fleets of all lanes: each lane has connections of its own to the same workers.
#[derive(Debug, Default)]
pub(crate) struct Fleets {
    lanes: Mutex<Vec<Weak<Fleet>>>,
    tallies: Arc<Tallies>,
}

impl Fleets {
    /// One more, nobody in it yet.
    pub(crate) fn open(&self) -> Arc<Fleet> {
        let fleet = Fleet::new(Arc::clone(&self.tallies));
        self.lanes.lock().push(Arc::downgrade(&fleet));
        fleet
    }

    /// The workers that every lane is connected to.
    pub(crate) fn workers(&self) -> Vec<Arc<Worker>> {
        let fleets: Vec<_> = self.lanes.lock().iter().filter_map(Weak::upgrade).collect();
        let Some((first, others)) = fleets.split_first() else {
            return Vec::new();
        };
        let is_in = |fleet: &Arc<Fleet>, worker: &Arc<Worker>| {
            let workers = fleet.workers();
            workers
                .iter()
                .any(|other| other.incarnation() == worker.incarnation())
        };
        let workers = first.workers();
        let everywhere = workers
            .iter()
            .filter(|worker| others.iter().all(|fleet| is_in(fleet, worker)));
        everywhere.cloned().collect()
    }
}

/// The connected workers.
#[derive(Debug)]
pub(crate) struct Fleet {
    workers: RwLock<Arc<[Arc<Worker>]>>,
    connections: AtomicU64,
    /// Wakes whoever waits in the order in which they came (a watch channel would not): a simulation repeats exactly.
    changed: broadcast::Sender<()>,
    tallies: Arc<Tallies>,
}

impl Fleet {
    fn new(tallies: Arc<Tallies>) -> Arc<Self> {
        Arc::new(Self {
            workers: RwLock::new(Arc::new([])),
            connections: AtomicU64::new(0),
            changed: broadcast::Sender::new(1),
            tallies,
        })
    }

    /// All of them.
    pub(crate) fn workers(&self) -> Arc<[Arc<Worker>]> {
        self.workers.read().clone()
    }

    /// Follows changes: of the list, of loads, of drains.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<()> {
        self.changed.subscribe()
    }

    fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    fn changed(&self) {
        // Nobody may be waiting.
        let _ = self.changed.send(());
    }

    /// Adds a worker for as long as what is returned lives.
    fn join(self: &Arc<Self>, worker: Worker) -> Member {
        info!(
            address = worker.address,
            role = worker.role().as_str_name(),
            incarnation = worker.incarnation(),
            revision = worker.revision(),
            "worker joined"
        );
        let worker = Arc::new(worker);
        self.replace(|workers| {
            // The same life under another address is still one worker.
            workers.retain(|other| other.incarnation() != worker.incarnation());
            workers.push(Arc::clone(&worker));
            // Which worker came first must not decide anything.
            workers.sort_by(|a, b| a.incarnation().cmp(b.incarnation()));
        });
        self.connections.fetch_add(1, Relaxed);
        Member {
            fleet: Arc::clone(self),
            worker,
        }
    }

    fn replace(&self, change: impl FnOnce(&mut Vec<Arc<Worker>>)) {
        let mut workers = self.workers.write();
        let mut list = workers.to_vec();
        change(&mut list);
        *workers = list.into();
        drop(workers);
        self.changed();
    }
}

/// A worker in the fleet; leaves it when dropped.
struct Member {
    fleet: Arc<Fleet>,
    worker: Arc<Worker>,
}

impl std::ops::Deref for Member {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        &self.worker
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let gone = &self.worker;
        self.fleet
            .replace(|workers| workers.retain(|worker| !Arc::ptr_eq(worker, gone)));
    }
}

/// Keeps the fleet connected to what discovery names, until discovery ends or `stop`.
pub(crate) async fn follow(
    fleet: Arc<Fleet>,
    mut endpoints: Endpoints,
    config: FleetConfig,
    seams: Seams,
    tasks: Tasks,
    stop: CancellationToken,
) {
    let mut links: BTreeMap<String, tokio_util::sync::DropGuard> = BTreeMap::new();
    loop {
        let wanted = endpoints.borrow_and_update().clone();
        links.retain(|address, _| wanted.contains(address));
        for address in wanted.iter().cloned() {
            links.entry(address).or_insert_with_key(|address| {
                let token = stop.child_token();
                let link = link::keep(address.clone(), fleet.clone(), config, seams.clone());
                tasks.spawn("worker link", token.clone().run_until_cancelled_owned(link));
                token.drop_guard()
            });
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = endpoints.changed() => if changed.is_err() {
                // Discovery has nothing more to say: what it said last stays true.
                stop.cancelled().await;
                return;
            },
        }
    }
}
