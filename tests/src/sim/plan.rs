//! What happens in one simulated run: a pure function of the seed.

use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

/// Everything that a run does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Prefill workers; with none, decode workers serve both phases.
    pub prefills: usize,
    /// Decode workers.
    pub decodes: usize,
    /// Blocks of each worker's cache: sometimes few.
    pub blocks: usize,
    /// What clients ask, in order of time.
    pub asks: Vec<Ask>,
    /// What goes wrong, in order of time.
    pub faults: Vec<(Duration, Fault)>,
}

/// One client's request.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// When it is sent.
    pub at: Duration,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Tokens wanted.
    pub count: usize,
    /// 0 is greedy.
    pub temperature: f32,
    /// For sampling.
    pub seed: u64,
    /// The client leaves after so many tokens.
    pub leave_after: Option<usize>,
}

/// Something that goes wrong, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process of a worker, or the router's, dies at once and starts anew.
    Crash {
        /// Which.
        host: String,
        /// When it starts anew.
        down: Duration,
    },
    /// Nothing passes between two hosts, in both directions.
    Partition(Link),
    /// Nothing passes from the first host to the second.
    OneWay(Link),
    /// Messages between two hosts wait, then all arrive.
    Hold(Link),
    /// Messages between two hosts take long.
    Delay(Link, Duration),
    /// A worker computes slowly for the rest of its life.
    Slow {
        /// Which.
        worker: String,
    },
    /// One bit changes in the next large write on the KV plane to this worker.
    Flip {
        /// Which.
        worker: String,
    },
    /// A worker is asked to leave, and starts anew later.
    Drain {
        /// Which.
        worker: String,
        /// When it starts anew.
        down: Duration,
    },
}

/// Two hosts, and how long a fault between them lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// One host.
    pub from: String,
    /// The other.
    pub to: String,
    /// Then it heals.
    pub lasts: Duration,
}

/// Faults begin, and requests come, within this time.
pub(super) const TROUBLE: Duration = Duration::from_secs(5);
/// Vocabulary of prompts; the toy network's own is larger.
const VOCABULARY: u32 = 250;

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let random = &mut StdRng::seed_from_u64(seed);
        let prefills = if random.random_bool(0.1) {
            0
        } else {
            random.random_range(1..=2)
        };
        let decodes = random.random_range(1..=3);
        let workers = workers(prefills, decodes);
        let blocks = if random.random_bool(0.2) { 24 } else { 96 };
        // Prompts share beginnings, so that prefix caches are at work as well.
        let stems: Vec<Vec<u32>> = (0..2).map(|_| tokens(random, 150)).collect();
        let mut asks: Vec<Ask> = (0..random.random_range(3..=8))
            .map(|_| ask(random, &stems))
            .collect();
        asks.sort_by_key(|ask| ask.at);
        let faults = random.random_range(1..=5);
        let mut faults: Vec<_> = (0..faults)
            .map(|_| (moment(random), fault(random, &workers)))
            .collect();
        faults.sort_by_key(|(at, _)| *at);
        Self {
            prefills,
            decodes,
            blocks,
            asks,
            faults,
        }
    }

    /// Whether every worker hears in time what the router no longer wants: the router lives on, and no fault is between
    /// two hosts.
    pub fn is_connected(&self) -> bool {
        self.faults.iter().all(|(_, fault)| match fault {
            Fault::Crash { host, .. } => host != "router",
            Fault::Slow { .. } | Fault::Flip { .. } | Fault::Drain { .. } => true,
            Fault::Partition(_) | Fault::OneWay(_) | Fault::Hold(_) | Fault::Delay(..) => false,
        })
    }

    /// Names of all workers.
    pub fn workers(&self) -> Vec<String> {
        workers(self.prefills, self.decodes)
    }
}

fn workers(prefills: usize, decodes: usize) -> Vec<String> {
    let prefills = (0..prefills).map(|i| format!("prefill-{i}"));
    prefills
        .chain((0..decodes).map(|i| format!("decode-{i}")))
        .collect()
}

fn moment(random: &mut StdRng) -> Duration {
    Duration::from_millis(random.random_range(0..TROUBLE.as_millis() as u64))
}

fn span(random: &mut StdRng) -> Duration {
    Duration::from_millis(random.random_range(50..4000))
}

fn tokens(random: &mut StdRng, count: usize) -> Vec<u32> {
    (0..count)
        .map(|_| random.random_range(1..VOCABULARY))
        .collect()
}

fn ask(random: &mut StdRng, stems: &[Vec<u32>]) -> Ask {
    let mut prompt = Vec::new();
    if let Some(stem) = stems.choose(random).filter(|_| random.random_bool(0.6)) {
        prompt.extend_from_slice(&stem[..random.random_range(1..=stem.len())]);
    }
    let rest = random.random_range(1..300);
    prompt.extend(tokens(random, rest));
    let sampled = random.random_bool(0.5);
    Ask {
        at: moment(random),
        prompt,
        count: random.random_range(1..=80),
        temperature: if sampled { 0.9 } else { 0.0 },
        seed: random.next_u64() >> 1,
        leave_after: random.random_bool(0.15).then(|| random.random_range(0..20)),
    }
}

fn fault(random: &mut StdRng, workers: &[String]) -> Fault {
    let worker = workers[random.random_range(0..workers.len())].clone();
    match random.random_range(0..11) {
        0..=2 => Fault::Crash {
            host: if random.random_bool(0.1) {
                "router".into()
            } else {
                worker
            },
            down: span(random),
        },
        3 => Fault::Partition(link(random, workers, worker)),
        4 | 5 => Fault::OneWay(link(random, workers, worker)),
        6 => Fault::Hold(link(random, workers, worker)),
        7 => Fault::Delay(
            link(random, workers, worker),
            Duration::from_millis(random.random_range(20..800)),
        ),
        8 => Fault::Slow { worker },
        9 => Fault::Flip { worker },
        _ => Fault::Drain {
            worker,
            down: span(random),
        },
    }
}

/// From `worker` to the router or another worker, either way round.
fn link(random: &mut StdRng, workers: &[String], worker: String) -> Link {
    let peers: Vec<&str> = workers
        .iter()
        .map(String::as_str)
        .filter(|&w| w != worker)
        .chain(["router"])
        .collect();
    let peer = peers[random.random_range(0..peers.len())].to_owned();
    let (from, to) = if random.random_bool(0.5) {
        (worker, peer)
    } else {
        (peer, worker)
    };
    Link {
        from,
        to,
        lasts: span(random),
    }
}
