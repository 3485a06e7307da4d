//! The simulated hosts: the router and the workers as they run in production, over simulated connections.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::Duration,
};

use engine::{Options, api::Engine, driver::Handle};
use kv::Pool;
use parking_lot::Mutex;
use router::{
    discovery,
    seams::{Entropy, Seams},
};
use telemetry::{definitions, health::Health, metrics::Metrics};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use turmoil::Sim;
use worker::{Identity, Role};

use super::{net::Net, plan::Plan};
use testkit::{scripted::Scripted, toy::ToyConfig};

/// Port of workers' services.
pub(super) const GRPC: u16 = 7000;
/// Port of workers' KV plane.
pub(super) const KV: u16 = 7001;
/// Port of the router's HTTP front.
const ROUTER_HTTP: u16 = 8000;
/// Port of the router's gRPC front.
const ROUTER_GRPC: u16 = 9000;
/// Time of an engine's step, and of one of a slow worker.
const STEP: Duration = Duration::from_millis(5);
const SLOW_STEP: Duration = Duration::from_millis(60);

/// The last life of a worker, seen from outside.
#[derive(Debug)]
pub(super) struct Life {
    /// How many lives it had.
    pub number: u32,
    /// Its blocks.
    pub pool: Pool,
    /// Its engine, while the process lives.
    pub engine: Weak<Handle>,
    /// What it found wrong with KV bytes.
    pub violations: mpsc::UnboundedReceiver<String>,
    /// What it counted.
    pub metrics: Metrics,
    /// Asks it to leave.
    pub stop: CancellationToken,
}

/// All workers' last lives, by name, and the wrong bytes that earlier lives found.
#[derive(Clone, Debug, Default)]
pub(super) struct Lives(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    last: BTreeMap<String, Life>,
    started: BTreeMap<String, u32>,
    slow: BTreeSet<String>,
    violations: Vec<String>,
    /// Leases of former lives that expired.
    expired: u64,
}

impl Lives {
    /// From its next step on, and until it dies, the worker is slow.
    pub(super) fn slow_down(&self, worker: &str) {
        self.0.lock().slow.insert(worker.to_owned());
    }

    /// How long a step of this worker takes now.
    fn pace(&self, worker: &str) -> impl Fn() -> Duration + Send + use<> {
        let (lives, worker) = (self.clone(), worker.to_owned());
        move || {
            if lives.0.lock().slow.contains(&worker) {
                SLOW_STEP
            } else {
                STEP
            }
        }
    }

    /// Asks a worker to leave.
    pub(super) fn stop(&self, worker: &str) {
        if let Some(life) = self.0.lock().last.get(worker) {
            life.stop.cancel();
        }
    }

    fn begin(&self, worker: &str) -> u32 {
        let mut state = self.0.lock();
        state.slow.remove(worker);
        let number = state.started.entry(worker.to_owned()).or_default();
        *number += 1;
        *number
    }

    fn register(&self, worker: &str, life: Life) {
        let mut state = self.0.lock();
        if let Some(mut old) = state.last.insert(worker.to_owned(), life) {
            while let Ok(violation) = old.violations.try_recv() {
                state.violations.push(format!("{worker}: {violation}"));
            }
            state.expired += expired(&old);
        }
    }

    /// Wrong KV bytes that any life of any worker found in use.
    pub(super) fn violations(&self) -> Vec<String> {
        let mut state = self.0.lock();
        let State {
            last, violations, ..
        } = &mut *state;
        for (worker, life) in last {
            while let Ok(violation) = life.violations.try_recv() {
                violations.push(format!("{worker}: {violation}"));
            }
        }
        state.violations.clone()
    }

    /// Leases that ended because nobody used them or gave them back, over all lives of all workers.
    pub(super) fn expired(&self) -> u64 {
        let state = self.0.lock();
        state.expired + state.last.values().map(expired).sum::<u64>()
    }

    /// What the workers still hold; empty when all blocks, leases and sequences are back.
    pub(super) fn held(&self) -> Vec<String> {
        let state = self.0.lock();
        state
            .last
            .iter()
            .filter_map(|(name, life)| held(name, life))
            .collect()
    }
}

fn expired(life: &Life) -> u64 {
    let name = definitions::KV_LEASE_EXPIRATIONS.name;
    let families = life.metrics.registry().gather();
    let family = families.iter().find(|family| family.name() == name);
    let series = family.map_or(&[][..], |family| family.get_metric());
    series
        .iter()
        .map(|one| one.get_counter().get_value() as u64)
        .sum()
}

