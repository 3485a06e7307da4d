//! Many seeds, spread over threads.

use std::{
    ops::{ControlFlow, Range},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Calls `work` with each of `seeds`, on `threads` threads, each seed on one of them. [`ControlFlow::Break`] says that no
/// further seed is to begin.
pub fn each(seeds: Range<u64>, threads: usize, work: impl Fn(u64) -> ControlFlow<()> + Sync) {
    let (next, over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if work(seed).is_break() {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}
