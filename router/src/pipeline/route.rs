//! Which workers a sequence goes to. A pure choice over what is known of the fleet.

use std::sync::Arc;

use proto::v1::Role;
use tokio::time::Instant;

use crate::{
    fleet::Worker,
    policy::{DecodeState, Policy, PrefillState, least_loaded, power_of_two, prefix_aware},
};

/// Whether prompts are computed by workers of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// By prefill workers; by decode workers only while there is no prefill worker.
    #[default]
    Disaggregated,
    /// By the worker that generates.
    Combined,
}

/// Where a sequence runs.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// Two workers of one revision.
    Pair {
        prefill: Arc<Worker>,
        decode: Arc<Worker>,
        /// Tokens of the prompt that the prefill worker is believed to hold.
        cached_tokens: u64,
    },
    /// One worker does everything.
    Whole(Arc<Worker>),
}

/// Why there is nowhere to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoute {
    /// No worker at all takes requests.
    Empty,
    /// Prefill workers, but nobody to generate.
    NoDecode,
    /// Both, but of different revisions.
    Revisions,
}

impl NoRoute {
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Empty => "no_workers",
            Self::NoDecode => "no_decode",
            Self::Revisions => "revisions_differ",
        }
    }
}

/// What is looked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    pub(crate) mode: Mode,
    pub(crate) policy: Policy,
    /// Incarnations that failed this sequence: taken only if there is nobody else.
    pub(crate) avoid: &'a [String],
    pub(crate) tokens: &'a [u32],
    pub(crate) salt: &'a [u8],
}

/// Chooses among `workers`; `random` breaks ties.
pub(crate) fn choose(
    workers: &[Arc<Worker>],
    wish: &Wish<'_>,
    random: u64,
    now: Instant,
) -> Result<Route, NoRoute> {
    let open: Vec<&Arc<Worker>> = workers
        .iter()
        .filter(|worker| worker.is_open(now))
        .collect();
    let of = |role: Role| -> Vec<&Arc<Worker>> {
        open.iter()
            .copied()
            .filter(|worker| worker.role() == role)
            .collect()
    };
    let (prefill, decode, combined) = (of(Role::Prefill), of(Role::Decode), of(Role::Combined));
    if wish.mode == Mode::Disaggregated {
        let has_decode = |p: &&Arc<Worker>| decode.iter().any(|d| d.revision() == p.revision());
        let paired: Vec<_> = prefill.iter().copied().filter(has_decode).collect();
        if let Some((prefill, cached_tokens)) =
            pick_prefill(&prefer(paired, wish.avoid), wish, random)
        {
            let same = |d: &&Arc<Worker>| d.revision() == prefill.revision();
            let decode: Vec<_> = decode.iter().copied().filter(same).collect();
            if let Some(decode) = pick_decode(&prefer(decode, wish.avoid), wish, random >> 16) {
                let (prefill, decode) = (Arc::clone(prefill), Arc::clone(decode));
                return Ok(Route::Pair {
                    prefill,
                    decode,
                    cached_tokens,
                });
            }
        }
        if combined.is_empty() && !prefill.is_empty() {
            return Err(if decode.is_empty() {
                NoRoute::NoDecode
            } else {
                NoRoute::Revisions
            });
        }
    }
    let whole = if combined.is_empty() {
        decode
    } else {
        combined
    };
    pick_decode(&prefer(whole, wish.avoid), wish, random)
        .map(|worker| Route::Whole(Arc::clone(worker)))
        .ok_or(NoRoute::Empty)
}

/// Those that are not to be avoided, or all if that leaves nobody.
fn prefer<'a>(workers: Vec<&'a Arc<Worker>>, avoid: &[String]) -> Vec<&'a Arc<Worker>> {
    let is_good = |worker: &&Arc<Worker>| avoid.iter().all(|bad| bad != worker.incarnation());
    if avoid.is_empty() || !workers.iter().any(is_good) {
        return workers;
    }
    workers.into_iter().filter(is_good).collect()
}

fn pick_prefill<'a>(
    workers: &[&'a Arc<Worker>],
    wish: &Wish<'_>,
    random: u64,
) -> Option<(&'a Arc<Worker>, u64)> {
    let mut hashes: Option<(&str, Vec<u64>)> = None;
    let mut states = Vec::with_capacity(workers.len());
    for worker in workers {
        // Names of blocks depend on the revision; usually there is one.
        let revision = worker.revision();
        if hashes.as_ref().is_none_or(|(of, _)| *of != revision) {
            hashes = Some((
                revision,
                prefix::block_hashes(revision, wish.salt, wish.tokens),
            ));
        }
        let blocks = hashes
            .as_ref()
            .map_or(0, |(_, hashes)| worker.cached_blocks(hashes));
        states.push(PrefillState {
            pending_tokens: worker.pending_tokens(),
            cached_tokens: (blocks * prefix::BLOCK_TOKENS) as u64,
        });
    }
    let chosen = match wish.policy {
        Policy::Aware => prefix_aware(&states, wish.tokens.len() as u64, random),
        Policy::PowerOfTwo => {
            let loads: Vec<u64> = states.iter().map(|state| state.pending_tokens).collect();
            power_of_two(&loads, random)
        }
    }?;
    Some((workers[chosen], states[chosen].cached_tokens))
}

fn pick_decode<'a>(
    workers: &[&'a Arc<Worker>],
    wish: &Wish<'_>,
    random: u64,
) -> Option<&'a Arc<Worker>> {
    let chosen = match wish.policy {
        Policy::Aware => {
            let state = |worker: &&Arc<Worker>| DecodeState {
                sequences: worker.load(),
                free_blocks: worker.free_blocks(),
            };
            least_loaded(&workers.iter().map(state).collect::<Vec<_>>(), random)
        }
        Policy::PowerOfTwo => {
            let loads: Vec<u64> = workers
                .iter()
                .map(|worker| u64::from(worker.load()))
                .collect();
            power_of_two(&loads, random)
        }
    }?;
    Some(workers[chosen])
}
