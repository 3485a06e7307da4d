//! `/v1/completions`: raw prompts, as text or as token ids.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    ApiError, Common, Usage, error,
    fields::{refuse, within},
};

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    /// What it shares with chat. `max_tokens` is always set (16 unless given).
    pub common: Common,
    /// Name of the model.
    pub model: String,
    /// One entry for each prompt; every one gets `n` answers.
    pub prompts: Vec<Prompt>,
    /// Log probabilities of the tokens and of this many alternatives.
    pub logprobs: Option<u32>,
    /// The answer starts with the prompt.
    pub echo: bool,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Tokenised already.
    Tokens(Vec<u32>),
}

/// The API's default.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 128;

#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
struct Fields {
    model: String,
    prompt: Option<RawPrompt>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    best_of: Option<u32>,
    suffix: Option<Value>,
    response_format: Option<Value>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids or a list of such lists"
)]
enum RawPrompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

impl CompletionRequest {
    /// Parses and checks a request body.
    ///
    /// # Errors
    /// 400 that names the field that is wrong or not supported.
    pub fn from_json(body: &[u8]) -> Result<Self, ApiError> {
        let fields: Fields = error::parse(body)?;
        let mut common: Common = error::parse(body)?;
        common.validate()?;
        within("logprobs", fields.logprobs, 0, 5)?;
        refuse(&[
            ("suffix", &fields.suffix),
            ("response_format", &fields.response_format),
        ])?;
        let answers = common.n.unwrap_or(1);
        if fields.best_of.is_some_and(|best_of| best_of != answers) {
            return Err(ApiError::unsupported("best_of"));
        }
        let echo = fields.echo.unwrap_or(false);
        if echo && fields.logprobs.is_some() {
            let message = "'echo' together with 'logprobs' is not supported by this server.";
            return Err(ApiError::invalid("echo", message));
        }
        let prompts = match fields.prompt {
            Some(RawPrompt::Text(text)) => vec![Prompt::Text(text)],
            Some(RawPrompt::Texts(texts)) => texts.into_iter().map(Prompt::Text).collect(),
            Some(RawPrompt::Tokens(ids)) => vec![Prompt::Tokens(ids)],
            Some(RawPrompt::TokenLists(lists)) => lists.into_iter().map(Prompt::Tokens).collect(),
            None => {
                return Err(ApiError::invalid(
                    "prompt",
                    "Missing required parameter: 'prompt'.",
                ));
            }
        };
        if prompts.is_empty() || prompts.len() * answers as usize > MAX_PROMPTS {
            let message = format!("'prompt' must hold 1 to {MAX_PROMPTS} prompts (times 'n').");
            return Err(ApiError::invalid("prompt", message));
        }
        if prompts
            .iter()
            .any(|prompt| matches!(prompt, Prompt::Tokens(ids) if ids.is_empty()))
        {
            return Err(ApiError::invalid(
                "prompt",
                "A prompt of token ids must not be empty.",
            ));
        }
        common.max_tokens = common.max_tokens.or(Some(DEFAULT_MAX_TOKENS));
        let (model, logprobs) = (fields.model, fields.logprobs);
        Ok(Self {
            common,
            model,
            prompts,
            logprobs,
            echo,
        })
    }
}

/// A whole answer, or (the API has one type for both) a chunk of a streamed one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Completion {
    /// `cmpl-...`
    pub id: String,
    /// `text_completion`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// One for each prompt and each of `n`.
    pub choices: Vec<Choice>,
    /// Token counts.
    pub usage: Usage,
    /// Always null.
    pub system_fingerprint: Option<String>,
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Choice {
    /// Prompt number times `n` plus number of the answer.
    pub index: u32,
    /// The text.
    pub text: String,
    /// Of each token, where asked for.
    pub logprobs: Option<Logprobs>,
    /// `stop` or `length`.
    pub finish_reason: Option<String>,
}

/// Log probabilities, one entry a token in each list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// Texts.
    pub tokens: Vec<String>,
    /// Natural logarithms.
    pub token_logprobs: Vec<f32>,
    /// Text to log probability of the most likely tokens.
    pub top_logprobs: Vec<serde_json::Map<String, Value>>,
    /// Where each token starts in the text, in characters.
    pub text_offset: Vec<u32>,
}

/// What a chunk adds to one answer.
#[derive(Clone, Debug, Serialize)]
pub struct ChunkChoice<'a> {
    /// As [`Choice::index`].
    pub index: u32,
    /// More text.
    pub text: &'a str,
    /// Of the tokens in this chunk.
    pub logprobs: Option<Logprobs>,
    /// Null until the answer's last chunk.
    pub finish_reason: Option<&'static str>,
}

/// `object` of answers and chunks.
pub const OBJECT: &str = "text_completion";

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &str) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::from_json(format!(r#"{{"model":"m",{fields}}}"#).as_bytes())
    }

    #[test]
    fn a_prompt_is_text_texts_ids_or_lists_of_ids() {
        let prompts = |fields| request(fields).unwrap().prompts;
        assert_eq!(prompts(r#""prompt":"a""#), [Prompt::Text("a".into())]);
        assert_eq!(prompts(r#""prompt":["a","b"]"#).len(), 2);
        assert_eq!(prompts(r#""prompt":[1,2]"#), [Prompt::Tokens(vec![1, 2])]);
        let lists = [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])];
        assert_eq!(prompts(r#""prompt":[[1],[2]]"#), lists);
    }

    #[test]
    fn sixteen_tokens_unless_told_otherwise() {
        assert_eq!(
            request(r#""prompt":"a""#).unwrap().common.max_tokens,
            Some(16)
        );
        assert_eq!(
            request(r#""prompt":"a","max_tokens":3"#)
                .unwrap()
                .common
                .max_tokens,
            Some(3)
        );
    }

    #[test]
    fn limits_and_gaps_are_refused_by_name() {
        for (fields, param) in [
            (r#""prompt":"a","logprobs":6"#, "logprobs"),
            (r#""prompt":"a","best_of":3"#, "best_of"),
            (r#""prompt":"a","suffix":"x""#, "suffix"),
            (r#""prompt":[]"#, "prompt"),
            (r#""prompt":[[]]"#, "prompt"),
            (r#""prompt":{"a":1}"#, "prompt"),
            (r#""n":1"#, "prompt"),
            (r#""prompt":"a","echo":true,"logprobs":1"#, "echo"),
            (r#""prompt":["a","b"],"n":128"#, "prompt"),
        ] {
            let error = request(fields).unwrap_err();
            assert_eq!(
                (error.status, error.body.param.as_deref()),
                (400, Some(param)),
                "{fields}"
            );
        }
        assert!(request(r#""prompt":"a","n":2,"best_of":2,"logprobs":5"#).is_ok());
    }
}
