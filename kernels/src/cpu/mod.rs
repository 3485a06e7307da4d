//! The CPU backend: the embedded default, and in its [`Cpu::reference`] form the oracle for every other backend.
//!
//! Activations are float32 in every precision, whatever products make of their inputs; weights stay as small as the
//! precision says; the cache rounds to its own type. Sums have one fixed order per output value, whatever the threads, the instruction set or the other rows.

mod backend;
mod cache;
mod fast;
mod memory;
mod multiply;
mod ops;
mod pool;
mod reference;
mod simd;
mod views;
mod weights;

pub use cache::Cache;
pub use memory::Memory;

use memory::Arena;
use multiply::Weights;
use pool::Pool;
use simd::Isa;

/// A device made of the machine's own cores.
#[derive(Clone, Debug)]
pub struct Cpu {
    threads: usize,
    /// The fast path's instruction set; none for the reference.
    isa: Option<Isa>,
    /// Memory for packed weights.
    arena: Arena,
}

impl Cpu {
    /// A backend whose streams compute with `threads` threads each (at least one, the caller's).
    pub fn new(threads: usize) -> Self {
        Self {
            threads: threads.max(1),
            isa: Some(Isa::best()),
            arena: Arena::default(),
        }
    }

    /// The oracle: plain loops on one thread.
    pub fn reference() -> Self {
        Self {
            threads: 1,
            isa: None,
            arena: Arena::default(),
        }
    }
}

/// Operations run in the caller's thread and those of the stream's pool; they are done when they return.
#[derive(Debug)]
pub struct Stream {
    pool: Pool,
    isa: Option<Isa>,
    /// Inputs of a product, decoded or padded.
    inputs: Vec<f32>,
    /// Inputs of a product that takes them as BF16.
    rounded: Vec<f32>,
}

/// Weights of a linear layer.
#[derive(Debug)]
pub struct Linear(Weights);

/// Weights of a layer's experts by slot.
#[derive(Debug)]
pub struct Experts {
    hidden: usize,
    inter: usize,
    precision: crate::backend::Precision,
    slots: Vec<Option<Expert>>,
}

#[derive(Debug)]
struct Expert {
    /// `[gate | up]`, `[2 * inter, hidden]`.
    gate_up: Weights,
    /// `[hidden, inter]`.
    down: Weights,
}

/// One `[out, in]` matrix a head.
#[derive(Debug)]
pub struct Heads {
    out: usize,
    inp: usize,
    matrices: Vec<Weights>,
}

#[cfg(test)]
mod tests;
