//! Special tokens: which texts they are, and where they stand in a text.

use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;

use crate::TokenizerError;

/// A token that stands outside the byte-pair vocabulary, as `tokenizer.json` lists it under `added_tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct SpecialToken {
    pub(crate) id: u32,
    pub(crate) content: String,
    /// Left out of an answer's text. DeepSeek's markers (`<think>`, tool calls) are not: they carry meaning there.
    #[serde(default)]
    pub(crate) special: bool,
    /// Takes white space before it along.
    #[serde(default)]
    pub(crate) lstrip: bool,
    /// Takes white space behind it along.
    #[serde(default)]
    pub(crate) rstrip: bool,
}

/// All of them, searchable.
#[derive(Clone, Debug)]
pub struct SpecialTokens {
    tokens: Vec<SpecialToken>,
    matcher: AhoCorasick,
}

/// One found in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Occurrence {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Index into the tokens.
    pub(crate) token: usize,
}

impl SpecialTokens {
    pub(crate) fn new(tokens: Vec<SpecialToken>) -> Result<Self, TokenizerError> {
        let tokens: Vec<_> = tokens
            .into_iter()
            .filter(|token| !token.content.is_empty())
            .collect();
        let matcher = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|token| &token.content))
            .map_err(|error| TokenizerError::Unsupported(format!("added_tokens: {error}")))?;
        Ok(Self { tokens, matcher })
    }

    pub(crate) fn find(&self, text: &str) -> impl Iterator<Item = Occurrence> {
        self.matcher.find_iter(text).map(|found| Occurrence {
            start: found.start(),
            end: found.end(),
            token: found.pattern().as_usize(),
        })
    }

    /// Whether `text` ends in the beginning of a special token.
    pub(crate) fn may_continue(&self, text: &str) -> bool {
        self.tokens.iter().any(|token| {
            let starts = token
                .content
                .char_indices()
                .skip(1)
                .map(|(end, _)| &token.content[..end]);
            starts.into_iter().any(|start| text.ends_with(start))
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &SpecialToken> {
        self.tokens.iter()
    }

    pub(crate) fn token(&self, occurrence: Occurrence) -> &SpecialToken {
        &self.tokens[occurrence.token]
    }
}
