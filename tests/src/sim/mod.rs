//! A deterministic simulator: the router and the workers, whole, in one thread of simulated time.
//!
//! A seed decides requests and faults ([`Plan`]); [`run`] lets them happen and compares what clients saw, and what
//! workers hold in the end, with what must be. The engine is scripted ([`testkit::scripted`]) and finds wrong KV bytes
//! itself. Everything else is the code that runs in production.

mod client;
mod judge;
mod net;
mod oracle;
mod panics;
mod plan;
mod trace;
mod world;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use parking_lot::Mutex;
use planted::Bug;
use turmoil::Sim;

pub use client::{End, Outcome};
pub use judge::Violation;
pub use plan::{Ask, Fault, Link, Plan};

use net::Net;
use testkit::toy::ToyConfig;
use trace::Trace;
use world::Lives;

/// Time of a simulation's step.
const TICK: Duration = Duration::from_millis(5);
/// After the last fault has healed and the last client has heard how its request ended, everything must be back to
/// rest within this time: leases that nobody could give back expire, connections that nobody could close time out.
const REST: Duration = Duration::from_secs(90);
/// As [`REST`], where every message arrived: nothing has to expire.
const REST_CONNECTED: Duration = Duration::from_secs(2);

/// What came of a run.
#[derive(Debug)]
pub struct Report {
    /// What happened to each request.
    pub outcomes: Vec<Outcome>,
    /// What must never happen, and did.
    pub violations: Vec<Violation>,
    /// Hash over every write to the network and everything that clients saw, and when. The same for every run of a plan
    /// with the same seed.
    pub trace: u64,
    /// Simulated time.
    pub took: Duration,
}

/// Runs the plan of `seed`, with a bug in the code if there is to be one.
pub fn run(seed: u64, bug: Option<Bug>) -> Report {
    let ran = panics::reported(move || {
        planted::plant(bug);
        run_plan(seed, &Plan::of(seed))
    });
    ran.unwrap_or_else(|panic| Report {
        outcomes: Vec::new(),
        violations: vec![Violation::Panic(panic)],
        trace: 0,
        took: Duration::ZERO,
    })
}

/// Runs a plan; `seed` decides latencies and the router's randomness.
fn run_plan(seed: u64, plan: &Plan) -> Report {
    let toy = ToyConfig {
        max_model_len: 1024,
        ..ToyConfig::default()
    };
    let lives = Lives::default();
    let trace = Trace::default();
    let net = Net::new(trace.clone());
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(3600))
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(1 << 16)
        .build();
    world::populate(&mut sim, seed, plan, &toy, &lives, &net);
    let outcomes: Vec<Arc<Mutex<Outcome>>> = plan.asks.iter().map(|_| Arc::default()).collect();
    for (number, (ask, outcome)) in plan.asks.iter().zip(&outcomes).enumerate() {
        let (ask, outcome) = (ask.clone(), Arc::clone(outcome));
        let (net, trace) = (net.clone(), trace.clone());
        sim.client(format!("client-{number}"), async move {
            tokio::time::sleep(ask.at).await;
            client::follow(&net, &ask, &outcome).await;
            trace.note((number, format!("{:?}", outcome.lock())));
            Ok(())
        });
    }
    let mut driver = Driver::new(plan, net.clone());
    let mut violations = Vec::new();
    let rested = driver.drive(&mut sim, &lives, &outcomes);
    let outcomes: Vec<Outcome> = outcomes
        .iter()
        .map(|outcome| outcome.lock().clone())
        .collect();
    violations.extend(lives.violations().into_iter().map(Violation::Bytes));
    if !rested {
        violations.extend(lives.held().into_iter().map(Violation::Leak));
    }
    if plan.is_connected() && lives.expired() > 0 {
        let expired = format!("{} leases expired", lives.expired());
        violations.push(Violation::Leak(expired));
    }
    violations.extend(judge::judge(
        &plan.asks,
        &oracle::answers(&toy, &plan.asks),
        &outcomes,
    ));
    if let Err(dead) = alive(&mut sim, &net, &toy) {
        violations.push(Violation::Dead(dead));
    }
    Report {
        outcomes,
        violations,
        trace: trace.hash(),
        took: sim.elapsed(),
    }
}

/// After everything healed, a fresh request must be answered.
fn alive(sim: &mut Sim<'_>, net: &Net, toy: &ToyConfig) -> Result<(), String> {
    let ask = Ask {
        at: Duration::ZERO,
        prompt: (1..100).collect(),
        count: 8,
        temperature: 0.0,
        seed: 0,
        leave_after: None,
    };
    let outcome: Arc<Mutex<Outcome>> = Arc::default();
    let (net, sent, seen) = (net.clone(), ask.clone(), Arc::clone(&outcome));
    sim.client("client-last", async move {
        client::follow(&net, &sent, &seen).await;
        Ok(())
    });
    while outcome.lock().ends.is_empty() {
        sim.step().expect("the simulated network works");
    }
    let outcome = outcome.lock().clone();
    let is_whole = outcome
        .tokens
        .iter()
        .map(|&(_, token)| token)
        .eq(toy.greedy(&ask.prompt, ask.count));
    if is_whole && matches!(outcome.ends[..], [End::Finished(_)]) {
        Ok(())
    } else {
        Err(format!("{outcome:?}"))
    }
}

