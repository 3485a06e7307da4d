//! Text in, token ids out, and back: the checkpoint's tokenizer and chat template, the incremental detokeniser and stop
//! strings. [`Text`] holds what a checkpoint brings; an [`Answer`] turns one sequence's tokens into text as they come.
//!
//! # Turns cannot be forged
//! Special tokens (`<｜User｜>`, `</think>`, ...) are recognised only where the template wrote them. What users and
//! applications send is encoded with recognition off, also when it contains such a token letter by letter. How a
//! template's text is told from what was filled into it is described in [`forgery`].

mod answer;
mod config;
mod cut;
mod detokeniser;
pub mod forgery;
mod python;
mod special;
mod stop;
mod template;
mod tokenizer;
mod words;

use std::path::Path;

pub use answer::{Answer, Entry, Piece};
pub use config::{Config, SamplingDefaults};
pub use detokeniser::Detokeniser;
pub use openai::chat::{Message, Role};
pub use stop::{Found, StopStrings};
pub use template::{Template, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};

/// Longer inputs should be encoded off the reactor: this many bytes take about a millisecond.
pub const INLINE_BYTES: usize = 16 * 1024;

/// Everything about text that a checkpoint brings.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    add_bos: bool,
    sampling: SamplingDefaults,
}

/// Why a checkpoint's text files cannot be used, or a prompt cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing or is not what it should be.
    #[error("cannot read {path}: {message}")]
    File {
        /// Which.
        path: String,
        /// Why.
        message: String,
    },
    /// The tokenizer cannot be used or failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used or failed.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The checkpoint has none.
    #[error("this model has no chat template")]
    NoTemplate,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja` of a
    /// checkpoint (the last two if they exist).
    ///
    /// # Errors
    /// When a file is missing, broken, or of a kind that is not supported.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let config = Config::load(folder)?;
        let tokenizer = Tokenizer::load(&folder.join("tokenizer.json"), &config)?;
        let template = match &config.chat_template {
            Some(source) => Some(Template::compile(source, &config.variables())?),
            None => None,
        };
        Ok(Self {
            tokenizer,
            template,
            add_bos: config.add_bos,
            sampling: config.sampling,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How tokens are chosen where a request does not say.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        self.sampling
    }

    /// Renders a conversation and encodes it. `nonce` is random and must not be guessable by whoever wrote the messages.
    ///
    /// # Errors
    /// When there is no template, or it refuses these messages (a turn out of order, say).
    pub fn encode_chat(
        &self,
        messages: &[Message],
        thinking: Option<bool>,
        nonce: u128,
    ) -> Result<Vec<u32>, Error> {
        let template = self.template.as_ref().ok_or(Error::NoTemplate)?;
        let special = self.tokenizer.special();
        let contents: Vec<&str> = messages
            .iter()
            .map(|message| message.content.as_str())
            .collect();
        let mark = forgery::Mark::new(nonce, &contents);
        let guarded = messages
            .iter()
            .map(|message| (message.role.as_str(), mark.guard(&message.content, special)));
        let rendered = template.render(guarded, thinking)?;
        let mut ids = Vec::with_capacity(rendered.len() / 3);
        for part in mark.split(&rendered, special) {
            match part {
                forgery::Part::Special(id) => ids.push(id),
                forgery::Part::Text(text) => self.tokenizer.encode(&text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Encodes a raw prompt: the beginning-of-text token where the model wants one, then the text with no special
    /// tokens recognised in it.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_prompt(&self, prompt: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(prompt.len() / 3 + 1);
        if self.add_bos {
            ids.extend(self.tokenizer.bos());
        }
        self.tokenizer.encode(prompt, &mut ids)?;
        Ok(ids)
    }
}
