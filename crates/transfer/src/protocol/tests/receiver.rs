//! Every state that a receiver can reach.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use super::{PIECES, plan, truth};
use crate::{
    checksum,
    geometry::{Piece, Plan},
    identity::{Identity, Key},
    protocol::{Ended, Leases, Refusal, Ticket},
};

const TTL: Duration = Duration::from_secs(1);

fn key(attempt: u32) -> Key {
    Key {
        request: "r".into(),
        attempt,
    }
}

fn identity(lease: u64, sender: &str) -> Identity {
    Identity {
        key: key(lease as u32),
        lease,
        receiver: "here".into(),
        sender: sender.into(),
        fingerprint: vec![1],
        plan: plan(),
    }
}

/// What really is in the memory of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Content {
    Old,
    Torn,
    Good,
}

#[derive(Clone, Debug)]
struct World {
    now: Instant,
    leases: Leases<u64>,
    /// For each lease ever made: contents, and how often its blocks came back or were used.
    contents: Vec<[Content; 2]>,
    ends: Vec<u32>,
    senders: Vec<&'static str>,
    tickets: Vec<(u64, Ticket)>,
    opens: u32,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Reserve,
    Open(u64, &'static str),
    Begin(u64, u64, Piece),
    Finish(usize, Arrived),
    Seal(u64, u64, bool),
    Claim(u64),
    Commit(u64),
    Abort(u64),
    Expire,
}

#[derive(Clone, Copy, Debug)]
enum Arrived {
    Whole,
    Changed,
    GivenUp,
}

impl World {
    fn new(now: Instant) -> Self {
        Self {
            now,
            leases: Leases::new("here".into(), vec![1], 8),
            contents: vec![],
            ends: vec![],
            senders: vec![],
            tickets: vec![],
            opens: 0,
        }
    }

    fn actions(&self, leases: usize, opens: u32) -> Vec<Action> {
        let mut actions = vec![Action::Expire];
        if self.contents.len() < leases {
            actions.push(Action::Reserve);
        }
        for lease in 1..=self.contents.len() as u64 {
            if self.opens < opens {
                actions.extend([Action::Open(lease, "a"), Action::Open(lease, "b")]);
            }
            for stream in 1..=u64::from(opens) {
                if self.tickets.len() < 2 {
                    actions.extend(PIECES.map(|piece| Action::Begin(lease, stream, piece)));
                }
                actions.extend([true, false].map(|right| Action::Seal(lease, stream, right)));
            }
            actions.extend([
                Action::Claim(lease),
                Action::Commit(lease),
                Action::Abort(lease),
            ]);
        }
        for i in 0..self.tickets.len() {
            actions.extend(
                [Arrived::Whole, Arrived::Changed, Arrived::GivenUp]
                    .map(|arrived| Action::Finish(i, arrived)),
            );
        }
        actions
    }

