//! `/v1/chat/completions`: what is asked, what is answered, and the chunks of a streamed answer.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    ApiError, Common, Usage, error,
    fields::{refuse, within},
};

/// A checked request.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    /// What it shares with text completions. `max_tokens` is already the one of the two names that was given.
    pub common: Common,
    /// Name of the model.
    pub model: String,
    /// The conversation so far.
    pub messages: Vec<Message>,
    /// Report each token's log probability.
    pub logprobs: bool,
    /// And those of this many alternatives.
    pub top_logprobs: u32,
    /// Whether the template's thinking mode is asked for; `None` leaves it to the template.
    pub thinking: Option<bool>,
}

/// One turn, its text in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whose turn.
    pub role: Role,
    /// What was said.
    pub content: String,
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Instructions (`developer` is another name for it).
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// As templates call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

#[derive(Deserialize)]
#[serde(expecting = "a JSON object")]
struct Fields {
    model: String,
    messages: Vec<RawMessage>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    /// vLLM's and SGLang's name for variables of the template.
    chat_template_kwargs: Option<TemplateVariables>,
    /// DeepSeek's own API: `{"type": "enabled"}`.
    thinking: Option<Thinking>,
    // What the API has and this server has not.
    tools: Option<Value>,
    functions: Option<Value>,
    function_call: Option<Value>,
    tool_choice: Option<Value>,
    response_format: Option<Value>,
    modalities: Option<Vec<String>>,
    audio: Option<Value>,
    prediction: Option<Value>,
    web_search_options: Option<Value>,
    reasoning_effort: Option<Value>,
    verbosity: Option<Value>,
}

#[derive(Deserialize)]
struct TemplateVariables {
    thinking: Option<bool>,
}

#[derive(Deserialize)]
struct Thinking {
    r#type: String,
}

#[derive(Deserialize)]
struct RawMessage {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Value>,
    function_call: Option<Value>,
    audio: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of content parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

impl ChatRequest {
    /// Parses and checks a request body.
    ///
    /// # Errors
    /// 400 that names the field that is wrong or not supported.
    pub fn from_json(body: &[u8]) -> Result<Self, ApiError> {
        let fields: Fields = error::parse(body)?;
        let mut common: Common = error::parse(body)?;
        fields.refuse_unsupported()?;
        common.validate()?;
        within(
            "max_completion_tokens",
            fields.max_completion_tokens,
            1,
            u32::MAX,
        )?;
        within("top_logprobs", fields.top_logprobs, 0, 20)?;
        let logprobs = fields.logprobs.unwrap_or(false);
        if fields.top_logprobs.is_some() && !logprobs {
            let message = "'top_logprobs' is only allowed when 'logprobs' is true.";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        if fields.messages.is_empty() {
            return Err(ApiError::invalid(
                "messages",
                "'messages' must not be empty.",
            ));
        }
        common.max_tokens = fields.max_completion_tokens.or(common.max_tokens);
        let thinking = fields.thinking()?;
        let messages = fields.messages.into_iter().enumerate();
        Ok(Self {
            common,
            model: fields.model,
            messages: messages
                .map(|(i, raw)| raw.check(i))
                .collect::<Result<_, _>>()?,
            logprobs,
            top_logprobs: fields.top_logprobs.unwrap_or(0),
            thinking,
        })
    }
}

impl Fields {
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        refuse(&[
            ("tools", &self.tools),
            ("functions", &self.functions),
            ("function_call", &self.function_call),
            ("audio", &self.audio),
            ("prediction", &self.prediction),
            ("web_search_options", &self.web_search_options),
            ("reasoning_effort", &self.reasoning_effort),
            ("verbosity", &self.verbosity),
        ])?;
        // "none" and "auto" ask for nothing when there are no tools.
        match &self.tool_choice {
            None | Some(Value::Null) => {}
            Some(Value::String(choice)) if choice == "none" || choice == "auto" => {}
            Some(_) => return Err(ApiError::unsupported("tool_choice")),
        }
        match &self.response_format {
            None | Some(Value::Null) => {}
            Some(format) if format.get("type").and_then(Value::as_str) == Some("text") => {}
            Some(_) => return Err(ApiError::unsupported("response_format")),
        }
        if self
            .modalities
            .iter()
            .flatten()
            .any(|modality| modality != "text")
        {
            return Err(ApiError::unsupported("modalities"));
        }
        Ok(())
    }

