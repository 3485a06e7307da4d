//! The router: OpenAI HTTP and gRPC in front, one pipeline behind both, workers found by discovery. [`serve`] is the
//! whole of it with every seam given from outside; [`run`] is that on sockets, from command-line flags, once on each of a
//! few threads that share no task: a request stays on the thread that took its connection.
//!
//! It never touches weights or KV bytes: it checks, renders, tokenises, admits, chooses workers, follows their answers
//! and turns tokens into text, and it is the one place that knows what a client has been given already. So it is what
//! starts a sequence over when a worker dies.

mod admission;
mod auth;
pub mod cli;
pub mod discovery;
mod fleet;
mod front;
mod grpc;
mod http;
mod lanes;
mod metrics;
mod pipeline;
pub mod policy;
pub mod seams;
mod serve;

pub use admission::AdmissionConfig;
pub use auth::Keys;
pub use cli::run;
pub use fleet::{BreakerConfig, FleetConfig};
pub use http::HttpConfig;
pub use pipeline::{Mode, PipelineConfig, RetryConfig, Timeouts};
pub use serve::{Common, Config, Incoming, serve};
