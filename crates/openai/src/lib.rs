//! The OpenAI HTTP API as types: requests that are parsed and checked here, responses and stream chunks that are
//! written here, the error envelope, and server-sent events. No network and no tokenizer.
//!
//! [`ChatRequest`] and [`CompletionRequest`] go in; [`Chat`](chat::Chat) and [`Completion`](completion::Completion)
//! objects (or their chunks) come out; whatever is wrong on the way is an [`ApiError`].

mod chunk;
mod error;
mod fields;

pub mod chat;
pub mod completion;
pub mod models;
pub mod sse;

pub use chat::ChatRequest;
pub use chunk::Chunk;
pub use completion::CompletionRequest;
pub use error::{ApiError, ErrorBody, parse};
pub use fields::{Common, LogitBias, Stop, StreamOptions, Usage};
