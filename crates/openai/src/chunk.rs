//! A piece of a streamed answer, of chat and of text completions alike.

use serde::Serialize;

use crate::Usage;

/// A piece of a streamed answer with choices of type `C`.
#[derive(Clone, Debug, Serialize)]
pub struct Chunk<'a, C> {
    /// The same in every chunk.
    pub id: &'a str,
    /// What it is a piece of.
    pub object: &'static str,
    /// The same in every chunk.
    pub created: u64,
    /// Name of the model.
    pub model: &'a str,
    /// One, or none in the chunk that carries the usage.
    pub choices: &'a [C],
    /// Absent unless usage was asked for; null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}
