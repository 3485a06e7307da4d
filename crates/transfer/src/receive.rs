//! The receiver: [`Leases`] over a worker's own cache. Pieces go straight into the reserved blocks, which nobody reads
//! before the lease is committed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use kernels::BlockMemory;
use parking_lot::Mutex;
use planted::Bug;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    checksum::Sum,
    geometry::{Geometry, Piece, Plan},
    identity::{Identity, Key},
    protocol::{Ended, Leases, Phase, Refusal, Ticket},
};

/// Blocks that were set aside for one transfer. They are free when this is dropped.
pub trait Reserved: Send + 'static {
    /// Ids of the blocks in the receiver's memory, from the start of the sequence.
    fn ids(&self) -> Vec<u32>;
}

/// What a receiver tells about its work, for metrics. Called outside of locks; must return at once.
pub trait Observer: Send + Sync + 'static {
    /// Bytes were placed and verified.
    fn received(&self, bytes: u64);
    /// A lease ended without use.
    fn ended(&self, why: Ended);
    /// Something a peer asked for was refused.
    fn refused(&self, why: Refusal);
}

/// Fixed facts of a receiver.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This life of the worker.
    pub incarnation: String,
    /// What the bytes of a block mean.
    pub fingerprint: Vec<u8>,
    /// Shape of a block.
    pub geometry: Geometry,
    /// Leases at once, at most.
    pub max_leases: usize,
    /// Bytes of one piece, at most.
    pub max_piece_bytes: usize,
    /// A stream that says nothing for so long is given up (its lease is not).
    pub idle: Duration,
}

impl Settings {
    /// The usual limits.
    pub fn new(incarnation: String, fingerprint: Vec<u8>, geometry: Geometry) -> Self {
        let max_piece_bytes = geometry.block_bytes().min(MAX_PIECE_BYTES);
        let idle = Duration::from_secs(30);
        Self {
            incarnation,
            fingerprint,
            geometry,
            max_leases: 1024,
            max_piece_bytes,
            idle,
        }
    }
}

/// One piece at most: several layers, so that a small message does not pay for a header each.
pub const MAX_PIECE_BYTES: usize = 4 << 20;

/// Why bytes could not be placed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The protocol says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The cache did not take the bytes.
    #[error("writing to the cache: {0}")]
    Memory(#[from] kernels::Error),
}

/// What the table keeps for a lease beside its state.
#[derive(Debug)]
struct Held<B> {
    blocks: B,
    ids: Arc<[u32]>,
    plan: Plan,
    phase: watch::Sender<Phase>,
    /// Stops the newest stream: cancelled by a newer one, and when the lease ends.
    stop: CancellationToken,
    /// Says when a writer stopped.
    quiet: Arc<Notify>,
}

struct Inner<B> {
    settings: Settings,
    memory: Arc<dyn BlockMemory>,
    observer: Arc<dyn Observer>,
    leases: Mutex<Leases<Held<B>>>,
}

/// The receiving end of a worker; clones share it.
pub struct Receiver<B>(Arc<Inner<B>>);

