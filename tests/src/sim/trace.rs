//! What happened in a run, in order.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    sync::Arc,
};

use parking_lot::Mutex;

/// A hash over everything that was noted, each with its simulated time; clones share it. Two runs with the same one did
/// the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Trace(Arc<Mutex<DefaultHasher>>);

impl Trace {
    /// Something happens now, on the simulated host that calls this.
    pub(super) fn note(&self, what: impl Hash) {
        let now = turmoil::sim_elapsed().unwrap_or_default();
        (now, what).hash(&mut *self.0.lock());
    }

    /// The hash over all that was noted so far.
    pub(super) fn hash(&self) -> u64 {
        self.0.lock().finish()
    }
}
