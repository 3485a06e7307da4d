//! Fields that chat and text completions share, and the limits of each.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ApiError;

/// Token id (as text, for JSON has no other keys) to what is added to its logit.
pub type LogitBias = BTreeMap<String, f32>;

/// Sampling, limits and streaming, as both endpoints name them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Common {
    /// 0..=2; unset is the server's default.
    pub temperature: Option<f32>,
    /// 0..=1.
    pub top_p: Option<f32>,
    /// Most likely tokens kept; 0 or -1 is off (an extension that vLLM and SGLang share).
    pub top_k: Option<i64>,
    /// 0..=1 (extension).
    pub min_p: Option<f32>,
    /// Above 0 (extension).
    pub repetition_penalty: Option<f32>,
    /// -2..=2.
    pub presence_penalty: Option<f32>,
    /// -2..=2.
    pub frequency_penalty: Option<f32>,
    /// Added to logits, -100..=100.
    pub logit_bias: Option<LogitBias>,
    /// Makes sampling repeatable.
    pub seed: Option<i64>,
    /// Answers wanted, 1..=128.
    pub n: Option<u32>,
    /// Texts that end an answer, 4 at most.
    pub stop: Option<Stop>,
    /// Most tokens of an answer.
    pub max_tokens: Option<u32>,
    /// Fewest tokens of an answer (extension).
    pub min_tokens: Option<u32>,
    /// Go on past the end-of-text token (extension).
    pub ignore_eos: Option<bool>,
    /// Whether the answer comes in pieces.
    pub stream: Option<bool>,
    /// How it comes.
    pub stream_options: Option<StreamOptions>,
    /// Separates prefix caches: only requests with the same salt share cached prompts (extension).
    pub cache_salt: Option<String>,
}

/// One text or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string or a list of at most 4 strings"
)]
pub enum Stop {
    /// `"stop": "x"`
    One(String),
    /// `"stop": ["x", "y"]`
    Many(Vec<String>),
}

impl Stop {
    /// All of them.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::Many(texts) => texts,
        }
    }
}

/// How an answer is streamed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct StreamOptions {
    /// One more chunk with the token counts at the end.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// Token counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, once, whatever `n` is.
    pub prompt_tokens: u32,
    /// Tokens of all answers.
    pub completion_tokens: u32,
    /// Their sum.
    pub total_tokens: u32,
    /// More about the prompt.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// More about the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptTokensDetails {
    /// Tokens whose KV came from a cache.
    pub cached_tokens: u32,
}

impl Usage {
    /// From the three numbers that are counted.
    pub fn new(prompt_tokens: u32, cached_tokens: u32, completion_tokens: u32) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// Longest stop string in bytes: what is held back of a stream is bounded by it.
const MAX_STOP_BYTES: usize = 1024;
/// Most biased tokens.
const MAX_LOGIT_BIAS: usize = 1024;
/// Longest cache salt in bytes.
const MAX_SALT_BYTES: usize = 256;

impl Common {
    /// Checks every limit.
    ///
    /// # Errors
    /// 400 that names the first field out of bounds.
    pub fn validate(&self) -> Result<(), ApiError> {
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)?;
        within("top_k", self.top_k, -1, i64::from(u32::MAX))?;
        within("n", self.n, 1, 128)?;
        within("max_tokens", self.max_tokens, 1, u32::MAX)?;
        self.validate_stop()?;
        self.validate_logit_bias()?;
        if self
            .cache_salt
            .as_ref()
            .is_some_and(|salt| salt.len() > MAX_SALT_BYTES)
        {
            let message = format!("'cache_salt' may have at most {MAX_SALT_BYTES} bytes.");
            return Err(ApiError::invalid("cache_salt", message));
        }
        if self.stream_options.is_some() && !self.is_streaming() {
            let message = "'stream_options' is only allowed when 'stream' is true.";
            return Err(ApiError::invalid("stream_options", message));
        }
        if let (Some(min), Some(max)) = (self.min_tokens, self.max_tokens)
            && min > max
        {
            let message = "'min_tokens' must not be above 'max_tokens'.";
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(())
    }

