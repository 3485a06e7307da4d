//! What the prefix cache gained and lost, for those who keep a picture of it.

use std::collections::{BTreeMap, VecDeque};

use prefix::BlockHash;

/// Changes remembered for readers that have fallen behind; one that is further behind starts over from a snapshot.
const KEPT: usize = 1 << 16;

/// Everything the cache holds at one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Number of changes so far in this pool's life.
    pub version: u64,
    /// Hashes of all cached blocks, in or out of use, sorted.
    pub hashes: Vec<BlockHash>,
}

/// The difference between two versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The newer version.
    pub version: u64,
    /// Hashes that are there now and were not before, sorted.
    pub stored: Vec<BlockHash>,
    /// Hashes that were there before and are not now, sorted.
    pub evicted: Vec<BlockHash>,
}

/// A bounded log of changes.
#[derive(Debug, Default)]
pub(crate) struct ChangeLog {
    version: u64,
    kept: VecDeque<(BlockHash, bool)>,
}

impl ChangeLog {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn record(&mut self, hash: BlockHash, stored: bool) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((hash, stored));
        self.version += 1;
    }

    /// The net change since `version`, or `None` when it is too long ago (or of another life).
    pub(crate) fn since(&self, version: u64) -> Option<Changes> {
        let behind = usize::try_from(self.version.checked_sub(version)?).ok()?;
        let first = self.kept.len().checked_sub(behind)?;
        // Stores and evictions of one hash alternate: the first change tells the state before, the last the state now.
        let mut ends: BTreeMap<BlockHash, (bool, bool)> = BTreeMap::new();
        for &(hash, stored) in self.kept.range(first..) {
            ends.entry(hash).or_insert((stored, stored)).1 = stored;
        }
        let net = |kind| {
            ends.iter()
                .filter(move |(_, ends)| **ends == (kind, kind))
                .map(|(&hash, _)| hash)
                .collect()
        };
        Some(Changes {
            version: self.version,
            stored: net(true),
            evicted: net(false),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_net_changes_are_told() {
        let mut log = ChangeLog::default();
        log.record(7, true);
        let before = log.version();
        log.record(8, true);
        log.record(7, false);
        log.record(9, true);
        log.record(9, false);
        log.record(7, true);
        log.record(7, false);
        let changes = log.since(before).unwrap();
        assert_eq!((changes.stored, changes.evicted), (vec![8], vec![7]));
        assert_eq!(log.since(log.version()).unwrap().stored, []);
    }

    #[test]
    fn who_is_too_far_behind_or_ahead_must_start_over() {
        let mut log = ChangeLog::default();
        for i in 0..=KEPT as u64 {
            log.record(i, true);
        }
        assert!(log.since(0).is_none());
        assert!(log.since(1).is_some());
        assert!(log.since(log.version() + 1).is_none());
    }
}
