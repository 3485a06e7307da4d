//! Random histories of a pool against a model that only remembers who holds what and what was written.

use std::collections::{HashMap, HashSet};

use kv::{BlockId, Blocks, Pool, Reservation};
use proptest::prelude::*;

const TOTAL: usize = 12;

#[derive(Clone, Copy, Debug)]
enum Step {
    /// A sequence of family `family` with `blocks` full blocks.
    Acquire {
        family: u32,
        blocks: usize,
    },
    Reserve {
        family: u32,
        blocks: usize,
    },
    Grow(usize),
    /// The sequence computed its block `.1`.
    Publish(usize, usize),
    Commit(usize),
    DropBlocks(usize),
    DropReservation(usize),
    Withdraw(usize),
    ClearCache,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sequence = (0..3u32, 0..6usize);
    let step = prop_oneof![
        4 => sequence.clone().prop_map(|(family, blocks)| Step::Acquire { family, blocks }),
        3 => sequence.prop_map(|(family, blocks)| Step::Reserve { family, blocks }),
        2 => (0..8usize).prop_map(Step::Grow),
        6 => (0..8usize, 0..6usize).prop_map(|(i, b)| Step::Publish(i, b)),
        3 => (0..8usize).prop_map(Step::Commit),
        4 => (0..8usize).prop_map(Step::DropBlocks),
        2 => (0..8usize).prop_map(Step::DropReservation),
        1 => (0..8usize).prop_map(Step::Withdraw),
        1 => Just(Step::ClearCache),
    ];
    prop::collection::vec(step, 0..120)
}

fn tokens(family: u32, blocks: usize) -> Vec<u32> {
    (0..(blocks * kv::BLOCK_TOKENS) as u32)
        .map(|t| t * 3 + family)
        .collect()
}

#[derive(Default)]
struct Model {
    sequences: Vec<(u32, Blocks)>,
    reservations: Vec<(u32, Reservation)>,
    /// What was last written to a block: (family, index in its sequence).
    contents: HashMap<BlockId, (u32, usize)>,
}

/// Picks one of what there is.
fn pick(len: usize, i: usize) -> Option<usize> {
    (len > 0).then(|| i % len)
}

impl Model {
    /// Blocks from the cache must hold what was asked for, fresh ones must be nobody's.
    fn check_new(&mut self, family: u32, ids: &[BlockId], cached: usize) {
        let (old, fresh) = ids.split_at(cached);
        for (i, id) in old.iter().enumerate() {
            assert_eq!(
                self.contents.get(id),
                Some(&(family, i)),
                "a hit on other contents"
            );
        }
        let held: HashSet<_> = self.held().into_iter().collect();
        let quarantined: HashSet<_> = self.quarantined();
        for id in fresh {
            assert!(
                !held.contains(id) && !quarantined.contains(id),
                "{id:?} taken from its holder"
            );
            self.contents.remove(id);
        }
        assert!(
            old.iter().all(|id| !quarantined.contains(id)),
            "a hit on what a peer writes"
        );
    }

    fn held(&self) -> Vec<BlockId> {
        let sequences = self.sequences.iter().flat_map(|(_, b)| b.ids());
        let prefixes = self
            .reservations
            .iter()
            .flat_map(|(_, r)| &r.ids()[..r.cached_blocks()]);
        sequences.chain(prefixes).copied().collect()
    }

    fn quarantined(&self) -> HashSet<BlockId> {
        let reserved = self
            .reservations
            .iter()
            .flat_map(|(_, r)| &r.ids()[r.cached_blocks()..]);
        reserved.copied().collect()
    }

