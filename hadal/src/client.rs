//! A small client of the OpenAI API: what `up`, `chat` and `bench` need to ask and to read the answer as it streams.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client as Pool, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

use crate::sse;

/// How long to wait for anything at all before a server counts as lost. The same as the OpenAI clients'.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Largest body that is read whole.
const MAX_BODY_BYTES: usize = 16 << 20;

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The address cannot be used.
    #[error("cannot use the address {url:?}: {reason}")]
    Url {
        /// As it was given.
        url: String,
        /// Why not.
        reason: &'static str,
    },
    /// Nobody answers.
    #[error("cannot reach {url}; is it running? (`hadal up` starts one)")]
    Connect {
        /// Where.
        url: String,
        /// The system's reason.
        #[source]
        source: hyper_util::client::legacy::Error,
    },
    /// The server said no.
    #[error("{status}: {message}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// The error envelope's message, or the body.
        message: String,
    },
    /// The answer broke off or could not be read.
    #[error("the answer broke off: {0}")]
    Broken(String),
    /// Nothing came for too long.
    #[error("no answer for {} s", IDLE_TIMEOUT.as_secs())]
    Timeout,
}

/// One server.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    base: String,
    api_key: Option<String>,
    pool: Pool<HttpConnector, Full<Bytes>>,
}

impl Client {
    /// A client of `url` ("http://host:port", a trailing `/v1` is allowed).
    ///
    /// # Errors
    /// [`Error::Url`] for anything but plain HTTP.
    pub(crate) fn new(url: &str, api_key: Option<String>) -> Result<Self, Error> {
        let base = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let wrong = |reason| Error::Url {
            url: url.to_owned(),
            reason,
        };
        let uri: Uri = base.parse().map_err(|_| wrong("it is no URL"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => return Err(wrong("TLS is not supported; use http://")),
            _ => return Err(wrong("it must start with http://")),
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(10)));
        let pool = Pool::builder(TokioExecutor::new()).build(connector);
        Ok(Self {
            base,
            api_key,
            pool,
        })
    }

    /// Where it points.
    pub(crate) fn url(&self) -> &str {
        &self.base
    }

    /// GETs a text.
    ///
    /// # Errors
    /// When the server cannot be reached or does not answer 200.
    pub(crate) async fn text(&self, path: &str) -> Result<String, Error> {
        let body = self.send(Method::GET, path, None).await?;
        read_whole(body).await
    }

    /// GETs a JSON value.
    ///
    /// # Errors
    /// As [`Client::text`], and when the body is no JSON.
    pub(crate) async fn json(&self, path: &str) -> Result<Value, Error> {
        let text = self.text(path).await?;
        serde_json::from_str(&text).map_err(|error| Error::Broken(error.to_string()))
    }

    /// Name and context length of the first model that the server offers, or of `wanted`.
    ///
    /// # Errors
    /// When there is none of that name.
    pub(crate) async fn model(&self, wanted: Option<&str>) -> Result<Model, Error> {
        let list = self.json("/v1/models").await?;
        let models = list["data"].as_array().map_or(&[][..], Vec::as_slice);
        let found = models
            .iter()
            .find(|model| wanted.is_none_or(|id| model["id"] == id));
        let Some(found) = found else {
            let offered: Vec<&str> = models.iter().filter_map(|m| m["id"].as_str()).collect();
            return Err(Error::Broken(format!(
                "no model {:?} there; it offers {offered:?}",
                wanted.unwrap_or("at all")
            )));
        };
        Ok(Model {
            id: found["id"].as_str().unwrap_or_default().to_owned(),
            max_model_len: found["max_model_len"].as_u64(),
        })
    }

    /// POSTs `body` and reads the answer as a stream of events.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Result<Events, Error> {
        let body = self.send(Method::POST, path, Some(body)).await?;
        Ok(Events {
            body,
            parser: sse::Parser::default(),
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Incoming, Error> {
        let url = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method).uri(&url);
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let payload = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(payload)).map_err(|_| Error::Url {
            url: url.clone(),
            reason: "it is no URL",
        })?;
        let response = tokio::time::timeout(IDLE_TIMEOUT, self.pool.request(request))
            .await
            .map_err(|_| Error::Timeout)?
            .map_err(|source| Error::Connect {
                url: self.base.clone(),
                source,
            })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let text = read_whole(response.into_body()).await.unwrap_or_default();
        Err(Error::Refused {
            status,
            message: error_message(&text),
        })
    }
}

