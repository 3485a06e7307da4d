//! The OpenAI HTTP front: connections, routes, keys, identifiers. What an endpoint answers is in a file of its own.

mod answer;
mod chat;
mod completions;
mod error;
mod models;
mod probes;
mod stream;

use std::{io, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::header;
use http_body_util::{BodyExt, Limited};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use openai::ApiError;
use telemetry::shutdown::Tasks;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{front::Front, seams::Io};
pub(crate) use error::ErrorResponse;
pub(crate) use probes::probes;

/// Limits of the HTTP front.
#[derive(Clone, Copy, Debug)]
pub struct HttpConfig {
    /// Largest request body in bytes.
    pub max_body_bytes: usize,
    /// Longest time for a request's headers, and for its body.
    pub read_timeout: Duration,
    /// A streamed answer with nothing to say sends a comment this often.
    pub comment_interval: Duration,
    /// Most connections.
    pub max_connections: usize,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            max_body_bytes: 16 << 20,
            read_timeout: Duration::from_secs(30),
            comment_interval: Duration::from_secs(5),
            max_connections: 16_384,
        }
    }
}

/// The routes of the API.
pub(crate) fn routes(front: Front) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::show))
        .route("/version", get(version))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_url)
        .with_state(Arc::new(front))
}

async fn version() -> Response {
    let body = format!(r#"{{"version":"{}"}}"#, env!("CARGO_PKG_VERSION"));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn unknown_url(State(front): State<Arc<Front>>, request: Request) -> ErrorResponse {
    let error = ApiError::unknown_url(request.method().as_str(), request.uri().path());
    ErrorResponse::new(error, front.origin(request.headers()).request_id)
}

async fn wrong_method(State(front): State<Arc<Front>>, request: Request) -> ErrorResponse {
    let error = ApiError::method_not_allowed(request.method().as_str(), request.uri().path());
    ErrorResponse::new(error, front.origin(request.headers()).request_id)
}

impl Front {
    /// Reads a request's body.
    ///
    /// # Errors
    /// 413 if it is too large, 408 if it does not come, 400 if it breaks off.
    async fn read(&self, body: Body) -> Result<Bytes, ApiError> {
        let limit = self.config.max_body_bytes;
        let collected = timeout(
            self.config.read_timeout,
            Limited::new(body, limit).collect(),
        )
        .await;
        match collected {
            Err(_) => Err(ApiError::request_timeout()),
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
                Err(ApiError::body_too_large(limit))
            }
            Ok(Err(_)) => Err(ApiError::invalid("body", "The request body broke off.")),
        }
    }
}

/// When a front stops.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop {
    /// No new requests; those that run may end.
    pub(crate) drain: CancellationToken,
    /// Those that still run are cut off.
    pub(crate) abort: CancellationToken,
}

/// Serves `app` on every connection of `incoming` until `stop`.
pub(crate) async fn serve<IO: Io>(
    incoming: impl Stream<Item = io::Result<IO>> + Send,
    app: Router,
    config: HttpConfig,
    tasks: Tasks,
    stop: Stop,
) {
    let mut incoming = std::pin::pin!(incoming);
    let slots = Arc::new(tokio::sync::Semaphore::new(config.max_connections));
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.drain.cancelled() => return,
            accepted = incoming.next() => accepted,
        };
        let io = match accepted {
            Some(Ok(io)) => io,
            Some(Err(error)) => {
                warn!(%error, "a connection could not be accepted");
                // Out of file descriptors, most likely: give them time to come back.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            None => return,
        };
        // Too many connections: this one is closed at once.
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            continue;
        };
        let connection = connection(io, app.clone(), config, stop.clone());
        tasks.spawn("http connection", async move {
            connection.await;
            drop(slot);
        });
    }
}

async fn connection<IO: Io>(io: IO, app: Router, config: HttpConfig, stop: Stop) {
    let service = TowerToHyperService::new(app);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.read_timeout)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = stop.drain.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                biased;
                ended = connection => ended,
                () = stop.abort.cancelled() => Ok(()),
            }
        }
    };
    if let Err(error) = ended {
        debug!(%error, "connection ended");
    }
}