/// Lets faults begin and end at their times.
struct Driver {
    rest: Duration,
    net: Net,
    due: Vec<(Duration, Act)>,
}

/// A moment of a fault.
#[derive(Clone, Debug)]
enum Act {
    Begin(Fault),
    Heal(Fault),
}

impl Driver {
    fn new(plan: &Plan, net: Net) -> Self {
        let mut due: Vec<(Duration, Act)> = Vec::new();
        for (at, fault) in &plan.faults {
            due.push((*at, Act::Begin(fault.clone())));
            if let Some(lasts) = lasts(fault) {
                due.push((*at + lasts, Act::Heal(fault.clone())));
            }
        }
        due.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        let rest = if plan.is_connected() {
            REST_CONNECTED
        } else {
            REST
        };
        Self { rest, net, due }
    }

    /// Steps until every fault is over, every client knows how its request ended and everything is at rest; false when
    /// that takes too long.
    fn drive(
        &mut self,
        sim: &mut Sim<'_>,
        lives: &Lives,
        outcomes: &[Arc<Mutex<Outcome>>],
    ) -> bool {
        let mut quiet_since = None;
        loop {
            while self.due.last().is_some_and(|(at, _)| *at <= sim.elapsed()) {
                if let Some((_, act)) = self.due.pop() {
                    act.happen(sim, lives, &self.net);
                }
            }
            sim.step().expect("the simulated network works");
            if !self.due.is_empty() {
                continue;
            }
            let is_over = outcomes
                .iter()
                .all(|outcome| !outcome.lock().ends.is_empty());
            if !is_over {
                continue;
            }
            let quiet_since = *quiet_since.get_or_insert(sim.elapsed());
            if lives.held().is_empty() {
                return true;
            }
            if sim.elapsed() > quiet_since + self.rest {
                return false;
            }
        }
    }
}

fn lasts(fault: &Fault) -> Option<Duration> {
    match fault {
        Fault::Crash { down, .. } | Fault::Drain { down, .. } => Some(*down),
        Fault::Partition(link)
        | Fault::OneWay(link)
        | Fault::Hold(link)
        | Fault::Delay(link, _) => Some(link.lasts),
        Fault::Slow { .. } | Fault::Flip { .. } => None,
    }
}

impl Act {
    fn happen(self, sim: &mut Sim<'_>, lives: &Lives, net: &Net) {
        match self {
            Self::Begin(Fault::Crash { host, .. }) => {
                net.host_dies();
                sim.crash(host);
                // It may have ended by itself before: nothing was dropped then.
                net.close();
            }
            Self::Begin(Fault::Partition(link)) => sim.partition(link.from, link.to),
            Self::Begin(Fault::OneWay(link)) => sim.partition_oneway(link.from, link.to),
            Self::Begin(Fault::Hold(link)) => sim.hold(link.from, link.to),
            Self::Begin(Fault::Delay(link, time)) => sim.set_link_latency(link.from, link.to, time),
            Self::Begin(Fault::Slow { worker }) => lives.slow_down(&worker),
            Self::Begin(Fault::Flip { worker }) => net.flip(&worker),
            Self::Begin(Fault::Drain { worker, .. }) => lives.stop(&worker),
            Self::Heal(Fault::Crash { host, .. } | Fault::Drain { worker: host, .. }) => {
                net.host_dies();
                sim.bounce(host);
            }
            Self::Heal(Fault::Partition(link)) => sim.repair(link.from, link.to),
            Self::Heal(Fault::OneWay(link)) => sim.repair_oneway(link.from, link.to),
            Self::Heal(Fault::Hold(link)) => sim.release(link.from, link.to),
            Self::Heal(Fault::Delay(link, _)) => {
                sim.set_link_latency(link.from, link.to, Duration::from_millis(2));
            }
            Self::Heal(Fault::Slow { .. } | Fault::Flip { .. }) => {}
        }
    }
}

/// A tokenizer for the router. Requests bring token ids, so that any will do; it is read once for all runs.
fn text() -> Result<Arc<text::Text>, Box<dyn std::error::Error>> {
    static TEXT: OnceLock<Arc<text::Text>> = OnceLock::new();
    if let Some(text) = TEXT.get() {
        return Ok(Arc::clone(text));
    }
    let folder = tempfile::tempdir()?;
    testkit::checkpoint::write_tiny(folder.path(), 1)?;
    let text = Arc::new(text::Text::load(folder.path())?);
    Ok(Arc::clone(TEXT.get_or_init(|| text)))
}
