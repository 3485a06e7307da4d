//! What is kept of each request.

use std::time::Duration;

/// One request that ended.
#[derive(Clone, Debug)]
pub(super) struct Record {
    /// When it was due, after the start. Latencies count from here, so that a slow sender hides nothing.
    pub(super) due: Duration,
    /// Tokens of the prompt.
    pub(super) input_tokens: u64,
    /// Figures, or what went wrong in a few words.
    pub(super) outcome: Result<Timing, String>,
}

/// Times of one answer.
#[derive(Clone, Debug)]
pub(super) struct Timing {
    /// From due to the first token.
    pub(super) first_token: Duration,
    /// From due to the end.
    pub(super) total: Duration,
    /// Gaps between chunks that brought text.
    pub(super) gaps: Vec<Duration>,
    /// Tokens of the answer, as the server counts them.
    pub(super) output_tokens: u64,
}

impl Timing {
    /// Mean time of a token after the first.
    pub(super) fn per_token(&self) -> Option<Duration> {
        let rest = u32::try_from(self.output_tokens)
            .ok()?
            .checked_sub(1)
            .filter(|&rest| rest > 0)?;
        Some((self.total.saturating_sub(self.first_token)) / rest)
    }
}

/// A whole run.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) records: Vec<Record>,
    /// From the first request to the last end.
    pub(super) wall: Duration,
    /// Requests that were cut off when time was up or by Ctrl-C.
    pub(super) cut_off: usize,
}