    /// Blocks came back: nobody may be writing them.
    fn freed(&mut self, blocks: Option<u64>) {
        let Some(lease) = blocks else { return };
        assert!(
            self.tickets.iter().all(|(of, _)| *of != lease),
            "freed under a writer"
        );
        self.ends[lease as usize - 1] += 1;
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Reserve => {
                let lease = self.contents.len() as u64 + 1;
                let reserved = self
                    .leases
                    .reserve(self.now, key(lease as u32), plan(), TTL, lease);
                let (given, older) = reserved.unwrap();
                assert_eq!(given, lease);
                self.contents.push([Content::Old; 2]);
                self.ends.push(0);
                self.senders.push("");
                self.freed(older);
            }
            Action::Open(lease, sender) => {
                self.opens += 1;
                if self.leases.open(self.now, &identity(lease, sender)).is_ok() {
                    let bound = &mut self.senders[lease as usize - 1];
                    assert!(
                        bound.is_empty() || *bound == sender,
                        "two senders on one lease"
                    );
                    *bound = sender;
                }
            }
            Action::Begin(lease, stream, piece) => {
                let Ok(ticket) = self.leases.begin(self.now, lease, stream, piece) else {
                    return;
                };
                let writers = self.tickets.iter().filter(|(of, _)| *of == lease).count();
                assert_eq!(writers, 0, "two writers at once");
                for layer in piece.layer_range() {
                    let content = &mut self.contents[lease as usize - 1][layer as usize];
                    *content = Content::Torn;
                }
                self.tickets.push((lease, ticket));
            }
            Action::Finish(i, arrived) => {
                let (lease, ticket) = self.tickets.remove(i);
                let piece = ticket.piece();
                let sender = self.senders[lease as usize - 1];
                let mut sums: Vec<u64> = piece.layer_range().map(truth).collect();
                let claimed = checksum::piece(identity(lease, sender).seed(), &piece, &sums);
                if matches!(arrived, Arrived::Changed) {
                    sums[0] ^= 1;
                }
                let whole = matches!(arrived, Arrived::Whole);
                if whole {
                    for layer in piece.layer_range() {
                        self.contents[lease as usize - 1][layer as usize] = Content::Good;
                    }
                }
                let written =
                    (!matches!(arrived, Arrived::GivenUp)).then_some((claimed, &sums[..]));
                let (result, freed) = self.leases.finish(self.now, lease, ticket, written);
                assert!(
                    whole || written.is_none() || result.is_err(),
                    "changed bytes passed"
                );
                self.freed(freed);
            }
            Action::Seal(lease, stream, right) => {
                let sender = self.senders[lease as usize - 1];
                let seed = identity(lease, sender).seed();
                let claimed = checksum::seal(seed, [0, 1].map(truth)) ^ u64::from(!right);
                let (result, freed) = self.leases.seal(self.now, lease, stream, claimed);
                assert!(right || result.is_err(), "a wrong seal passed");
                self.freed(freed);
            }
            Action::Claim(lease) => {
                let _ = self.leases.claim(lease, &key(lease as u32));
            }
            Action::Commit(lease) => {
                if self.leases.commit(lease).is_ok() {
                    let contents = self.contents[lease as usize - 1];
                    assert_eq!(contents, [Content::Good; 2], "used before it was whole");
                    self.freed(Some(lease));
                }
            }
            Action::Abort(lease) => {
                let freed = self.leases.abort(lease, Ended::Released).1;
                self.freed(freed);
            }
            Action::Expire => {
                for lease in self.leases.expired(self.now + TTL) {
                    let freed = self.leases.abort(lease, Ended::Expired).1;
                    self.freed(freed);
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        for (i, contents) in self.contents.iter().enumerate() {
            assert!(self.ends[i] <= 1, "a reservation ended twice");
            if let Ok(lease) = self.leases.get(i as u64 + 1) {
                assert_eq!(self.ends[i], 0, "an ended reservation is still held");
                let have = lease.have()[0] as usize;
                assert!(
                    contents[..have].iter().all(|c| *c == Content::Good),
                    "have what is torn"
                );
            } else {
                assert_eq!(self.ends[i], 1, "a reservation vanished");
            }
        }
    }

    /// Whatever happened, everything comes back once the writers stop.
    fn wind_down(mut self) {
        while !self.tickets.is_empty() {
            self.apply(Action::Finish(0, Arrived::GivenUp));
        }
        for lease in 1..=self.contents.len() as u64 {
            self.apply(Action::Abort(lease));
        }
        assert!(self.leases.is_empty());
        assert!(self.ends.iter().all(|ends| *ends == 1));
    }
}

/// Goes through every state that `leases` attempts and `opens` streams can reach; returns how many there are, and in how
/// many a lease was used.
fn explore(leases: usize, opens: u32) -> (usize, usize) {
    let mut seen = HashSet::new();
    let mut queue = vec![World::new(Instant::now())];
    let mut commits = 0;
    while let Some(world) = queue.pop() {
        for action in world.actions(leases, opens) {
            let mut next = world.clone();
            next.apply(action);
            let ended = next.ends != world.ends;
            commits += usize::from(ended && matches!(action, Action::Commit(_)));
            if seen.insert(format!("{next:?}")) {
                next.clone().wind_down();
                queue.push(next);
            }
        }
    }
    (seen.len(), commits)
}

#[test]
fn every_state_of_one_lease_and_three_streams_keeps_the_invariants() {
    let (states, commits) = explore(1, 3);
    // The enumeration is not vacuous.
    assert!(
        states > 500 && commits > 20,
        "{states} states, {commits} commits"
    );
}

#[test]
fn every_state_of_two_attempts_and_two_streams_keeps_the_invariants() {
    let (states, commits) = explore(2, 2);
    assert!(
        states > 5_000 && commits > 100,
        "{states} states, {commits} commits"
    );
}

#[test]
fn a_late_attempt_and_a_late_life_are_refused() {
    let now = Instant::now();
    let mut leases = Leases::new("here".into(), vec![1], 8);
    let (second, _) = leases.reserve(now, key(2), plan(), TTL, ()).unwrap();
    assert_eq!(
        leases.reserve(now, key(1), plan(), TTL, ()).unwrap_err().0,
        Refusal::Superseded,
        "an older attempt comes late"
    );
    let good = Identity {
        key: key(2),
        ..identity(second, "a")
    };
    let cases = [
        (
            Identity {
                key: key(1),
                ..good.clone()
            },
            Refusal::Superseded,
        ),
        (
            Identity {
                receiver: "before".into(),
                ..good.clone()
            },
            Refusal::WrongReceiver,
        ),
        (
            Identity {
                fingerprint: vec![2],
                ..good.clone()
            },
            Refusal::WrongFormat,
        ),
        (
            Identity {
                lease: 99,
                ..good.clone()
            },
            Refusal::Unknown,
        ),
        (
            Identity {
                plan: Plan {
                    total_tokens: 3,
                    ..plan()
                },
                ..good.clone()
            },
            Refusal::WrongPlan,
        ),
    ];
    for (identity, refusal) in cases {
        assert_eq!(leases.open(now, &identity).unwrap_err(), refusal);
    }
    leases.open(now, &good).unwrap();
    let other = Identity {
        sender: "b".into(),
        ..good
    };
    assert_eq!(leases.open(now, &other).unwrap_err(), Refusal::OtherSender);
}

#[test]
fn expiry_looks_at_all_leases_and_spares_those_in_use() {
    let now = Instant::now();
    let mut leases = Leases::new("here".into(), vec![1], 8);
    let mut ids = vec![];
    for (i, ttl) in [10, 1, 10, 1].into_iter().enumerate() {
        let key = Key {
            request: i.to_string(),
            attempt: 0,
        };
        ids.push(leases.reserve(now, key, plan(), TTL * ttl, i).unwrap().0);
    }
    leases
        .claim(
            ids[3],
            &Key {
                request: "3".into(),
                attempt: 0,
            },
        )
        .unwrap();
    assert_eq!(leases.expired(now + TTL * 2), [ids[1]]);
    assert_eq!(leases.expired(now + TTL * 20), [ids[0], ids[1], ids[2]]);
    leases.abort(ids[1], Ended::Expired);
    assert_eq!(
        leases.get(ids[1]).unwrap_err(),
        Refusal::Ended(Ended::Expired)
    );
}