    fn thinking(&self) -> Result<Option<bool>, ApiError> {
        match self
            .thinking
            .as_ref()
            .map(|thinking| thinking.r#type.as_str())
        {
            Some("enabled") => Ok(Some(true)),
            Some("disabled") => Ok(Some(false)),
            Some(_) => {
                let message = "'thinking.type' must be 'enabled' or 'disabled'.";
                Err(ApiError::invalid("thinking.type", message))
            }
            None => Ok(self
                .chat_template_kwargs
                .as_ref()
                .and_then(|variables| variables.thinking)),
        }
    }
}

impl RawMessage {
    fn check(self, index: usize) -> Result<Message, ApiError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            // Roles of tool use, which is not supported yet.
            "tool" | "function" => return Err(ApiError::unsupported(at("role"))),
            _ => {
                let message = "A role must be 'system', 'developer', 'user' or 'assistant'.";
                return Err(ApiError::invalid(at("role"), message));
            }
        };
        for (field, value) in [
            ("tool_calls", &self.tool_calls),
            ("function_call", &self.function_call),
            ("audio", &self.audio),
        ] {
            refuse(&[(&at(field), value)])?;
        }
        let content = match self.content {
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let mut texts = String::new();
                for (i, part) in parts.into_iter().enumerate() {
                    match (part.r#type.as_str(), part.text) {
                        ("text", Some(text)) => texts.push_str(&text),
                        ("text", None) => {
                            let message = "A part of type 'text' must have 'text'.";
                            return Err(ApiError::invalid(
                                at(&format!("content[{i}].text")),
                                message,
                            ));
                        }
                        _ => return Err(ApiError::unsupported(at(&format!("content[{i}].type")))),
                    }
                }
                texts
            }
            None => {
                return Err(ApiError::invalid(
                    at("content"),
                    "A message must have 'content'.",
                ));
            }
        };
        Ok(Message { role, content })
    }
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Chat {
    /// `chatcmpl-...`
    pub id: String,
    /// `chat.completion`
    pub object: String,
    /// Unix seconds.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// One for each of `n`.
    pub choices: Vec<Choice>,
    /// Token counts.
    pub usage: Usage,
    /// Always null: nothing here depends on a server-side configuration that changes.
    pub system_fingerprint: Option<String>,
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Choice {
    /// Which of `n`.
    pub index: u32,
    /// The text.
    pub message: AssistantMessage,
    /// Of each token, where asked for.
    pub logprobs: Option<Logprobs>,
    /// `stop` or `length`.
    pub finish_reason: String,
}

/// What the model said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AssistantMessage {
    /// Always `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
    /// Always null.
    pub refusal: Option<String>,
}

impl AssistantMessage {
    /// From its text.
    pub fn new(content: String) -> Self {
        Self {
            role: "assistant".into(),
            content,
            refusal: None,
        }
    }
}

/// Log probabilities of an answer's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// In the order of the text.
    pub content: Vec<TokenLogprob>,
}

/// One token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text, with U+FFFD for bytes that are not whole characters.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// Its bytes: concatenated over tokens they are the text, whatever the tokens cut apart. Empty for a special token,
    /// which the text leaves out.
    pub bytes: Vec<u8>,
    /// The most likely tokens, best first.
    pub top_logprobs: Vec<Alternative>,
}

/// A token that could have been.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// As [`TokenLogprob::token`].
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// As [`TokenLogprob::bytes`].
    pub bytes: Vec<u8>,
}

/// What a chunk adds to one answer.
#[derive(Clone, Debug, Serialize)]
pub struct ChunkChoice<'a> {
    /// Which of `n`.
    pub index: u32,
    /// What is new.
    pub delta: Delta<'a>,
    /// Of the tokens in this chunk.
    pub logprobs: Option<Logprobs>,
    /// Null until the answer's last chunk.
    pub finish_reason: Option<&'static str>,
}

/// What is new.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Delta<'a> {
    /// In the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
}

/// `object` of a whole answer.
pub const OBJECT: &str = "chat.completion";
/// `object` of a chunk.
pub const CHUNK_OBJECT: &str = "chat.completion.chunk";

#[cfg(test)]
mod tests;
