//! What every Hadal process shows of itself and how it stops: logs, Prometheus metrics, health over HTTP, lines that
//! tell a parent process what is going on, trace identifiers, and an orderly shutdown.
//!
//! | module | for |
//! |---|---|
//! | [`log`] | flags and set-up of `tracing` |
//! | [`metrics`] | an explicit [`Metrics`](metrics::Metrics) registry and the [`definitions`] of every series |
//! | [`health`] | starting, ready, draining; alive or stuck |
//! | [`http`] | `/metrics`, `/health` and `/ready` on a listener that is passed in |
//! | [`announce`] | JSON lines on standard output: loading, ready (with addresses), draining |
//! | [`shutdown`] | signals to a cancellation token; named tasks; draining with a deadline |
//! | [`trace`] | W3C `traceparent` and request ids in HTTP headers and gRPC metadata |

pub mod announce;
pub mod definitions;
pub mod health;
pub mod http;
pub mod log;
pub mod metrics;
pub mod process;
pub mod shutdown;
pub mod trace;
