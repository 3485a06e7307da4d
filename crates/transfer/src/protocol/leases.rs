//! All reservations of one receiver.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    time::{Duration, Instant},
};

use crate::{
    geometry::{Piece, Plan},
    identity::{Identity, Key},
    protocol::{Lease, Phase, Refusal, Ticket},
};

/// How a lease ended without use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ended {
    /// Given back by the router, or by the sequence that waited for it.
    Released,
    /// Nothing happened for too long.
    Expired,
    /// A newer attempt of the request took its place.
    Superseded,
    /// What arrived did not match its seal.
    Corrupt,
    /// The worker leaves.
    Draining,
}

impl Ended {
    /// Short name for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Superseded => "superseded",
            Self::Corrupt => "corrupt",
            Self::Draining => "draining",
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Released => "was given back",
            Self::Expired => "expired",
            Self::Superseded => "was superseded by a newer attempt",
            Self::Corrupt => "ended because its bytes did not match",
            Self::Draining => "ended because the worker is leaving",
        })
    }
}

/// How many endings are remembered, so that whoever comes late hears what happened.
const REMEMBERED: usize = 1024;

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Entry<B> {
    lease: Lease,
    plan: Plan,
    blocks: B,
}

/// The reservations of a receiver's life. `B` owns a reservation's blocks: they are free when it is dropped, so it only
/// ever leaves this table once nobody can write them any more.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub struct Leases<B> {
    incarnation: String,
    fingerprint: Vec<u8>,
    limit: usize,
    last: u64,
    entries: BTreeMap<u64, Entry<B>>,
    newest: HashMap<String, u64>,
    endings: VecDeque<(u64, Refusal)>,
}

impl<B> Leases<B> {
    /// None yet, `limit` at most, for this life of the receiver and this format of bytes.
    pub fn new(incarnation: String, fingerprint: Vec<u8>, limit: usize) -> Self {
        Self {
            incarnation,
            fingerprint,
            limit,
            last: 0,
            entries: BTreeMap::new(),
            newest: HashMap::new(),
            endings: VecDeque::new(),
        }
    }

    /// Reservations that hold blocks (those that wait for a writer to stop included).
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no blocks are held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// One reservation, or what became of it.
    pub fn get(&self, id: u64) -> Result<&Lease, Refusal> {
        self.entries
            .get(&id)
            .map(|entry| &entry.lease)
            .ok_or_else(|| self.ending(id))
    }

    fn ending(&self, id: u64) -> Refusal {
        let known = self.endings.iter().rev().find(|(lease, _)| *lease == id);
        known.map_or(Refusal::Unknown, |(_, ending)| *ending)
    }

    fn entry(&mut self, id: u64) -> Result<&mut Entry<B>, Refusal> {
        let ending = self.ending(id);
        self.entries.get_mut(&id).ok_or(ending)
    }

    /// Sets `blocks` aside for `key`. An older attempt of the same request ends here; its blocks come back in the
    /// second value when nobody writes them.
    pub fn reserve(
        &mut self,
        now: Instant,
        key: Key,
        plan: Plan,
        ttl: Duration,
        blocks: B,
    ) -> Result<(u64, Option<B>), (Refusal, B)> {
        let before = self.newest.get(&key.request).copied();
        let older = before.and_then(|id| self.entries.get(&id));
        if older.is_some_and(|entry| entry.lease.key().attempt > key.attempt) {
            return Err((Refusal::Superseded, blocks));
        }
        if self.entries.len() >= self.limit {
            return Err((Refusal::TooMany, blocks));
        }
        let freed = before.and_then(|id| self.abort(id, Ended::Superseded).1);
        self.last += 1;
        let lease = Lease::new(now, key.clone(), &plan, ttl);
        self.newest.insert(key.request, self.last);
        self.entries.insert(
            self.last,
            Entry {
                lease,
                plan,
                blocks,
            },
        );
        Ok((self.last, freed))
    }

