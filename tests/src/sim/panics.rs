//! A panic inside a simulated host ends its run, and nothing else.
//!
//! turmoil has tokio shut a host's runtime down at the first panic of a task. That drops the other tasks while the
//! scheduler is borrowed: one that wakes another task as it is dropped panics again, and two panics at once end the whole
//! process. So nothing unwinds here. A run has a thread of its own; the panic hook hands the message over and the thread
//! sleeps for good inside of it, with what its run held: little, and only where a run went wrong. Nobody can set or take
//! a hook from then on, as the test harness does at its end: seeds run in a program of their own (`sim`).

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    cell::Cell,
    panic,
    sync::{Once, mpsc},
    thread,
};

thread_local! {
    /// Where a panic of this thread is reported instead of unwinding.
    static REPORT: Cell<Option<mpsc::Sender<String>>> = const { Cell::new(None) };
}

/// What `work` returns, in a new thread, or the message of its panic, with its place (and the way there, where RUST_BACKTRACE asks for it).
pub(super) fn reported<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let next = panic::take_hook();
        panic::set_hook(Box::new(move |panic| match REPORT.take() {
            Some(report) => {
                let trace = Backtrace::capture();
                let told = match trace.status() {
                    BacktraceStatus::Captured => format!("{panic}\n{trace}"),
                    _ => panic.to_string(),
                };
                // The other end waits for it.
                let _ = report.send(told);
                drop(report);
                loop {
                    thread::park();
                }
            }
            None => next(panic),
        }));
    });
    let (report, reports) = mpsc::channel();
    let worker = thread::spawn(move || {
        REPORT.set(Some(report));
        let result = work();
        REPORT.take();
        result
    });
    match reports.recv() {
        Ok(panic) => Err(panic),
        // The sender is gone without a word: the work ended.
        Err(mpsc::RecvError) => Ok(worker.join().expect("every panic is reported")),
    }
}
