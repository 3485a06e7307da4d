//! The error envelope: `{"error": {"message", "type", "param", "code"}}`, all four keys always present, and the HTTP
//! status that goes with each kind of failure. The official client retries 408, 409, 429 and every 5xx, so a user's
//! mistake is never one of these.

use std::fmt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A failure as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// What stands under `error`.
    pub body: ErrorBody,
    /// Value of the `Retry-After` header in seconds.
    pub retry_after: Option<u32>,
    /// Sent again it would do harm: the official client does not retry where `x-should-retry` is `false`.
    pub is_final: bool,
}

/// What stands under `error`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For a person.
    pub message: String,
    /// For a program, coarse.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field of the request that is wrong, if one is.
    pub param: Option<String>,
    /// For a program, fine.
    pub code: Option<String>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: &'a ErrorBody,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: u16, kind: &str, code: Option<&str>, message: String) -> Self {
        let body = ErrorBody {
            message,
            kind: kind.into(),
            param: None,
            code: code.map(Into::into),
        };
        Self {
            status,
            body,
            retry_after: None,
            is_final: false,
        }
    }

    /// 400: `param` is wrong.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(400, INVALID, Some("invalid_value"), message.into()).with_param(param)
    }

    /// 400: `param` asks for something that this server does not do.
    pub fn unsupported(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported by this server.");
        Self::new(400, INVALID, Some("unsupported_parameter"), message).with_param(param)
    }

    /// 400: prompt and answer do not fit into the model's context.
    pub fn too_long(param: &str, limit: usize, prompt: usize, answer: usize) -> Self {
        let message = if answer == 0 {
            format!(
                "This model's maximum context length is {limit} tokens. However, your prompt has \
                 {prompt} tokens, which leaves no room for an answer. Please shorten it."
            )
        } else {
            format!(
                "This model's maximum context length is {limit} tokens. However, you requested \
                 {} tokens ({prompt} in the prompt, {answer} in the answer). Please ask for less.",
                prompt + answer
            )
        };
        Self::new(400, INVALID, Some("context_length_exceeded"), message).with_param(param)
    }

    /// 401.
    pub fn unauthorized() -> Self {
        let message = "Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'.";
        Self::new(401, INVALID, Some("invalid_api_key"), message.into())
    }

    /// 404 for a model that is not served.
    pub fn model_not_found(model: &str) -> Self {
        let message = format!(
            "The model '{}' does not exist or is not served here.",
            clip(model)
        );
        Self::new(404, INVALID, Some("model_not_found"), message).with_param("model")
    }

    /// 404 for a path that does not exist.
    pub fn unknown_url(method: &str, path: &str) -> Self {
        let message = format!("Invalid URL ({method} {}).", clip(path));
        Self::new(404, INVALID, Some("unknown_url"), message)
    }

    /// 405.
    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let message = format!("Not allowed: {method} on {}.", clip(path));
        Self::new(405, INVALID, Some("method_not_supported"), message)
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than {limit} bytes.");
        Self::new(413, INVALID, Some("request_too_large"), message)
    }

    /// 408: the client did not send its request in time.
    pub fn request_timeout() -> Self {
        let message = "The request did not arrive in time.";
        Self::new(408, INVALID, Some("request_timeout"), message.into())
    }

    /// 429: the queue is full, or the request waited in it for too long.
    pub fn overloaded(message: impl Into<String>, retry_after: u32) -> Self {
        let error = Self::new(429, "rate_limit_error", Some("overloaded"), message.into());
        Self {
            retry_after: Some(retry_after),
            ..error
        }
    }

    /// 503: nobody can serve this now.
    pub fn unavailable(message: impl Into<String>, retry_after: u32) -> Self {
        let error = Self::new(503, "server_error", Some("unavailable"), message.into());
        Self {
            retry_after: Some(retry_after),
            ..error
        }
    }

    /// 504: the request's deadline passed.
    pub fn deadline(message: impl Into<String>) -> Self {
        Self::new(
            504,
            "server_error",
            Some("deadline_exceeded"),
            message.into(),
        )
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "server_error", Some("internal_error"), message.into())
    }

    /// 500 that must not be retried: so many workers died while they ran the request.
    pub fn poisoned(workers: usize) -> Self {
        let message = format!(
            "{workers} workers in a row died while they ran this request. It was given up and should not be sent again."
        );
        Self {
            is_final: true,
            ..Self::new(500, "server_error", Some("workers_died"), message)
        }
    }

    /// Names the wrong field.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.body.param = Some(param.into());
        self
    }

    /// The envelope as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(&Envelope { error: &self.body }).expect("strings always serialise")
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.status, self.body.message)
    }
}