impl<B> Clone for Receiver<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// Time as tokio knows it, so that paused and simulated time work.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl<B: Reserved> Receiver<B> {
    /// A receiver that writes to `memory`.
    pub fn new(
        settings: Settings,
        memory: Arc<dyn BlockMemory>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let leases = Leases::new(
            settings.incarnation.clone(),
            settings.fingerprint.clone(),
            settings.max_leases,
        );
        Self(Arc::new(Inner {
            settings,
            memory,
            observer,
            leases: Mutex::new(leases),
        }))
    }

    /// Its fixed facts.
    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// Sets `blocks` aside for a transfer of `plan`. The lease ends by itself when nothing happens for `ttl`.
    pub fn reserve(&self, key: Key, plan: Plan, ttl: Duration, blocks: B) -> Result<u64, Refusal> {
        let ids: Arc<[u32]> = blocks.ids().into();
        if ids.len() < plan.total_blocks() as usize {
            return Err(Refusal::WrongPlan);
        }
        let held = Held {
            ids,
            blocks,
            plan,
            phase: watch::Sender::new(Phase::Open),
            stop: CancellationToken::new(),
            quiet: Arc::new(Notify::new()),
        };
        let result = self.0.leases.lock().reserve(now(), key, plan, ttl, held);
        match result {
            Ok((lease, superseded)) => {
                if let Some(older) = superseded {
                    self.ended(Some(older), Ended::Superseded);
                }
                Ok(lease)
            }
            Err((refusal, _held)) => {
                self.0.observer.refused(refusal);
                Err(refusal)
            }
        }
    }

    /// Gives a lease back that will not be used. `false`: it had ended already.
    pub fn release(&self, lease: u64) -> bool {
        self.abort(lease, Ended::Released)
    }

    fn abort(&self, lease: u64, why: Ended) -> bool {
        let (alive, freed) = {
            let mut leases = self.0.leases.lock();
            let result = leases.abort(lease, why);
            if result.1.is_none()
                && let Ok(held) = leases.blocks(lease)
            {
                // A writer is still at it: it is told to stop, and the blocks stay until it did.
                held.phase.send_replace(Phase::Aborted(why));
                held.stop.cancel();
            }
            result
        };
        if alive {
            self.ended(freed, why);
        }
        alive
    }

    fn ended(&self, freed: Option<Held<B>>, why: Ended) {
        if let Some(held) = freed {
            held.phase.send_replace(Phase::Aborted(why));
            held.stop.cancel();
        }
        self.0.observer.ended(why);
    }

    /// Ends leases whose time is over. To be called a few times a second.
    pub fn sweep(&self) {
        let expired = self.0.leases.lock().expired(now());
        for lease in expired {
            self.abort(lease, Ended::Expired);
        }
    }

    /// Ends every lease: the worker leaves.
    pub fn end_all(&self) {
        let all = self.0.leases.lock().ids();
        for lease in all {
            self.abort(lease, Ended::Draining);
        }
    }

    /// Leases that hold blocks.
    pub fn leases(&self) -> usize {
        self.0.leases.lock().len()
    }

    /// Waits for a lease's transfer on behalf of the sequence that will use it. Dropping the claim ends the lease.
    pub fn claim(&self, lease: u64, key: &Key) -> Result<Claim<B>, Refusal> {
        let mut leases = self.0.leases.lock();
        leases
            .claim(lease, key)
            .inspect_err(|refusal| self.0.observer.refused(*refusal))?;
        let phase = leases.blocks(lease)?.phase.subscribe();
        drop(leases);
        Ok(Claim {
            receiver: self.clone(),
            lease,
            phase,
            done: false,
        })
    }

    /// One stream of a sender.
    pub fn session(&self) -> Session<B> {
        Session {
            receiver: self.clone(),
            stream: None,
            writing: None,
        }
    }
}

/// The right of one sequence to use a lease.
pub struct Claim<B: Reserved> {
    receiver: Receiver<B>,
    lease: u64,
    phase: watch::Receiver<Phase>,
    done: bool,
}

impl<B: Reserved> Claim<B> {
    /// Waits until everything arrived and was verified. The caller sets the deadline.
    pub async fn sealed(&mut self) -> Result<(), Refusal> {
        let phase = self.phase.wait_for(|phase| *phase != Phase::Open).await;
        match phase.map(|phase| *phase) {
            Ok(Phase::Sealed) => Ok(()),
            Ok(Phase::Aborted(why)) => Err(Refusal::Ended(why)),
            Ok(Phase::Committed) => Err(Refusal::Committed),
            Ok(Phase::Open) | Err(_) => Err(Refusal::Unknown),
        }
    }

    /// Takes the blocks over, and says how many bytes arrived.
    pub fn commit(mut self) -> Result<(B, u64), Refusal> {
        let mut leases = self.receiver.0.leases.lock();
        let bytes = leases.get(self.lease)?.bytes();
        let held = leases.commit(self.lease)?;
        drop(leases);
        self.done = true;
        held.phase.send_replace(Phase::Committed);
        held.stop.cancel();
        Ok((held.blocks, bytes))
    }
}

impl<B: Reserved> Drop for Claim<B> {
    fn drop(&mut self) {
        if !self.done && !planted::is(Bug::ClaimKept) {
            self.receiver.abort(self.lease, Ended::Released);
        }
    }
}

struct Stream {
    lease: u64,
    number: u64,
    plan: Plan,
    ids: Arc<[u32]>,
    stop: CancellationToken,
}

struct Writing {
    ticket: Ticket,
    claimed: u64,
    placed: usize,
    sum: Sum,
    sums: Vec<u64>,
}

/// One stream of a sender. Dropping it gives up the piece it was writing.
pub struct Session<B: Reserved> {
    receiver: Receiver<B>,
    stream: Option<Stream>,
    writing: Option<Writing>,
}

/// How long a new stream waits for the one before it to stop.
const FENCE: Duration = Duration::from_secs(5);

impl<B: Reserved> Session<B> {
    /// The sender names the transfer. Returns how many leading layers of each block are here, once no older stream
    /// writes any more.
    pub async fn open(&mut self, identity: &Identity) -> Result<Vec<u32>, Refusal> {
        self.give_up();
        let deadline = tokio::time::Instant::now() + FENCE;
        loop {
            let quiet = {
                let mut leases = self.receiver.0.leases.lock();
                let number = leases.open(now(), identity)?;
                let lease = identity.lease;
                let (writing, have) = {
                    let state = leases.get(lease)?;
                    (state.is_writing(), state.have())
                };
                let held = leases.blocks_mut(lease)?;
                let older = std::mem::take(&mut held.stop);
                older.cancel();
                if !writing {
                    let (plan, ids, stop) = (held.plan, Arc::clone(&held.ids), held.stop.clone());
                    self.stream = Some(Stream {
                        lease,
                        number,
                        plan,
                        ids,
                        stop,
                    });
                    return Ok(have);
                }
                // Made before the lock is given back, so that it cannot miss the writer.
                Arc::clone(&held.quiet).notified_owned()
            };
            tokio::time::timeout_at(deadline, quiet)
                .await
                .map_err(|_| Refusal::Busy)?;
        }
    }

