//! How much memory there is, and how many KV blocks fit in it.

use std::{fs, path::Path};

use kv::{BLOCK_TOKENS, blocks_for};

const MIB: usize = 1 << 20;
/// Memory for the cache where nobody asked for more, unless one sequence of full length needs it.
const DEFAULT_KV_BYTES: usize = 256 * MIB;

/// The memory will not do. Says what would.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooLittle {
    /// Not even one sequence of full length has room in the cache.
    #[error(
        "a KV cache of {} MiB holds {} tokens, a sequence may have {max_model_len}: give it {} MiB or lower the maximum \
         length to {}",
        .given / MIB, .tokens, .needed.div_ceil(MIB), .tokens
    )]
    Cache {
        /// Bytes for the cache.
        given: usize,
        /// Bytes for one sequence of full length.
        needed: usize,
        /// Tokens that fit.
        tokens: usize,
        /// Longest sequence.
        max_model_len: usize,
    },
    /// Weights and cache are more than the machine has.
    #[error(
        "about {} MiB are needed for weights and {} MiB for the KV cache, {} MiB are available: use a smaller precision, \
         a shorter maximum length or fewer workers",
        .weights.div_ceil(MIB), .cache.div_ceil(MIB), .available / MIB
    )]
    Machine {
        /// Bytes of the weights in memory.
        weights: usize,
        /// Bytes of the cache.
        cache: usize,
        /// Bytes that can be had.
        available: usize,
    },
}

/// How many blocks the cache gets: what `given` bytes hold, or enough for `max_running` sequences of full length within
/// a modest default.
///
/// # Errors
/// If one sequence of full length does not fit, or `available` bytes do not hold weights and cache.
pub fn plan_blocks(
    block_bytes: usize,
    max_model_len: usize,
    max_running: usize,
    weights: usize,
    given: Option<usize>,
    available: Option<usize>,
) -> Result<usize, TooLittle> {
    let one = blocks_for(max_model_len);
    let blocks = match given {
        Some(bytes) => bytes / block_bytes,
        None => (one * max_running).min((DEFAULT_KV_BYTES / block_bytes).max(one)),
    };
    if blocks < one {
        return Err(TooLittle::Cache {
            given: given.unwrap_or(blocks * block_bytes),
            needed: one * block_bytes,
            tokens: blocks * BLOCK_TOKENS,
            max_model_len,
        });
    }
    let cache = blocks * block_bytes;
    match available {
        Some(available) if weights + cache > available => Err(TooLittle::Machine {
            weights,
            cache,
            available,
        }),
        _ => Ok(blocks),
    }
}

/// Bytes that this process can still take: what the machine has left, or its control group if that is less. `None` where
/// the system does not say.
pub fn available() -> Option<usize> {
    let read = |path: &str| fs::read_to_string(Path::new(path)).ok();
    let machine = read("/proc/meminfo").and_then(|text| meminfo_available(&text));
    let group = || {
        let limit: usize = read("/sys/fs/cgroup/memory.max")?.trim().parse().ok()?;
        let used: usize = read("/sys/fs/cgroup/memory.current")?.trim().parse().ok()?;
        Some(limit.saturating_sub(used))
    };
    match (machine, group()) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

fn meminfo_available(text: &str) -> Option<usize> {
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: usize = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_holds_every_sequence_or_a_modest_cache_but_always_one() {
        let plan = |bytes, len| plan_blocks(bytes, len, 4, 0, None, None);
        assert_eq!(plan(1000, 100), Ok(8), "four sequences of two blocks");
        assert_eq!(plan(MIB, 64 * 200), Ok(256), "the default size");
        assert_eq!(plan(MIB, 64 * 300), Ok(300), "one sequence needs more");
    }

    #[test]
    fn what_is_too_little_is_said_in_numbers_one_can_use() {
        let error = plan_blocks(MIB, 640, 4, 0, Some(5 * MIB), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a KV cache of 5 MiB holds 320 tokens, a sequence may have 640: give it 10 MiB or lower the maximum \
             length to 320"
        );
        let error = plan_blocks(MIB, 640, 1, 100 * MIB, None, Some(105 * MIB)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("about 100 MiB are needed for weights and 10 MiB")
        );
        assert_eq!(
            plan_blocks(MIB, 640, 1, 100 * MIB, None, Some(110 * MIB)),
            Ok(10)
        );
    }

    #[test]
    fn meminfo_is_understood() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   1024 kB\nBuffers: 1 kB\n";
        assert_eq!(meminfo_available(text), Some(MIB));
        assert_eq!(meminfo_available("nothing"), None);
    }
}
