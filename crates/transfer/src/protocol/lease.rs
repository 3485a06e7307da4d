//! One reservation at the receiver.

use std::time::{Duration, Instant};

use planted::Bug;

use crate::{
    checksum,
    geometry::{Piece, Plan},
    identity::{Identity, Key},
    protocol::Ended,
};

/// Where a reservation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Blocks are set aside; pieces may come.
    Open,
    /// Everything arrived and was verified.
    Sealed,
    /// The blocks belong to a running sequence. Nothing more happens here.
    Committed,
    /// It ended without use. The blocks are free as soon as nobody writes them.
    Aborted(Ended),
}

/// Why the receiver does not do what a peer asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Nothing is known about this lease.
    #[error("no such lease")]
    Unknown,
    /// It ended.
    #[error("the lease {0}")]
    Ended(Ended),
    /// It was used already.
    #[error("the lease was committed already")]
    Committed,
    /// Meant for another life of this worker.
    #[error("meant for another incarnation of this worker")]
    WrongReceiver,
    /// The bytes mean something else here.
    #[error("the KV format differs")]
    WrongFormat,
    /// The lease is somebody else's.
    #[error("the lease belongs to another request or attempt")]
    WrongRequest,
    /// Sizes differ from what was reserved.
    #[error("the transfer differs in size from what was reserved")]
    WrongPlan,
    /// Another worker, or another life of it, fills this lease.
    #[error("another sender fills this lease")]
    OtherSender,
    /// A newer attempt of the same request exists.
    #[error("a newer attempt of the request exists")]
    Superseded,
    /// A newer stream of the same transfer exists.
    #[error("a newer stream carries this transfer")]
    StaleStream,
    /// A stream before this one still writes.
    #[error("an older stream has not stopped yet")]
    Busy,
    /// Not a part of the transfer.
    #[error("a piece lies outside the transfer")]
    Outside,
    /// Verified before: it is not overwritten.
    #[error("a piece was sent twice")]
    Repeated,
    /// The bytes or their header changed on the way.
    #[error("a piece failed its checksum")]
    Corrupt,
    /// Sealed with pieces missing.
    #[error("sealed before everything arrived")]
    Incomplete,
    /// The seal does not match what arrived.
    #[error("the seal does not match what arrived")]
    SealMismatch,
    /// Used before the seal.
    #[error("the transfer is not complete")]
    NotSealed,
    /// Two wait for the same lease.
    #[error("somebody waits for the lease already")]
    Claimed,
    /// Too many reservations at once.
    #[error("too many leases")]
    TooMany,
}

/// Leave to write one piece. Given back with [`Lease::finish`]; until then the blocks are not freed.
#[derive(Debug, PartialEq, Eq, Hash)]
#[cfg_attr(test, derive(Clone))]
#[must_use]
pub struct Ticket {
    stream: u64,
    piece: Piece,
}

impl Ticket {
    /// What may be written.
    pub fn piece(&self) -> Piece {
        self.piece
    }
}

/// One reservation: which parts have arrived, who may write, and how it ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    key: Key,
    phase: Phase,
    sender: Option<String>,
    /// Number of the newest stream; only it may write.
    stream: u64,
    /// Checksum over the transfer's identity, known once it was opened.
    seed: u64,
    writing: bool,
    /// For every part, in order, the checksum of its verified bytes.
    sums: Vec<Option<u64>>,
    layers: u32,
    bytes: u64,
    /// Somebody waits for it: it no longer expires by itself.
    claimed: bool,
    expires: Instant,
    ttl: Duration,
}

impl Lease {
    /// A reservation for `plan`, which expires when nothing happens for `ttl`.
    pub fn new(now: Instant, key: Key, plan: &Plan, ttl: Duration) -> Self {
        Self {
            key,
            phase: Phase::Open,
            sender: None,
            stream: 0,
            seed: 0,
            writing: false,
            sums: vec![None; plan.parts()],
            layers: plan.geometry.layers,
            bytes: 0,
            claimed: false,
            expires: now + ttl,
            ttl,
        }
    }

    /// Whose it is.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Verified bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a piece is being written.
    pub fn is_writing(&self) -> bool {
        self.writing
    }

    /// Whether its blocks may be freed: it was aborted and nobody writes.
    pub fn is_freeable(&self) -> bool {
        matches!(self.phase, Phase::Aborted(_)) && !self.writing
    }

