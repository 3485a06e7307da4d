//! A small HTTP client that shows everything: status, headers, bytes as they come.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use openai::sse::Decoder;
use serde_json::Value;
use testkit::network::Network;
use tokio::task::JoinHandle;

/// One connection to the router.
pub(crate) struct Client {
    send: http1::SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers[name].to_str().unwrap()
    }
}

impl Client {
    pub(crate) async fn connect(network: &Network) -> Self {
        let io = network.dial("router:http").await.unwrap();
        let (send, connection) = http1::handshake(TokioIo::new(io)).await.unwrap();
        let connection = tokio::spawn(async move {
            // It ends when either side leaves.
            let _ = connection.await;
        });
        Self { send, connection }
    }

    async fn send(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
        key: &str,
    ) -> http::Response<Incoming> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "router")
            .header("authorization", format!("Bearer {key}"))
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        self.send.ready().await.unwrap();
        self.send.send_request(request).await.unwrap()
    }

    pub(crate) async fn call(&mut self, method: &str, path: &str, body: &str, key: &str) -> Reply {
        let response = self.send(method, path, body, key).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let body = String::from_utf8(body.to_vec()).unwrap();
        Reply {
            status: head.status.as_u16(),
            headers: head.headers,
            body,
        }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Reply {
        self.call("GET", path, "", "").await
    }

    pub(crate) async fn post(&mut self, path: &str, body: &str) -> Reply {
        self.call("POST", path, body, "").await
    }

    /// Starts a streamed answer.
    pub(crate) async fn stream(mut self, path: &str, body: &str) -> Events {
        let response = self.send("POST", path, body, "").await;
        assert_eq!(response.status().as_u16(), 200);
        let body = response.into_body();
        Events {
            body,
            decoder: Decoder::new(),
            found: Vec::new(),
            client: self,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A streamed answer; dropping it closes the connection.
pub(crate) struct Events {
    body: Incoming,
    decoder: Decoder,
    found: Vec<String>,
    #[expect(dead_code, reason = "keeps the connection open")]
    client: Client,
}

impl Events {
    /// Data of the next event; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<String> {
        while self.found.is_empty() {
            let frame = self.body.frame().await?.unwrap();
            if let Ok(data) = frame.into_data() {
                let found = &mut self.found;
                self.decoder.push(&data, |event| {
                    found.push(String::from_utf8(event.to_vec()).unwrap());
                });
            }
        }
        Some(self.found.remove(0))
    }

    pub(crate) async fn rest(mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            events.push(event);
        }
        events
    }
}

/// The text in the events of a streamed answer.
pub(crate) fn text_of(events: &[String]) -> String {
    let chunks = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok());
    let text = |chunk: Value| {
        let choice = &chunk["choices"][0];
        let text = choice["delta"]["content"]
            .as_str()
            .or_else(|| choice["text"].as_str());
        text.unwrap_or_default().to_string()
    };
    chunks.map(text).collect()
}
