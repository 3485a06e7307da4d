//! `/health`, `/ready` and `/metrics`.

use axum::{
    Router,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{StatusCode, header};
use telemetry::metrics::Metrics;

use crate::pipeline::Pipeline;

/// The routes for probes and Prometheus; none asks for a key.
pub(crate) fn probes(metrics: Metrics, pipeline: Pipeline) -> Router {
    let ready = move || {
        let can_serve = pipeline.can_serve();
        async move {
            if can_serve {
                (StatusCode::OK, "ready\n")
            } else {
                (
                    StatusCode::SERVICE_UNAVAILABLE,
                    "no workers that could serve a request\n",
                )
            }
        }
    };
    Router::new()
        // Alive as long as it answers; without workers it is not ready, but restarting it would not help.
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(move || async move { render(&metrics) }))
}

fn render(metrics: &Metrics) -> Response {
    match metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
