//! Bugs of kinds that other systems really had, kept where they would be, so that the simulator must find each of them
//! again. A test that cannot find them proves nothing about the code without them.
//!
//! Code asks [`is`] at the place of a bug. Without the feature `bugs` the answer is always no, and the compiler removes
//! the question.

/// A bug that can be planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A transfer that broke off counts as received (vLLM 52232: failure reported as "finished receiving").
    BrokenIsFinished,
    /// Pieces and seal are accepted whatever their checksums say.
    Unverified,
    /// An evicted block's hash stays in the prefix index, so that a hit returns reused memory.
    StalePrefix,
    /// A request that starts over gives the last token again.
    TokenTwice,
    /// A request that starts over draws from another seed.
    SeedLost,
    /// A request that ends before its blocks are used leaves them to their lease (Dynamo 13691, llm-d 1138: cancelled
    /// requests strand what was reserved for them).
    LeaseKept,
    /// A sequence that stops waiting for its blocks does not give them back.
    ClaimKept,
    /// What follows a cached prefix is written from the sequence's start (vLLM 48633: trimmed from the wrong end).
    WrongEnd,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::BrokenIsFinished,
        Self::Unverified,
        Self::StalePrefix,
        Self::TokenTwice,
        Self::SeedLost,
        Self::LeaseKept,
        Self::ClaimKept,
        Self::WrongEnd,
    ];
}

#[cfg(feature = "bugs")]
std::thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Whether `bug` is planted in this thread.
#[cfg(feature = "bugs")]
pub fn is(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether `bug` is planted: never, without the feature.
#[cfg(not(feature = "bugs"))]
#[inline]
pub const fn is(_: Bug) -> bool {
    false
}

/// Plants `bug`, or none, in this thread (a simulation runs in one).
#[cfg(feature = "bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}
