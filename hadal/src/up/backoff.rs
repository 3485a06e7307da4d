//! When to start a process again.

use std::time::Duration;

/// How long to wait before a process is started again: twice as long each time it dies young.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    deaths: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(30);
    /// A process that lived this long was well: the next death counts as the first.
    const GOOD_LIFE: Duration = Duration::from_secs(60);

    /// The pause after a life of this length.
    pub(super) fn after_life_of(&mut self, lived: Duration) -> Duration {
        if lived >= Self::GOOD_LIFE {
            self.deaths = 0;
        }
        let pause = Self::FIRST.saturating_mul(2u32.saturating_pow(self.deaths));
        self.deaths = self.deaths.saturating_add(1);
        pause.min(Self::LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_keeps_dying_young_is_started_less_and_less_often() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u128> = (0..9)
            .map(|_| backoff.after_life_of(Duration::from_secs(1)).as_millis())
            .collect();
        assert_eq!(
            pauses,
            [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]
        );
        assert_eq!(
            backoff.after_life_of(Duration::from_secs(61)),
            Backoff::FIRST
        );
    }
}
