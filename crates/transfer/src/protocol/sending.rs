//! One transfer at the sender.

use std::{ops::Range, time::Duration};

use crate::{
    checksum,
    geometry::{Piece, Plan},
};

/// For every layer, how many leading tokens of the sequence are in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watermarks(Vec<u32>);

impl Watermarks {
    /// Nothing is filled yet.
    pub fn new(layers: u32) -> Self {
        Self(vec![0; layers as usize])
    }

    /// Tokens up to `end` are filled in `layers` (layers that do not exist are ignored).
    pub fn raise(&mut self, layers: Range<usize>, end: u32) {
        for layer in layers {
            if let Some(mark) = self.0.get_mut(layer) {
                *mark = end.max(*mark);
            }
        }
    }

    /// Leading tokens of `layer` that are filled.
    pub fn get(&self, layer: u32) -> u32 {
        self.0[layer as usize]
    }
}

/// What a sender does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send this.
    Piece(Piece),
    /// Send the seal with this checksum.
    Seal(u64),
    /// Wait for layers to fill, or for the answer to the seal.
    Wait,
}

/// What a sender does after a stream broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Open another stream after a pause.
    After(Duration),
    /// It will not work.
    GiveUp,
}

/// Streams that break one after the other without any progress, at most.
const MAX_FRUITLESS: u32 = 6;
/// The first pause; each fruitless stream doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// One transfer at the sender: what is still to be sent, in the order in which layers fill.
#[derive(Clone, Debug)]
pub struct Sending {
    plan: Plan,
    seed: u64,
    /// For every block to move, leading layers that were sent on this stream or are there already.
    sent: Vec<u32>,
    /// Checksum of every part that was ever sent.
    sums: Vec<Option<u64>>,
    /// Where to look first: pieces become ready next to each other.
    cursor: usize,
    complete: usize,
    sealing: bool,
    fruitless: u32,
    best: u64,
}

impl Sending {
    /// Nothing sent. `seed` is [`crate::Identity::seed`].
    pub fn new(plan: Plan, seed: u64) -> Self {
        Self {
            plan,
            seed,
            sent: vec![0; plan.blocks().len()],
            sums: vec![None; plan.parts()],
            cursor: 0,
            complete: 0,
            sealing: false,
            fruitless: 0,
            best: 0,
        }
    }

    /// A stream is open and the receiver says what it has. `false`: it claims what was never sent.
    pub fn opened(&mut self, have: &[u32]) -> bool {
        let layers = self.plan.geometry.layers as usize;
        let plausible = have.len() == self.sent.len()
            && have
                .iter()
                .zip(self.sums.chunks(layers))
                .all(|(have, sums)| {
                    sums.get(..*have as usize)
                        .is_some_and(|sums| sums.iter().all(Option::is_some))
                });
        if !plausible {
            return false;
        }
        self.sent.copy_from_slice(have);
        self.complete = self
            .sent
            .iter()
            .filter(|sent| **sent as usize == layers)
            .count();
        self.cursor = 0;
        self.sealing = false;
        let there = have.iter().map(|have| u64::from(*have)).sum();
        if there > self.best {
            self.best = there;
            self.fruitless = 0;
        }
        true
    }

    /// What to do, given what is filled: pieces of at most `max_bytes` (one layer at least).
    pub fn next(&self, filled: &Watermarks, max_bytes: usize) -> Next {
        if self.sealing {
            return Next::Wait;
        }
        if self.complete == self.sent.len() {
            return Next::Seal(checksum::seal(
                self.seed,
                self.sums.iter().flatten().copied(),
            ));
        }
        let blocks = self.sent.len();
        (0..blocks)
            .map(|i| (self.cursor + i) % blocks)
            .find_map(|i| self.ready(i, filled, max_bytes))
            .map_or(Next::Wait, Next::Piece)
    }

    /// The next piece of the `i`-th block, if its layers are filled.
    fn ready(&self, i: usize, filled: &Watermarks, max_bytes: usize) -> Option<Piece> {
        let geometry = &self.plan.geometry;
        let block = self.plan.first_block + i as u32;
        let (first_layer, end, tokens) =
            (self.sent[i], self.plan.end(block), self.plan.tokens(block));
        let most = if tokens == geometry.block_tokens {
            (max_bytes / geometry.layer_bytes()).max(1) as u32
        } else {
            1
        };
        let last = geometry.layers.min(first_layer + most);
        let layers = (first_layer..last)
            .take_while(|layer| filled.get(*layer) >= end)
            .count() as u32;
        (layers > 0).then_some(Piece {
            block,
            first_layer,
            layers,
            tokens,
        })
    }

    /// `piece` leaves; `sums` are the checksums of its layers. Returns the piece's checksum.
    pub fn sent(&mut self, piece: &Piece, sums: &[u64]) -> u64 {
        let first = self.plan.part(piece.block, piece.first_layer);
        for (slot, sum) in self.sums[first..].iter_mut().zip(sums) {
            *slot = Some(*sum);
        }
        let i = (piece.block - self.plan.first_block) as usize;
        self.sent[i] = piece.first_layer + piece.layers;
        if self.sent[i] == self.plan.geometry.layers {
            self.complete += 1;
        }
        self.cursor = (i + 1) % self.sent.len();
        checksum::piece(self.seed, piece, sums)
    }

    /// The seal leaves.
    pub fn sealing(&mut self) {
        self.sealing = true;
    }

    /// Whether it waits for the answer to the seal.
    pub fn is_sealing(&self) -> bool {
        self.sealing
    }

    /// The stream broke for a reason that may pass.
    pub fn broken(&mut self) -> Retry {
        self.fruitless += 1;
        if self.fruitless > MAX_FRUITLESS {
            return Retry::GiveUp;
        }
        Retry::After(FIRST_PAUSE * (1 << (self.fruitless - 1)))
    }
}