    /// Whether the answer comes in pieces.
    pub fn is_streaming(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether the stream ends with token counts.
    pub fn includes_usage(&self) -> bool {
        self.stream_options
            .and_then(|options| options.include_usage)
            .unwrap_or(false)
    }

    /// Token ids and what is added to their logits.
    ///
    /// # Errors
    /// 400 for a key that is not a number.
    pub fn logit_bias(&self) -> Result<Vec<(u32, f32)>, ApiError> {
        let entries = self.logit_bias.iter().flatten();
        entries
            .map(|(key, bias)| {
                let message = "Invalid key in 'logit_bias': keys must be token ids.";
                let id = key
                    .parse()
                    .map_err(|_| ApiError::invalid("logit_bias", message))?;
                Ok((id, *bias))
            })
            .collect()
    }

    fn validate_stop(&self) -> Result<(), ApiError> {
        let Some(stop) = &self.stop else {
            return Ok(());
        };
        let stops = stop.as_slice();
        if stops.len() > 4 {
            let message = format!("'stop' may have at most 4 entries, not {}.", stops.len());
            return Err(ApiError::invalid("stop", message));
        }
        if stops
            .iter()
            .any(|text| text.is_empty() || text.len() > MAX_STOP_BYTES)
        {
            let message = format!("Each entry of 'stop' must have 1 to {MAX_STOP_BYTES} bytes.");
            return Err(ApiError::invalid("stop", message));
        }
        Ok(())
    }

    fn validate_logit_bias(&self) -> Result<(), ApiError> {
        let Some(bias) = &self.logit_bias else {
            return Ok(());
        };
        if bias.len() > MAX_LOGIT_BIAS {
            let message = format!("'logit_bias' may have at most {MAX_LOGIT_BIAS} entries.");
            return Err(ApiError::invalid("logit_bias", message));
        }
        for value in bias.values() {
            within("logit_bias", Some(*value), -100.0, 100.0)?;
        }
        self.logit_bias().map(drop)
    }
}

/// Refuses what the API has and this server has not, field by field: never silently ignored.
pub(crate) fn refuse(fields: &[(&str, &Option<Value>)]) -> Result<(), ApiError> {
    for (name, value) in fields {
        let asks_for_nothing = match value {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(items)) => items.is_empty(),
            Some(_) => false,
        };
        if !asks_for_nothing {
            return Err(ApiError::unsupported(*name));
        }
    }
    Ok(())
}

/// `min..=max`.
pub(crate) fn within<T: PartialOrd + std::fmt::Display + Copy>(
    param: &str,
    value: Option<T>,
    min: T,
    max: T,
) -> Result<(), ApiError> {
    match value {
        Some(value) if !(min..=max).contains(&value) => Err(ApiError::invalid(
            param,
            format!("Invalid value for '{param}': {value} is not between {min} and {max}."),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> Option<String> {
        let common: Common = serde_json::from_str(json).unwrap();
        common.validate().err().map(|error| {
            assert_eq!(error.status, 400);
            error.body.param.unwrap()
        })
    }

    #[test]
    fn every_limit_is_inclusive_and_names_its_field() {
        let cases = [
            (
                r#"{"temperature":2}"#,
                r#"{"temperature":2.01}"#,
                "temperature",
            ),
            (
                r#"{"temperature":0}"#,
                r#"{"temperature":-0.1}"#,
                "temperature",
            ),
            (r#"{"top_p":1}"#, r#"{"top_p":1.5}"#, "top_p"),
            (r#"{"n":128}"#, r#"{"n":129}"#, "n"),
            (r#"{"n":1}"#, r#"{"n":0}"#, "n"),
            (
                r#"{"presence_penalty":-2}"#,
                r#"{"presence_penalty":-2.5}"#,
                "presence_penalty",
            ),
            (
                r#"{"frequency_penalty":2}"#,
                r#"{"frequency_penalty":3}"#,
                "frequency_penalty",
            ),
            (
                r#"{"stop":["a","b","c","d"]}"#,
                r#"{"stop":["a","b","c","d","e"]}"#,
                "stop",
            ),
            (r#"{"stop":"a"}"#, r#"{"stop":""}"#, "stop"),
            (r#"{"max_tokens":1}"#, r#"{"max_tokens":0}"#, "max_tokens"),
            (
                r#"{"logit_bias":{"5":100}}"#,
                r#"{"logit_bias":{"5":101}}"#,
                "logit_bias",
            ),
            (
                r#"{"logit_bias":{"5":1}}"#,
                r#"{"logit_bias":{"five":1}}"#,
                "logit_bias",
            ),
            (r#"{"top_k":-1}"#, r#"{"top_k":-2}"#, "top_k"),
            (
                r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
                r#"{"stream_options":{"include_usage":true}}"#,
                "stream_options",
            ),
        ];
        for (good, bad, param) in cases {
            assert_eq!(refused(good), None, "{good}");
            assert_eq!(refused(bad).as_deref(), Some(param), "{bad}");
        }
    }

    #[test]
    fn fields_nobody_knows_are_ignored() {
        assert_eq!(
            refused(r#"{"user":"u","metadata":{},"no_such_field":[1]}"#),
            None
        );
    }
}