    /// A sender begins or resumes: see [`Lease::open`].
    pub fn open(&mut self, now: Instant, identity: &Identity) -> Result<u64, Refusal> {
        if identity.receiver != self.incarnation {
            return Err(Refusal::WrongReceiver);
        }
        if identity.fingerprint != self.fingerprint {
            return Err(Refusal::WrongFormat);
        }
        let entry = self.entry(identity.lease)?;
        entry.lease.open(now, identity, &entry.plan)
    }

    /// A piece arrives: see [`Lease::begin`].
    pub fn begin(
        &mut self,
        now: Instant,
        id: u64,
        stream: u64,
        piece: Piece,
    ) -> Result<Ticket, Refusal> {
        let entry = self.entry(id)?;
        entry.lease.begin(now, stream, piece, &entry.plan)
    }

    /// A piece is written or given up: see [`Lease::finish`]. If the lease ended meanwhile and waited for this writer,
    /// its blocks come back.
    pub fn finish(
        &mut self,
        now: Instant,
        id: u64,
        ticket: Ticket,
        written: Option<(u64, &[u64])>,
    ) -> (Result<(), Refusal>, Option<B>) {
        match self.entry(id) {
            Ok(entry) => {
                let result = entry.lease.finish(now, ticket, written, &entry.plan);
                (result, self.take_freeable(id))
            }
            Err(refusal) => (Err(refusal), None),
        }
    }

    /// Everything was sent: see [`Lease::seal`].
    pub fn seal(
        &mut self,
        now: Instant,
        id: u64,
        stream: u64,
        claimed: u64,
    ) -> (Result<(), Refusal>, Option<B>) {
        match self.entry(id) {
            Ok(entry) => {
                let result = entry.lease.seal(now, stream, claimed);
                (result, self.take_freeable(id))
            }
            Err(refusal) => (Err(refusal), None),
        }
    }

    /// Somebody waits for the seal: see [`Lease::claim`].
    pub fn claim(&mut self, id: u64, key: &Key) -> Result<(), Refusal> {
        self.entry(id)?.lease.claim(key)
    }

    /// A sequence takes the blocks of a sealed lease over.
    pub fn commit(&mut self, id: u64) -> Result<B, Refusal> {
        self.entry(id)?.lease.commit()?;
        self.remove(id, Refusal::Committed).ok_or(Refusal::Unknown)
    }

    /// Ends a lease without use. Says whether it was alive, and gives the blocks back unless somebody still writes
    /// them ([`Leases::finish`] gives them back then).
    pub fn abort(&mut self, id: u64, why: Ended) -> (bool, Option<B>) {
        let Ok(entry) = self.entry(id) else {
            return (false, None);
        };
        let alive = entry.lease.abort(why);
        (alive, self.take_freeable(id))
    }

    /// Leases whose time is over. Looks at all of them.
    pub fn expired(&self, now: Instant) -> Vec<u64> {
        self.entries
            .iter()
            .filter(|(_, entry)| entry.lease.is_expired(now))
            .map(|(id, _)| *id)
            .collect()
    }

    /// All leases that hold blocks.
    pub fn ids(&self) -> Vec<u64> {
        self.entries.keys().copied().collect()
    }

    /// What a lease holds.
    pub fn blocks(&self, id: u64) -> Result<&B, Refusal> {
        self.entries
            .get(&id)
            .map(|entry| &entry.blocks)
            .ok_or_else(|| self.ending(id))
    }

    /// What a lease holds.
    pub fn blocks_mut(&mut self, id: u64) -> Result<&mut B, Refusal> {
        Ok(&mut self.entry(id)?.blocks)
    }

    fn take_freeable(&mut self, id: u64) -> Option<B> {
        let lease = &self.entries.get(&id)?.lease;
        let Phase::Aborted(why) = lease.phase() else {
            return None;
        };
        if lease.is_freeable() {
            self.remove(id, Refusal::Ended(why))
        } else {
            None
        }
    }

    fn remove(&mut self, id: u64, ending: Refusal) -> Option<B> {
        let entry = self.entries.remove(&id)?;
        let request = &entry.lease.key().request;
        if self.newest.get(request) == Some(&id) {
            self.newest.remove(request);
        }
        if self.endings.len() == REMEMBERED {
            self.endings.pop_front();
        }
        self.endings.push_back((id, ending));
        Some(entry.blocks)
    }
}
