//! The byte-level byte-pair tokenizer of `tokenizer.json`.
//!
//! Encoding is the `tokenizers` crate's, on a model whose added tokens were taken out: plain text can then never become
//! a special token. Decoding is a table of each token's bytes. Ids are looked up by content, never by number.

use std::{path::Path, str::FromStr};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    Config, Error, config,
    special::{SpecialToken, SpecialTokens},
    words::Words,
};

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    model: tokenizers::Tokenizer,
    words: Option<Words>,
    special: SpecialTokens,
    bytes: ByteTable,
    hidden: Vec<u32>,
    bos: Option<u32>,
    stops: Vec<u32>,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` is broken.
    #[error("tokenizer.json: {0}")]
    Broken(String),
    /// It is of a kind that this crate cannot decode.
    #[error("tokenizer.json is of an unsupported kind: {0}")]
    Unsupported(String),
    /// A token that the configuration names does not exist.
    #[error("the tokenizer has no token '{0}'")]
    NoSuchToken(String),
    /// A text could not be encoded.
    #[error("cannot encode: {0}")]
    Encode(String),
}

impl Tokenizer {
    pub(crate) fn load(path: &Path, config: &Config) -> Result<Self, Error> {
        Ok(Self::from_json(&config::read(path)?, config)?)
    }

    /// From the text of `tokenizer.json`.
    ///
    /// # Errors
    /// When it is broken, is not byte-level BPE, or lacks a token that `config` names.
    pub fn from_json(json: &str, config: &Config) -> Result<Self, TokenizerError> {
        let broken = |error: &dyn std::error::Error| TokenizerError::Broken(error.to_string());
        let mut file: Map<String, Value> = serde_json::from_str(json).map_err(|e| broken(&e))?;
        if file
            .get("decoder")
            .is_none_or(|decoder| decoder["type"] != "ByteLevel")
        {
            return Err(TokenizerError::Unsupported(
                "the decoder is not ByteLevel".into(),
            ));
        }
        // What is added around or recognised in a text is decided here, not by the file.
        let added = file.insert("added_tokens".into(), Value::Array(Vec::new()));
        file.insert("post_processor".into(), Value::Null);
        let added = Vec::<SpecialToken>::deserialize(added.unwrap_or(Value::Array(Vec::new())))
            .map_err(|e| broken(&e))?;
        let text = serde_json::to_string(&file).map_err(|e| broken(&e))?;
        let model = tokenizers::Tokenizer::from_str(&text)
            .map_err(|error| TokenizerError::Broken(error.to_string()))?;
        let words = Words::new(&file, &char_of_byte());
        let special = SpecialTokens::new(added)?;
        let bytes = ByteTable::new(&model, &special)?;
        let id = |content: &String| {
            let found = special.iter().find(|token| token.content == *content);
            let found = found
                .map(|token| token.id)
                .or_else(|| model.token_to_id(content));
            found.ok_or_else(|| TokenizerError::NoSuchToken(content.clone()))
        };
        let bos = config.bos_token.as_ref().map(id).transpose()?;
        let mut stops = config.eos_ids.clone();
        stops.extend(config.eos_token.as_ref().map(id).transpose()?);
        stops.sort_unstable();
        stops.dedup();
        let mut hidden: Vec<u32> = special
            .iter()
            .filter(|token| token.special)
            .map(|token| token.id)
            .collect();
        hidden.sort_unstable();
        Ok(Self {
            model,
            words,
            special,
            bytes,
            hidden,
            bos,
            stops,
        })
    }

    /// Appends the ids of `text`, in which no special token is recognised.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        match &self.words {
            Some(words) => words.encode(self.model.get_model(), text, ids),
            None => self.encode_plainly(text, ids),
        }
    }

    /// As the `tokenizers` crate does it: what [`encode`](Self::encode) must agree with.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_plainly(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let encoding = self
            .model
            .encode_fast(text, false)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// The bytes that a token stands for; none for an id that is not in the vocabulary (a padding row).
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Whether a token is left out of an answer's text.
    pub fn is_hidden(&self, id: u32) -> bool {
        self.hidden.binary_search(&id).is_ok()
    }

    /// The bytes that a token adds to an answer's text: none where it is left out of it.
    pub fn text_bytes(&self, id: u32) -> &[u8] {
        if self.is_hidden(id) {
            &[]
        } else {
            self.token_bytes(id)
        }
    }

    /// The id of a token by its text, special or not.
    pub fn id_of(&self, content: &str) -> Option<u32> {
        let special = self.special.iter().find(|token| token.content == content);
        special
            .map(|token| token.id)
            .or_else(|| self.model.token_to_id(content))
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Tokens that end an answer, sorted.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    /// The special tokens.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }
}

/// The bytes of every token, in one piece of memory.
#[derive(Debug)]
struct ByteTable {
    bytes: Vec<u8>,
    /// Token i is `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
}

impl ByteTable {
    fn new(model: &tokenizers::Tokenizer, special: &SpecialTokens) -> Result<Self, TokenizerError> {
        let vocabulary = model.get_vocab(false);
        let ids = vocabulary
            .values()
            .copied()
            .chain(special.iter().map(|token| token.id));
        let size = ids.max().map_or(0, |id| id as usize + 1);
        let mut tokens: Vec<Vec<u8>> = vec![Vec::new(); size];
        let byte_of = byte_of_char();
        for (token, id) in &vocabulary {
            let bytes = token
                .chars()
                .map(|c| byte_of.get(c as usize).copied().flatten());
            // A token with characters outside of the byte alphabet is a special one that also stands in the vocabulary.
            let bytes: Option<Vec<u8>> = bytes.collect();
            tokens[*id as usize] = bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        for token in special.iter() {
            tokens[token.id as usize] = token.content.as_bytes().to_vec();
        }
        let bytes = tokens.concat();
        if u32::try_from(bytes.len()).is_err() {
            return Err(TokenizerError::Unsupported(
                "the vocabulary is larger than 4 GiB".into(),
            ));
        }
        let mut end = 0;
        let ends = tokens.iter().map(|token| {
            end += token.len() as u32;
            end
        });
        Ok(Self {
            ends: ends.collect(),
            bytes,
        })
    }

    fn get(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and following, in order.
fn byte_of_char() -> Vec<Option<u8>> {
    let mut table = vec![None; 256 + 68];
    let mut next = 256;
    for byte in 0..=u8::MAX {
        let is_printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if is_printable {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        table[code] = Some(byte);
    }
    table
}

/// The same the other way round.
fn char_of_byte() -> [char; 256] {
    let mut table = ['\0'; 256];
    for (code, byte) in byte_of_char().into_iter().enumerate() {
        if let (Some(byte), Some(c)) = (byte, char::from_u32(code as u32)) {
            table[usize::from(byte)] = c;
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_is_gpt_2_s() {
        let table = byte_of_char();
        assert_eq!(table['A' as usize], Some(b'A'));
        assert_eq!(table['Ġ' as usize], Some(b' '));
        assert_eq!(table['Ċ' as usize], Some(b'\n'));
        assert_eq!(table['Ń' as usize], Some(0xad));
        let mut bytes: Vec<u8> = table.into_iter().flatten().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }
}