    fn apply(&mut self, pool: &Pool, step: Step) {
        match step {
            Step::Acquire { family, blocks } => {
                let hashes = pool.hashes(&tokens(family, blocks), b"");
                if let Ok(blocks) = pool.acquire(&hashes, blocks) {
                    self.check_new(family, blocks.ids(), blocks.cached_blocks());
                    self.sequences.push((family, blocks));
                }
            }
            Step::Reserve { family, blocks } => {
                if let Ok(reservation) = pool.reserve(&tokens(family, blocks), b"") {
                    self.check_new(family, reservation.ids(), reservation.cached_blocks());
                    self.reservations.push((family, reservation));
                }
            }
            Step::Grow(i) => {
                if let Some(i) = pick(self.sequences.len(), i) {
                    let (family, mut blocks) = self.sequences.swap_remove(i);
                    let before = blocks.ids().to_vec();
                    if blocks.grow().is_ok() {
                        let new = [blocks.ids()[before.len()]];
                        assert!(!before.contains(&new[0]));
                        self.check_new(family, &new, 0);
                    }
                    self.sequences.push((family, blocks));
                }
            }
            Step::Publish(i, index) => {
                if let Some(i) = pick(self.sequences.len(), i) {
                    let (family, blocks) = &self.sequences[i];
                    if let Some(&id) = blocks.ids().get(index) {
                        self.contents.insert(id, (*family, index));
                        let hashes = pool.hashes(&tokens(*family, index + 1), b"");
                        blocks.publish(index, hashes[index]);
                    }
                }
            }
            Step::Commit(i) => {
                if let Some(i) = pick(self.reservations.len(), i) {
                    let (family, reservation) = self.reservations.swap_remove(i);
                    let blocks = reservation.commit();
                    for (i, &id) in blocks.ids().iter().enumerate() {
                        self.contents.insert(id, (family, i));
                    }
                    self.sequences.push((family, blocks));
                }
            }
            Step::DropBlocks(i) => {
                if let Some(i) = pick(self.sequences.len(), i) {
                    self.sequences.swap_remove(i);
                }
            }
            Step::DropReservation(i) => {
                if let Some(i) = pick(self.reservations.len(), i) {
                    self.reservations.swap_remove(i);
                }
            }
            Step::Withdraw(i) => {
                if let Some(i) = pick(self.sequences.len(), i) {
                    let (_, blocks) = &self.sequences[i];
                    blocks.withdraw();
                    // A hit on them from now on would be a hit on other contents.
                    for id in blocks.ids() {
                        self.contents.remove(id);
                    }
                }
            }
            Step::ClearCache => pool.clear_cache(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn blocks_are_in_one_place_hits_are_right_and_all_come_back(steps in steps()) {
        let pool = Pool::new(TOTAL, "r");
        let mut model = Model::default();
        let mut seen = pool.snapshot();
        for step in steps {
            model.apply(&pool, step);
            let usage = pool.check_integrity().unwrap();
            let held: HashSet<_> = model.held().into_iter().collect();
            prop_assert_eq!(usage.used + usage.quarantined, held.union(&model.quarantined()).count());
            // Whoever follows the changes knows what the cache holds.
            let changes = pool.changes(seen.version).unwrap();
            seen.hashes.retain(|hash| !changes.evicted.contains(hash));
            seen.hashes.extend(changes.stored);
            seen.hashes.sort_unstable();
            seen.version = changes.version;
            prop_assert_eq!(&seen, &pool.snapshot());
        }
        drop(model);
        let usage = pool.check_integrity().unwrap();
        prop_assert_eq!(usage.available(), TOTAL);
        pool.clear_cache();
        prop_assert_eq!(pool.check_integrity().unwrap().free, TOTAL);
    }
}

#[test]
fn the_oldest_release_is_evicted_first_and_a_prefix_outlives_its_end() {
    let pool = Pool::new(4, "r");
    let publish = |family, n: usize| {
        let hashes = pool.hashes(&tokens(family, n), b"");
        let blocks = pool.acquire(&hashes, n).unwrap();
        for (i, &hash) in hashes.iter().enumerate() {
            blocks.publish(i, hash);
        }
        hashes
    };
    let a = publish(0, 3);
    let b = publish(1, 1);
    let _fresh = pool.acquire(&[], 1).unwrap();
    assert_eq!(pool.prefix_len(&a), 2, "the end of the oldest went first");
    assert_eq!(pool.prefix_len(&b), 1);
}

#[test]
fn a_failed_acquire_holds_nothing() {
    let pool = Pool::new(3, "r");
    let hashes = pool.hashes(&tokens(0, 2), b"");
    let blocks = pool.acquire(&hashes, 2).unwrap();
    blocks.publish(0, hashes[0]);
    let error = pool.acquire(&hashes, 3).unwrap_err();
    assert_eq!((error.needed, error.available, error.total), (2, 1, 3));
    drop(blocks);
    assert_eq!(pool.check_integrity().unwrap().available(), 3);
}