impl std::error::Error for ApiError {}

/// Parses a request body. What does not parse is a 400 that names the field.
///
/// The common case parses once; only a body that failed is read again, with its path followed.
///
/// # Errors
/// 400 with the offending field as `param`.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    if let Ok(parsed) = serde_json::from_slice(body) {
        return Ok(parsed);
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let Err(error) = serde_path_to_error::deserialize::<_, T>(&mut reader) else {
        // It parsed, so what failed the first time stands behind it.
        return Err(not_json("trailing characters after the JSON value"));
    };
    let path = error.path().to_string();
    let inner = error.into_inner();
    if !inner.is_data() {
        return Err(not_json(&inner.to_string()));
    }
    // The message may quote the value, but never more than a little of it.
    let message = clip(&inner.to_string()).to_string();
    if let Some(field) = message
        .strip_prefix("missing field `")
        .and_then(|m| m.split('`').next())
    {
        let param = if path == "." {
            field.into()
        } else {
            format!("{path}.{field}")
        };
        let message = format!("Missing required parameter: '{param}'.");
        return Err(
            ApiError::new(400, INVALID, Some("missing_required_parameter"), message)
                .with_param(param),
        );
    }
    let error = ApiError::new(
        400,
        INVALID,
        Some("invalid_type"),
        if path == "." {
            format!("The request body is wrong: {message}.")
        } else {
            format!("Invalid value for '{path}': {message}.")
        },
    );
    Err(if path == "." {
        error
    } else {
        error.with_param(path)
    })
}

fn not_json(message: &str) -> ApiError {
    let message = format!("The request body is not valid JSON: {message}.");
    ApiError::new(400, INVALID, Some("invalid_json"), message)
}

/// At most the first 200 characters of what a client sent.
fn clip(text: &str) -> &str {
    text.char_indices()
        .nth(200)
        .map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatRequest;

    #[test]
    fn an_envelope_has_all_four_keys() {
        let json: serde_json::Value =
            serde_json::from_str(&ApiError::internal("x").to_json()).unwrap();
        let keys: Vec<_> = json["error"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(json["error"]["param"].is_null());
    }

    #[test]
    fn what_does_not_parse_names_its_field() {
        let cases = [
            (r#"{"messages":[]}"#, "model", "missing_required_parameter"),
            (
                r#"{"model":"m","messages":[{"content":"x"}]}"#,
                "messages[0].role",
                "missing_required_parameter",
            ),
            (
                r#"{"model":"m","messages":[],"temperature":"hot"}"#,
                "temperature",
                "invalid_type",
            ),
            (r#"{"model":"m","messages":[],"n":-1}"#, "n", "invalid_type"),
            (
                r#"{"model":"m","messages":[{"role":"user","content":7}]}"#,
                "messages[0].content",
                "invalid_type",
            ),
        ];
        for (body, param, code) in cases {
            let error = ChatRequest::from_json(body.as_bytes()).unwrap_err();
            assert_eq!(error.status, 400, "{body}");
            assert_eq!(error.body.param.as_deref(), Some(param), "{body}: {error}");
            assert_eq!(error.body.code.as_deref(), Some(code), "{body}");
        }
    }

    #[test]
    fn broken_json_is_the_client_s_fault_and_names_no_field() {
        for body in [
            "",
            "{",
            "[]",
            r#"{"model":"m","messages":[]} x"#,
            "\u{feff}{}",
        ] {
            let error = ChatRequest::from_json(body.as_bytes()).unwrap_err();
            assert_eq!((error.status, error.body.param), (400, None), "{body}");
        }
        assert_eq!(ChatRequest::from_json(b"\xff\xfe").unwrap_err().status, 400);
    }

    #[test]
    fn a_hostile_model_name_is_not_echoed_whole() {
        let error = ApiError::model_not_found(&"é".repeat(100_000));
        assert!(error.body.message.len() < 600);
    }
}
