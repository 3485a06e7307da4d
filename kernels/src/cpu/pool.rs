//! The threads of a stream. One parallel region is a number of tasks; whoever is awake takes the next one, the caller
//! too, so that a thread the system does not run delays nobody: the caller waits only for tasks already begun.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Polls before a waiting worker sleeps, about 20 us: longer than the gap between two operations of a step.
const SPINS: u32 = 500;

/// Polls before a waiting thread lets others run.
const SPINS_BEFORE_YIELD: u32 = 100;

/// State bits: the region is open for workers to join.
const OPEN: u64 = 1 << 16;
/// State bits above: the number of the region. Below `OPEN`: how many workers are in it.
const REGION: u64 = 1 << 17;

/// A task as workers see it: they use it only while `run`'s caller lends it.
type Task = dyn Fn(usize) + Sync;

/// Worker threads that share the tasks of one caller.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Region number, `OPEN`, workers inside.
    state: AtomicU64,
    next: AtomicUsize,
    job: UnsafeCell<Option<(*const Task, usize)>>,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    asleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the one caller (`run` takes `&mut Pool`) while the region is closed and empty, and
// read only by workers that joined an open region; `state` orders the two.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool that computes with `threads` threads, the caller's included.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
        };
        for i in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("kernels-{i}"))
                .spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that compute, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(tasks - 1)`, in any order and on any thread, and returns when all are done. With
    /// `alone`, the caller does them all: for regions too short to share.
    ///
    /// # Panics
    /// If a task panics.
    pub(super) fn run(&mut self, tasks: usize, alone: bool, task: &(dyn Fn(usize) + Sync)) {
        if alone || tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        #[expect(
            clippy::transmute_ptr_to_ptr,
            reason = "a cast cannot change the lifetime"
        )]
        // SAFETY: only the lifetime in the type changes. The task outlives its use: `Region` below closes the region and
        // waits for the workers inside, also when `task` panics.
        let lent: *const Task = unsafe { std::mem::transmute(std::ptr::from_ref(task)) };
        // SAFETY: the region is closed and empty, so no worker looks.
        unsafe { *shared.job.get() = Some((lent, tasks)) };
        shared.next.store(0, Ordering::Relaxed);
        let region = shared.state.load(Ordering::Relaxed) + REGION;
        shared.state.store(region | OPEN, Ordering::SeqCst);
        {
            let _region = Region(shared);
            if shared.sleepers.load(Ordering::SeqCst) > 0 {
                drop(shared.asleep.lock().unwrap_or_else(PoisonError::into_inner));
                shared.wake.notify_all();
            }
            shared.take_tasks(task, tasks);
        }
        if shared.panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a task of a parallel region panicked"));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(
            self.shared
                .asleep
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics; there is nothing to learn from its end.
            let _ = worker.join();
        }
    }
}

/// An open region; closing it waits for the workers inside.
struct Region<'a>(&'a Shared);

impl Drop for Region<'_> {
    fn drop(&mut self) {
        // No more tasks, should the caller's own have panicked.
        self.0.next.store(usize::MAX / 2, Ordering::Relaxed);
        let mut state = self.0.state.fetch_and(!OPEN, Ordering::Acquire) & !OPEN;
        let mut spins = 0;
        while state & (OPEN - 1) != 0 {
            relax(&mut spins);
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Shared {
    fn take_tasks(&self, task: &(dyn Fn(usize) + Sync), tasks: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= tasks {
                return;
            }
            task(i);
        }
    }

    fn work(&self) {
        let mut done = 0;
        while let Some(state) = self.wait(done) {
            if self
                .state
                .compare_exchange(state, state + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            done = state / REGION;
            // SAFETY: we are inside an open region, so the caller has written the job and waits for us to leave.
            if let Some((task, tasks)) = unsafe { *self.job.get() } {
                // SAFETY: as above, `task` is still borrowed by the caller of `run`.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| self.take_tasks(task, tasks))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The state with an open region other than `done`, or nothing when the pool ends.
    fn wait(&self, done: u64) -> Option<u64> {
        let ready = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & OPEN != 0 && state / REGION != done).then_some(state)
        };
        let mut spins = 0;
        while spins < SPINS {
            if let Some(state) = ready() {
                return Some(state);
            }
            relax(&mut spins);
        }
        let mut guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            if let Some(state) = ready() {
                break Some(state);
            }
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

fn relax(spins: &mut u32) {
    *spins = spins.saturating_add(1);
    if spins.is_multiple_of(SPINS_BEFORE_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// A slice that the tasks of a region write in disjoint parts.
pub(super) struct Split<'a, T> {
    start: *mut T,
    len: usize,
    _borrow: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for Split<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Split<'_, T> {}

// SAFETY: a `Split` stands for `&mut [T]`; `part`'s contract keeps the threads' parts disjoint.
unsafe impl<T: Send> Send for Split<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Split<'_, T> {}

impl<'a, T> Split<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: std::marker::PhantomData,
        }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// Nobody else may use an element of this part while the result lives.
    pub(super) unsafe fn part(&self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: inside the slice (assert above), and ours alone by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once_in_every_region() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for tasks in [0, 1, 2, 7, 100] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> =
                        (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, false, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_for_the_next_region() {
        let mut pool = Pool::new(3).unwrap();
        for _ in 0..5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let both = std::sync::Barrier::new(2);
            // Two tasks that wait for each other need two threads.
            pool.run(2, false, &|_| {
                both.wait();
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(2).unwrap();
        for bad in 0..4 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(4, false, &|i| assert_ne!(i, bad));
            }));
            assert!(caught.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(10, false, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