    fn live(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Open | Phase::Sealed => Ok(()),
            Phase::Committed => Err(Refusal::Committed),
            Phase::Aborted(ended) => Err(Refusal::Ended(ended)),
        }
    }

    fn touch(&mut self, now: Instant) {
        self.expires = self.expires.max(now + self.ttl);
    }

    /// A sender begins or resumes. Older streams may not write from here on. Returns the number of the stream; if an
    /// older one is in the middle of a piece, [`Lease::begin`] says [`Refusal::Busy`] until it stopped.
    ///
    /// Parts behind a hole are forgotten, so that [`Lease::have`] says all there is to know.
    pub fn open(&mut self, now: Instant, identity: &Identity, plan: &Plan) -> Result<u64, Refusal> {
        self.live()?;
        if identity.key.request != self.key.request {
            return Err(Refusal::WrongRequest);
        }
        if identity.key.attempt != self.key.attempt {
            return Err(Refusal::Superseded);
        }
        if identity.plan != *plan {
            return Err(Refusal::WrongPlan);
        }
        match &self.sender {
            Some(sender) if *sender != identity.sender => return Err(Refusal::OtherSender),
            Some(_) => {}
            None => self.sender = Some(identity.sender.clone()),
        }
        self.touch(now);
        self.seed = identity.seed();
        self.stream += 1;
        if self.phase == Phase::Open {
            for block in self.sums.chunks_mut(self.layers as usize) {
                let hole = block
                    .iter()
                    .position(Option::is_none)
                    .unwrap_or(block.len());
                block[hole..].fill(None);
            }
        }
        Ok(self.stream)
    }

    /// For every block to move, how many leading layers are here.
    pub fn have(&self) -> Vec<u32> {
        self.sums
            .chunks(self.layers as usize)
            .map(|block| block.iter().take_while(|sum| sum.is_some()).count() as u32)
            .collect()
    }

    /// A piece arrives on stream `stream`: may it be written?
    pub fn begin(
        &mut self,
        now: Instant,
        stream: u64,
        piece: Piece,
        plan: &Plan,
    ) -> Result<Ticket, Refusal> {
        self.live()?;
        if stream != self.stream {
            return Err(Refusal::StaleStream);
        }
        if self.writing {
            return Err(Refusal::Busy);
        }
        if !plan.holds(&piece) {
            return Err(Refusal::Outside);
        }
        let first = plan.part(piece.block, piece.first_layer);
        if self.sums[first..first + piece.layers as usize]
            .iter()
            .any(Option::is_some)
        {
            return Err(Refusal::Repeated);
        }
        self.touch(now);
        self.writing = true;
        Ok(Ticket { stream, piece })
    }

    /// The piece of `ticket` is written, or given up (`None`). `written`: its header's checksum and the checksums of
    /// its layers' bytes as they arrived. It counts only if they match and the stream is still the newest.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "giving the ticket back ends it"
    )]
    pub fn finish(
        &mut self,
        now: Instant,
        ticket: Ticket,
        written: Option<(u64, &[u64])>,
        plan: &Plan,
    ) -> Result<(), Refusal> {
        self.writing = false;
        let Some((claimed, sums)) = written else {
            return Ok(());
        };
        self.live()?;
        let Ticket { stream, piece } = ticket;
        if stream != self.stream {
            return Err(Refusal::StaleStream);
        }
        let is_intact = sums.len() == piece.layers as usize
            && checksum::piece(self.seed, &piece, sums) == claimed;
        if !is_intact && !planted::is(Bug::Unverified) {
            return Err(Refusal::Corrupt);
        }
        let first = plan.part(piece.block, piece.first_layer);
        for (slot, sum) in self.sums[first..].iter_mut().zip(sums) {
            *slot = Some(*sum);
        }
        self.bytes += piece.bytes(&plan.geometry) as u64;
        self.touch(now);
        Ok(())
    }

    /// The sender says that everything was sent. A seal that does not match ends the lease: bytes that verified one by
    /// one but not together are nothing to build on.
    pub fn seal(&mut self, now: Instant, stream: u64, claimed: u64) -> Result<(), Refusal> {
        self.live()?;
        if stream != self.stream {
            return Err(Refusal::StaleStream);
        }
        if self.writing {
            return Err(Refusal::Busy);
        }
        if self.sums.iter().any(Option::is_none) && !planted::is(Bug::BrokenIsFinished) {
            return Err(Refusal::Incomplete);
        }
        let is_whole = checksum::seal(self.seed, self.sums.iter().flatten().copied()) == claimed;
        if !is_whole && !planted::is(Bug::Unverified) && !planted::is(Bug::BrokenIsFinished) {
            self.abort(Ended::Corrupt);
            return Err(Refusal::SealMismatch);
        }
        self.phase = Phase::Sealed;
        self.touch(now);
        Ok(())
    }

    /// A sequence takes the blocks over.
    pub fn commit(&mut self) -> Result<(), Refusal> {
        self.live()?;
        if self.phase != Phase::Sealed || self.writing {
            return Err(Refusal::NotSealed);
        }
        self.phase = Phase::Committed;
        Ok(())
    }

    /// Somebody waits for the seal and answers for the lease: it no longer expires by itself.
    pub fn claim(&mut self, key: &Key) -> Result<(), Refusal> {
        self.live()?;
        if self.key.request != key.request {
            return Err(Refusal::WrongRequest);
        }
        if self.key.attempt != key.attempt {
            return Err(Refusal::Superseded);
        }
        if self.claimed {
            return Err(Refusal::Claimed);
        }
        self.claimed = true;
        Ok(())
    }

    /// Ends it without use. Returns whether it was alive.
    pub fn abort(&mut self, why: Ended) -> bool {
        let alive = self.live().is_ok();
        if alive {
            self.phase = Phase::Aborted(why);
        }
        alive
    }

    /// Whether its time is over.
    pub fn is_expired(&self, now: Instant) -> bool {
        self.live().is_ok() && !self.claimed && now >= self.expires
    }
}