fn held(name: &str, life: &Life) -> Option<String> {
    let engine = life.engine.upgrade()?;
    let usage = match life.pool.check_integrity() {
        Ok(usage) => usage,
        Err(broken) => return Some(format!("{name}: {broken}")),
    };
    let load = engine.load();
    let is_idle =
        usage.used == 0 && usage.quarantined == 0 && load.running == 0 && load.waiting == 0;
    (!is_idle).then(|| format!("{name} (life {}): {usage:?}, {load:?}", life.number))
}

/// Adds all hosts of the plan.
pub(super) fn populate(
    sim: &mut Sim<'_>,
    seed: u64,
    plan: &Plan,
    toy: &ToyConfig,
    lives: &Lives,
    net: &Net,
) {
    let names = plan.workers();
    for name in &names {
        let role = match name.split('-').next() {
            Some("prefill") => Role::Prefill,
            _ if plan.prefills == 0 => Role::Combined,
            _ => Role::Decode,
        };
        let toy = ToyConfig {
            blocks: plan.blocks,
            ..toy.clone()
        };
        let (name, lives, net) = (name.clone(), lives.clone(), net.clone());
        sim.host(name.clone(), move || {
            let life = work(name.clone(), role, toy.clone(), lives.clone(), net.clone());
            mortal(&net, life)
        });
    }
    let addresses: Vec<String> = names.iter().map(|name| format!("{name}:{GRPC}")).collect();
    let net = net.clone();
    let started = Cell::new(0);
    sim.host("router", move || {
        // Another life draws other names.
        let seed = seed ^ (started.replace(started.get() + 1) << 32);
        mortal(&net, route(seed, addresses.clone(), net.clone()))
    });
}

/// A life of a host, whose connections close in an order of their own when it dies.
fn mortal<F: Future>(net: &Net, life: F) -> impl Future<Output = F::Output> + use<F> {
    // Those of a life before this one that had ended by itself.
    net.close();
    let last = LastAct(net.clone());
    async move {
        let _last = last;
        life.await
    }
}

/// Closes the connections of a host that dies, when the rest of it is gone.
struct LastAct(Net);

impl Drop for LastAct {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn work(name: String, role: Role, toy: ToyConfig, lives: Lives, net: Net) -> turmoil::Result {
    let number = lives.begin(&name);
    let options = Options {
        max_running: 8,
        ..Options::default()
    };
    let Scripted {
        engine,
        stepper,
        violations,
    } = Scripted::paced(&toy, options, lives.pace(&name), true);
    tokio::spawn(stepper.run());
    let stop = CancellationToken::new();
    let metrics = Metrics::new(&[])?;
    let life = Life {
        number,
        pool: engine.pool().clone(),
        engine: Arc::downgrade(&engine),
        violations,
        metrics: metrics.clone(),
        stop: stop.clone(),
    };
    lives.register(&name, life);
    let config = worker::Config {
        identity: Identity {
            deployment: "simulated".into(),
            role,
            unit: name.clone(),
            rank: 0,
            incarnation: format!("{name}/{number}"),
            revision: toy.revision.clone(),
        },
        model: "toy".into(),
        precision: "f32".into(),
        kv_address: format!("{name}:{KV}"),
        drain: Duration::from_secs(2),
    };
    let outside = worker::Outside {
        engine,
        dial: net.dial(),
        metrics,
        health: Health::new(),
    };
    let incoming = worker::Incoming {
        grpc: Box::pin(net.listen(GRPC).await?),
        kv: Box::pin(net.listen(KV).await?),
    };
    worker::serve(config, outside, incoming, stop).await?;
    Ok(())
}

async fn route(seed: u64, addresses: Vec<String>, net: Net) -> turmoil::Result {
    let mut config = router::Config::new("toy");
    config.pipeline.timeouts = router::Timeouts {
        request: Duration::from_secs(30),
        answer: Duration::from_secs(1),
        first_token: Duration::from_secs(6),
        prompt_token: Duration::ZERO,
        token: Duration::from_secs(3),
        // Longer than it takes to notice that a worker is silent and to dial it again.
        no_worker: Duration::from_secs(10),
    };
    let dialer = net.clone();
    let seams = Seams {
        dial: Arc::new(move |address| Box::pin(dialer.clone().connect(address))),
        entropy: Entropy::seeded(seed),
        unix_time: Arc::new(|| 1_700_000_000),
    };
    let incoming = router::Incoming {
        http: Box::pin(net.listen(ROUTER_HTTP).await?),
        grpc: Box::pin(net.listen(ROUTER_GRPC).await?),
    };
    let text = super::text()?;
    let common = router::Common::new(&config, Metrics::new(&[])?)?;
    let endpoints = discovery::fixed(addresses);
    router::serve(
        config,
        text,
        endpoints,
        incoming,
        seams,
        common,
        CancellationToken::new(),
    )
    .await?;
    Ok(())
}