    /// Cancelled when this stream has to stop.
    pub fn stopped(&self) -> CancellationToken {
        self.stream
            .as_ref()
            .map_or_else(CancellationToken::new, |stream| stream.stop.clone())
    }

    /// A piece begins; `bytes` of payload follow.
    pub fn piece(&mut self, piece: Piece, claimed: u64, bytes: usize) -> Result<(), Refusal> {
        let stream = self.stream.as_ref().ok_or(Refusal::Unknown)?;
        if bytes != piece.bytes(&stream.plan.geometry) {
            return Err(Refusal::Outside);
        }
        let ticket =
            self.receiver
                .0
                .leases
                .lock()
                .begin(now(), stream.lease, stream.number, piece)?;
        let sums = Vec::with_capacity(piece.layers as usize);
        self.writing = Some(Writing {
            ticket,
            claimed,
            placed: 0,
            sum: Sum::new(),
            sums,
        });
        Ok(())
    }

    /// Some of the piece's payload; `true` with the last of it. Placed at once, and read for its checksum while it is
    /// still in the processor's cache. Returns the bytes of the piece when it is complete and verified.
    pub fn bytes(&mut self, data: &[u8], last: bool) -> Result<Option<u64>, Error> {
        let (Some(stream), Some(writing)) = (&self.stream, &mut self.writing) else {
            return Err(Refusal::Unknown.into());
        };
        let piece = writing.ticket.piece();
        let geometry = &stream.plan.geometry;
        let layer_bytes = piece.layer_bytes(geometry);
        let start = piece.range(geometry).start + writing.placed;
        let place = if planted::is(Bug::WrongEnd) {
            piece.block - stream.plan.first_block
        } else {
            piece.block
        };
        let block = stream.ids[place as usize] as usize;
        self.receiver
            .0
            .memory
            .write(block, start..start + data.len(), &mut |to| {
                to.copy_from_slice(data);
            })?;
        let mut rest = data;
        while !rest.is_empty() {
            let left = layer_bytes - writing.placed % layer_bytes;
            let (now, later) = rest.split_at(left.min(rest.len()));
            writing.sum.update(now);
            writing.placed += now.len();
            if writing.placed % layer_bytes == 0 {
                writing.sums.push(std::mem::take(&mut writing.sum).finish());
            }
            rest = later;
        }
        if !last {
            return Ok(None);
        }
        let bytes = writing.placed as u64;
        self.finish(true)?;
        self.receiver.0.observer.received(bytes);
        Ok(Some(bytes))
    }

    /// Everything was sent.
    pub fn seal(&mut self, claimed: u64) -> Result<(), Refusal> {
        let stream = self.stream.as_ref().ok_or(Refusal::Unknown)?;
        let (result, freed) = {
            let mut leases = self.receiver.0.leases.lock();
            let result = leases.seal(now(), stream.lease, stream.number, claimed);
            if result.0.is_ok()
                && let Ok(held) = leases.blocks(stream.lease)
            {
                held.phase.send_replace(Phase::Sealed);
            }
            result
        };
        if freed.is_some() {
            self.receiver.ended(freed, Ended::Corrupt);
        }
        result
    }

    fn give_up(&mut self) {
        // What it refuses is what this stream would have heard, and this stream is over.
        let _ = self.finish(false);
    }

    /// Gives the ticket back, and with it the blocks if the lease ended meanwhile.
    fn finish(&mut self, complete: bool) -> Result<(), Refusal> {
        let (Some(stream), Some(writing)) = (&self.stream, self.writing.take()) else {
            return Ok(());
        };
        let written = complete.then_some((writing.claimed, &writing.sums[..]));
        let mut leases = self.receiver.0.leases.lock();
        let (result, freed) = leases.finish(now(), stream.lease, writing.ticket, written);
        if let Ok(held) = leases.blocks(stream.lease) {
            held.quiet.notify_waiters();
        }
        drop(leases);
        if let Some(held) = &freed {
            held.quiet.notify_waiters();
        }
        result
    }

    /// The receiver's limits.
    pub fn settings(&self) -> &Settings {
        self.receiver.settings()
    }

    /// Notes a refusal for the metrics.
    pub fn refused(&self, why: Refusal) {
        self.receiver.0.observer.refused(why);
    }
}

impl<B: Reserved> Drop for Session<B> {
    fn drop(&mut self) {
        self.give_up();
        if planted::is(Bug::BrokenIsFinished) {
            let _ = self.seal(0);
        }
    }
}