/// A model that a server offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Model {
    /// Its name in requests.
    pub id: String,
    /// Longest prompt and answer together, in tokens, where the server says it.
    pub max_model_len: Option<u64>,
}

/// An answer that streams.
#[derive(Debug)]
pub(crate) struct Events {
    body: Incoming,
    parser: sse::Parser,
}

impl Events {
    /// The next chunk; `None` after `[DONE]`.
    ///
    /// # Errors
    /// When the stream ends without `[DONE]`, carries an error event, or stays silent.
    pub(crate) async fn next(&mut self) -> Result<Option<Value>, Error> {
        loop {
            if let Some(data) = self.parser.next_data() {
                if data == "[DONE]" {
                    return Ok(None);
                }
                let chunk: Value = serde_json::from_str(&data)
                    .map_err(|error| Error::Broken(format!("{error} in {data:?}")))?;
                if chunk.get("error").is_some() {
                    return Err(Error::Broken(error_message(&data)));
                }
                return Ok(Some(chunk));
            }
            let frame = tokio::time::timeout(IDLE_TIMEOUT, self.body.frame())
                .await
                .map_err(|_| Error::Timeout)?
                .ok_or_else(|| Error::Broken("the server closed the stream".into()))?
                .map_err(|error| Error::Broken(error.to_string()))?;
            if let Ok(bytes) = frame.into_data() {
                self.parser
                    .push(&bytes)
                    .map_err(|error| Error::Broken(error.to_string()))?;
            }
        }
    }
}

/// The text of a chat chunk's (or a completion chunk's) first choice.
pub(crate) fn delta_text(chunk: &Value) -> Option<&str> {
    let choice = chunk.get("choices")?.get(0)?;
    let text = choice
        .get("delta")
        .and_then(|delta| delta.get("content"))
        .or(choice.get("text"));
    text?.as_str().filter(|text| !text.is_empty())
}

async fn read_whole(body: Incoming) -> Result<String, Error> {
    let read = http_body_util::Limited::new(body, MAX_BODY_BYTES).collect();
    let bytes = tokio::time::timeout(IDLE_TIMEOUT, read)
        .await
        .map_err(|_| Error::Timeout)?
        .map_err(|error| Error::Broken(error.to_string()))?
        .to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The message in an OpenAI error envelope, or the text itself.
fn error_message(text: &str) -> String {
    serde_json::from_str::<Value>(text)
        .ok()
        .and_then(|value| value["error"]["message"].as_str().map(str::to_owned))
        .unwrap_or_else(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_other_than_plain_http_are_refused_with_the_reason() {
        for (url, reason) in [
            ("https://example.org", "TLS"),
            ("localhost:8000", "http://"),
            ("", "URL"),
        ] {
            let error = Client::new(url, None).unwrap_err().to_string();
            assert!(error.contains(reason), "{url}: {error}");
        }
    }

    #[test]
    fn a_version_at_the_end_of_an_address_is_dropped() {
        let client = Client::new("http://127.0.0.1:8000/v1/", None).unwrap();
        assert_eq!(client.url(), "http://127.0.0.1:8000");
    }

    #[test]
    fn texts_of_chat_and_of_completions_are_found() {
        assert_eq!(
            delta_text(&json!({"choices": [{"delta": {"content": "a"}}]})),
            Some("a")
        );
        assert_eq!(delta_text(&json!({"choices": [{"text": "b"}]})), Some("b"));
        assert_eq!(
            delta_text(&json!({"choices": [{"delta": {"content": ""}}]})),
            None
        );
        assert_eq!(delta_text(&json!({"choices": []})), None);
    }

    #[test]
    fn an_error_envelope_is_reduced_to_its_message() {
        assert_eq!(
            error_message(r#"{"error":{"message":"too long"}}"#),
            "too long"
        );
        assert_eq!(error_message("plain\n"), "plain");
    }
}
