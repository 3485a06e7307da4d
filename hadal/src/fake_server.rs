//! An OpenAI server for tests: it answers with as many tokens as asked for, counts who is there, and can refuse.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// What the server saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: AtomicUsize,
    under_way: AtomicUsize,
    pub(crate) most_under_way: AtomicUsize,
}

/// How it behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Behaviour {
    /// Between tokens.
    pub(crate) pause: Duration,
    /// Every request after this many is refused with 429.
    pub(crate) accept: usize,
}

/// Serves for as long as the test's runtime lives; gives the address.
pub(crate) async fn serve(behaviour: Behaviour) -> (String, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Seen::default());
    let shared = seen.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let seen = shared.clone();
            let service = service_fn(move |request| answer(request, behaviour, seen.clone()));
            tokio::spawn(
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    (url, seen)
}

type Body = UnsyncBoxBody<Bytes, Infallible>;

fn whole(status: u16, body: &Value) -> Response<Body> {
    let body = http_body_util::Full::new(Bytes::from(body.to_string())).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}

async fn answer(
    request: Request<Incoming>,
    behaviour: Behaviour,
    seen: Arc<Seen>,
) -> Result<Response<Body>, Infallible> {
    if request.uri().path() == "/v1/models" {
        return Ok(whole(
            200,
            &json!({"data": [{"id": "fake", "max_model_len": 1000}]}),
        ));
    }
    let count = seen.requests.fetch_add(1, Ordering::SeqCst);
    let body = request.into_body().collect().await.unwrap().to_bytes();
    if count >= behaviour.accept {
        return Ok(whole(429, &json!({"error": {"message": "full"}})));
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let tokens = body["max_tokens"].as_u64().unwrap();
    let guard = Here::enter(seen);
    let mut events: Vec<String> = (0..tokens)
        .map(|i| json!({"choices": [{"text": format!("t{i} ")}]}).to_string())
        .collect();
    events.push(json!({"choices": [], "usage": {"completion_tokens": tokens}}).to_string());
    events.push("[DONE]".into());
    let stream = futures::stream::iter(events).then(move |event| {
        let _here = &guard;
        async move {
            tokio::time::sleep(behaviour.pause).await;
            Ok(Frame::data(Bytes::from(format!("data: {event}\n\n"))))
        }
    });
    Ok(Response::new(StreamBody::new(stream).boxed_unsync()))
}

/// Counts a request for as long as it is answered.
struct Here(Arc<Seen>);

impl Here {
    fn enter(seen: Arc<Seen>) -> Self {
        let now = seen.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        seen.most_under_way.fetch_max(now, Ordering::SeqCst);
        Self(seen)
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}
