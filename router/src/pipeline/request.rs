//! What a client asks for, in one form for both fronts and all endpoints.

use std::time::Duration;

use openai::{ApiError, ChatRequest, Common, CompletionRequest, completion::Prompt};
use proto::v1::{self, generate_request};
use telemetry::trace::TraceContext;
use text::{Message, Role};
use tokio::time::Instant;

/// A request that was checked field by field, but not yet against the model.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) model: String,
    /// Every input gets `answers` answers.
    pub(crate) inputs: Vec<Input>,
    pub(crate) answers: u32,
    /// Its seed is not set yet.
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<u64>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) ignore_eos: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) cache_salt: Vec<u8>,
    /// Name of the field that holds the inputs, for errors.
    pub(crate) field: &'static str,
}

/// How tokens are chosen, where the client said so.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sampling {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) rest: v1::Sampling,
}

/// What an answer continues.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    Chat {
        messages: Vec<Message>,
        thinking: Option<bool>,
    },
    Text(String),
    Tokens(Vec<u32>),
}

impl Input {
    /// Bytes that have to be tokenised.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Chat { messages, .. } => messages.iter().map(|m| m.content.len()).sum(),
            Self::Text(text) => text.len(),
            Self::Tokens(_) => 0,
        }
    }
}

/// Who asks and since when.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Shown to the client and to the workers' logs; no key to anything.
    pub(crate) request_id: http::HeaderValue,
    pub(crate) trace: TraceContext,
    pub(crate) arrived: Instant,
    /// Time that the client grants, if it said so.
    pub(crate) timeout: Option<Duration>,
}

impl Ask {
    pub(crate) fn from_chat(request: ChatRequest) -> Result<Self, ApiError> {
        let top_logprobs = request.logprobs.then_some(request.top_logprobs);
        let input = Input::Chat {
            messages: request.messages,
            thinking: request.thinking,
        };
        Self::new(
            request.model,
            vec![input],
            request.common,
            top_logprobs,
            "messages",
        )
    }

    pub(crate) fn from_completion(request: CompletionRequest) -> Result<Self, ApiError> {
        let inputs = request.prompts.into_iter().map(|prompt| match prompt {
            Prompt::Text(text) => Input::Text(text),
            Prompt::Tokens(ids) => Input::Tokens(ids),
        });
        let inputs = inputs.collect();
        Self::new(
            request.model,
            inputs,
            request.common,
            request.logprobs,
            "prompt",
        )
    }

    fn new(
        model: String,
        inputs: Vec<Input>,
        common: Common,
        top_logprobs: Option<u32>,
        field: &'static str,
    ) -> Result<Self, ApiError> {
        let rest = v1::Sampling {
            top_k: common.top_k.map_or(0, |top_k| top_k.max(0) as u32),
            min_p: common.min_p.unwrap_or(0.0),
            presence_penalty: common.presence_penalty.unwrap_or(0.0),
            frequency_penalty: common.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: common.repetition_penalty,
            top_logprobs,
            logit_bias: common.logit_bias()?.into_iter().collect(),
            ..v1::Sampling::default()
        };
        let (temperature, top_p) = (common.temperature, common.top_p);
        Ok(Self {
            model,
            inputs,
            answers: common.n.unwrap_or(1),
            sampling: Sampling {
                temperature,
                top_p,
                rest,
            },
            seed: common.seed.map(|seed| seed as u64),
            max_tokens: common.max_tokens,
            min_tokens: common.min_tokens.unwrap_or(0),
            ignore_eos: common.ignore_eos.unwrap_or(false),
            stop: common
                .stop
                .map(|stop| stop.as_slice().to_vec())
                .unwrap_or_default(),
            cache_salt: common
                .cache_salt
                .map(String::into_bytes)
                .unwrap_or_default(),
            field,
        })
    }

    /// From the gRPC front, whose limits are those of HTTP.
    pub(crate) fn from_proto(request: v1::GenerateRequest) -> Result<Self, ApiError> {
        let sampling = request.sampling.unwrap_or_default();
        let common = Common {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: Some(i64::from(sampling.top_k)),
            min_p: Some(sampling.min_p),
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: Some(sampling.presence_penalty),
            frequency_penalty: Some(sampling.frequency_penalty),
            n: (request.n > 0).then_some(request.n),
            stop: (!request.stop.is_empty()).then_some(openai::Stop::Many(request.stop)),
            max_tokens: (request.max_tokens > 0).then_some(request.max_tokens),
            ignore_eos: Some(request.ignore_eos),
            ..Common::default()
        };
        common.validate()?;
        let top_logprobs = sampling.top_logprobs;
        if top_logprobs.is_some_and(|count| count > 20) {
            return Err(ApiError::invalid(
                "top_logprobs",
                "'top_logprobs' may be at most 20.",
            ));
        }
        let (input, field) = match request.input {
            Some(generate_request::Input::Chat(chat)) => (chat_input(chat)?, "messages"),
            Some(generate_request::Input::Prompt(text)) => (Input::Text(text), "prompt"),
            Some(generate_request::Input::TokenIds(ids)) => (Input::Tokens(ids.ids), "prompt"),
            None => {
                return Err(ApiError::invalid(
                    "input",
                    "Missing required parameter: 'input'.",
                ));
            }
        };
        let mut ask = Self::new(request.model, vec![input], common, top_logprobs, field)?;
        ask.sampling.rest.logit_bias = sampling.logit_bias;
        ask.seed = request.seed;
        Ok(ask)
    }
}

fn chat_input(chat: v1::Chat) -> Result<Input, ApiError> {
    let messages = chat.messages.into_iter().enumerate().map(|(i, message)| {
        let role = match message.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            _ => {
                let param = format!("messages[{i}].role");
                return Err(ApiError::invalid(
                    param,
                    "A role must be 'system', 'user' or 'assistant'.",
                ));
            }
        };
        Ok(Message {
            role,
            content: message.content,
        })
    });
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    if messages.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "'messages' must not be empty.",
        ));
    }
    Ok(Input::Chat {
        messages,
        thinking: Some(chat.thinking),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temperature_of_zero_is_not_an_unset_one() {
        let ask = |sampling| {
            let input = generate_request::Input::Prompt("x".into());
            Ask::from_proto(v1::GenerateRequest {
                input: Some(input),
                sampling,
                ..v1::GenerateRequest::default()
            })
        };
        let temperature = |sampling| ask(sampling).unwrap().sampling.temperature;
        assert_eq!(temperature(None), None);
        assert_eq!(temperature(Some(v1::Sampling::default())), None);
        let greedy = v1::Sampling {
            temperature: Some(0.0),
            ..v1::Sampling::default()
        };
        assert_eq!(temperature(Some(greedy)), Some(0.0));
    }
}
