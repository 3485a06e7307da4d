//! Every metric that Hadal emits: the only place where their names stand. Documentation and dashboards are checked
//! against [`ALL`]. Base units, `_total` on counters only, labels with a handful of values, never a request's id or text.

use crate::metrics::{Definition, Kind};

/// Seconds, from a tenth of a millisecond to two minutes.
const LATENCY: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0, 30.0, 60.0, 120.0,
];
/// Fractions of one.
const RATIO: &[f64] = &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99];
/// Tokens of a prompt or an answer.
const TOKENS: &[f64] = &[
    1.0, 8.0, 32.0, 128.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131_072.0,
];

macro_rules! definitions {
    ($($(#[doc = $help:literal])* $ident:ident = $kind:expr, $name:literal, [$($label:literal),*];)*) => {
        $($(#[doc = $help])*
        pub const $ident: Definition = Definition {
            name: $name,
            kind: $kind,
            labels: &[$($label),*],
            help: concat!($($help),*).trim_ascii(),
        };)*

        /// All of them with the name of their constant, in the order of the reference.
        pub const ALL: &[(&str, Definition)] = &[$((stringify!($ident), $ident)),*];
    };
}

definitions! {
    /// Requests that ended, by model and HTTP status code
    ROUTER_REQUESTS = Kind::Counter, "hadal_router_requests_total", ["model", "code"];
    /// From a request's arrival to its last byte
    ROUTER_REQUEST_DURATION = Kind::Histogram(LATENCY), "hadal_router_request_duration_seconds", ["model"];
    /// From a request's arrival to its first token
    ROUTER_TIME_TO_FIRST_TOKEN = Kind::Histogram(LATENCY), "hadal_router_time_to_first_token_seconds", ["model"];
    /// Between two tokens of one answer
    ROUTER_INTER_TOKEN_LATENCY = Kind::Histogram(LATENCY), "hadal_router_inter_token_latency_seconds", ["model"];
    /// How long requests waited for admission
    ROUTER_QUEUE_DURATION = Kind::Histogram(LATENCY), "hadal_router_queue_duration_seconds", ["model"];
    /// Requests that wait for admission now
    ROUTER_QUEUE_DEPTH = Kind::Gauge, "hadal_router_queue_depth", [];
    /// Requests admitted and not ended
    ROUTER_RUNNING = Kind::Gauge, "hadal_router_running_requests", [];
    /// Tokens of prompts
    ROUTER_PROMPT_TOKENS = Kind::Histogram(TOKENS), "hadal_router_prompt_tokens", ["model"];
    /// Tokens of answers
    ROUTER_COMPLETION_TOKENS = Kind::Histogram(TOKENS), "hadal_router_completion_tokens", ["model"];
    /// Requests that went on from another decode worker, by what happened to the one before
    ROUTER_MIGRATIONS = Kind::Counter, "hadal_router_migrations_total", ["reason"];
    /// Attempts made again before the first token, by what went wrong
    ROUTER_RETRIES = Kind::Counter, "hadal_router_retries_total", ["reason"];
    /// Requests for which there was no prefill and decode worker of one revision
    ROUTER_NO_PAIR = Kind::Counter, "hadal_router_no_pair_total", ["reason"];
    /// Requests that were given up because workers died while they ran them
    ROUTER_POISONED = Kind::Counter, "hadal_router_poisoned_requests_total", [];
    /// Part of each prompt whose KV was expected in the chosen worker's cache
    ROUTER_PREFIX_CACHE_HIT = Kind::Histogram(RATIO), "hadal_router_prefix_cache_hit_ratio", [];
    /// Workers known to the router, by role and state (ready, draining, unreachable)
    ROUTER_WORKERS = Kind::Gauge, "hadal_router_workers", ["role", "state"];

    /// Part of the KV blocks in use by running requests and leases
    WORKER_KV_CACHE_USAGE = Kind::Gauge, "hadal_worker_kv_cache_usage_ratio", [];
    /// KV blocks by state (free, cached, used, quarantined)
    WORKER_KV_BLOCKS = Kind::Gauge, "hadal_worker_kv_blocks", ["state"];
    /// Requests that compute now
    WORKER_RUNNING = Kind::Gauge, "hadal_worker_running_requests", [];
    /// Requests that wait for room in the batch
    WORKER_WAITING = Kind::Gauge, "hadal_worker_waiting_requests", [];
    /// Prompt tokens, by where their KV came from (computed, cached, transferred)
    WORKER_PROMPT_TOKENS = Kind::Counter, "hadal_worker_prompt_tokens_total", ["source"];
    /// Tokens generated
    WORKER_GENERATED_TOKENS = Kind::Counter, "hadal_worker_generated_tokens_total", [];
    /// Sequences that ended here, by how (stop, length, hand_off, cancelled, error)
    WORKER_REQUESTS = Kind::Counter, "hadal_worker_requests_total", ["result"];
    /// How long requests waited for room in the batch
    WORKER_QUEUE_DURATION = Kind::Histogram(LATENCY), "hadal_worker_queue_duration_seconds", [];
    /// From a prompt's start in the batch to its first token
    WORKER_PREFILL_DURATION = Kind::Histogram(LATENCY), "hadal_worker_prefill_duration_seconds", [];
    /// Steps of the batch
    WORKER_STEPS = Kind::Counter, "hadal_worker_steps_total", [];
    /// Sequences that lost their blocks to an older one and were computed anew
    WORKER_PREEMPTIONS = Kind::Counter, "hadal_worker_preemptions_total", [];

    /// Sent: from the first stream to the last acknowledgement; received: how long a sequence waited for its KV
    KV_TRANSFER_DURATION = Kind::Histogram(LATENCY), "hadal_kv_transfer_duration_seconds", ["direction", "transport"];
    /// Bytes of KV that moved (direction: sent, received)
    KV_TRANSFER_BYTES = Kind::Counter, "hadal_kv_transfer_bytes_total", ["direction", "transport"];
    /// Transfers that ended in an error, by reason
    KV_TRANSFER_FAILURES = Kind::Counter, "hadal_kv_transfer_failures_total", ["direction", "transport", "reason"];
    /// Leases that hold blocks for a transfer
    KV_LEASES = Kind::Gauge, "hadal_kv_leases", [];
    /// Leases that nobody wrote to or asked for in time
    KV_LEASE_EXPIRATIONS = Kind::Counter, "hadal_kv_lease_expirations_total", [];
    /// 1 for the transport in use
    KV_TRANSPORT_INFO = Kind::Gauge, "hadal_kv_transport_info", ["transport"];

    /// Mean over max of tokens per expert of a layer: 1 is even
    EXPERT_BALANCEDNESS = Kind::Gauge, "hadal_expert_layer_balancedness_ratio", ["layer"];
    /// Tokens that each rank's experts computed
    EXPERT_RANK_TOKENS = Kind::Counter, "hadal_expert_rank_tokens_total", ["ep_rank"];
    /// Part of a layer's tokens that its most loaded experts took, the heaviest first
    EXPERT_TOP_LOAD = Kind::Gauge, "hadal_expert_top_load_ratio", ["layer", "rank_order"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_conventions() {
        for (_, definition) in ALL {
            let name = definition.name;
            assert!(name.starts_with("hadal_"), "{name}");
            assert_eq!(
                name.ends_with("_total"),
                definition.kind == Kind::Counter,
                "{name}"
            );
            assert!(
                !definition.help.is_empty() && !definition.help.ends_with('.'),
                "{name}"
            );
            assert!(
                !(definition.labels.contains(&"layer") && definition.labels.contains(&"ep_rank")),
                "{name}: layer and rank together are thousands of series"
            );
        }
    }

    #[test]
    fn no_name_stands_twice() {
        let mut names: Vec<_> = ALL.iter().map(|(_, definition)| definition.name).collect();
        names.sort_unstable();
        let total = names.len();
        names.dedup();
        assert_eq!(names.len(), total);
    }

    #[test]
    fn bucket_bounds_grow() {
        for bounds in [LATENCY, RATIO, TOKENS] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
