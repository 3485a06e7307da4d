//! Which worker gets a request: pure functions of what is known about each, one file a policy.

mod least_loaded;
mod power_of_two;
mod prefix_aware;

pub use least_loaded::{DecodeState, least_loaded};
pub use power_of_two::power_of_two;
pub use prefix_aware::{PrefillState, prefix_aware};

/// How workers are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// Prefill by cached prefix and pending tokens, decode by load.
    #[default]
    Aware,
    /// The less loaded of two random workers, for both: the baseline.
    PowerOfTwo,
}
