//! A short cut to byte-pair encoding: text is cut into words by the tokenizer's own patterns, and a word that was met
//! before is looked up. The `tokenizers` crate keeps track of where every token came from, which costs it several times
//! more than finding the tokens; nobody here asks where they came from.
//!
//! Only for tokenizers of the usual shape (patterns, then bytes, then merges); others take the long way.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;
use serde_json::{Map, Value};
use tokenizers::Model;

use crate::{TokenizerError, cut::Cutter};

/// Words remembered at most, and the longest of them in bytes.
const MAX_WORDS: usize = 1 << 16;
const MAX_WORD_BYTES: usize = 64;

/// Encodes by words.
#[derive(Debug)]
pub(crate) struct Words {
    cutter: Cutter,
    /// Keyed hashes, as the standard ones: nobody can write words that collide.
    known: RwLock<HashMap<Box<str>, Arc<[u32]>, ahash::RandomState>>,
    /// The character that stands for each byte in the model's vocabulary.
    chars: [char; 256],
}

impl Words {
    /// `None` for a tokenizer of another shape.
    pub(crate) fn new(file: &Map<String, Value>, chars: &[char; 256]) -> Option<Self> {
        let is_nothing = |name: &str| match file.get(name) {
            None | Some(Value::Null) => true,
            Some(value) => {
                value["type"] == "Sequence" && value["normalizers"] == Value::Array(Vec::new())
            }
        };
        if !is_nothing("normalizer") || !file["model"]["dropout"].is_null() {
            return None;
        }
        let (bytes, patterns) = file["pre_tokenizer"]["pretokenizers"]
            .as_array()?
            .split_last()?;
        let is_plain = bytes["type"] == "ByteLevel"
            && bytes["add_prefix_space"] == false
            && bytes["use_regex"] == false;
        if !is_plain {
            return None;
        }
        let patterns = patterns.iter().map(|pattern| {
            let is_isolated = pattern["type"] == "Split"
                && pattern["behavior"] == "Isolated"
                && pattern["invert"] == false;
            pattern["pattern"]["Regex"].as_str().filter(|_| is_isolated)
        });
        let patterns: Vec<&str> = patterns.collect::<Option<_>>()?;
        Some(Self {
            cutter: Cutter::new(&patterns)?,
            known: RwLock::default(),
            chars: *chars,
        })
    }

    /// Appends the ids of `text`.
    pub(crate) fn encode(
        &self,
        model: &impl Model,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut new: Vec<(Box<str>, Arc<[u32]>)> = Vec::new();
        let known = self.known.read();
        let mut result = Ok(());
        self.cutter.cut(text, &mut |word| {
            if let Some(found) = known.get(word) {
                ids.extend_from_slice(found);
                return;
            }
            let mapped: String = word
                .bytes()
                .map(|byte| self.chars[usize::from(byte)])
                .collect();
            match model.tokenize(&mapped) {
                Ok(tokens) => {
                    let found: Arc<[u32]> = tokens.iter().map(|token| token.id).collect();
                    ids.extend_from_slice(&found);
                    if word.len() <= MAX_WORD_BYTES {
                        new.push((word.into(), found));
                    }
                }
                Err(error) => result = Err(TokenizerError::Encode(error.to_string())),
            }
        });
        drop(known);
        if !new.is_empty() {
            let mut known = self.known.write();
            let room = MAX_WORDS.saturating_sub(known.len());
            known.extend(new.into_iter().take(room));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_of_the_tests_is_cut_by_hand() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer.json");
        let file: Map<String, Value> =
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let words = Words::new(&file, &['a'; 256]).unwrap();
        assert!(matches!(words.cutter, Cutter::DeepSeek(_)));
    }
}
