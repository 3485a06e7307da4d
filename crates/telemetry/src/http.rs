//! The small HTTP server that every process has: `/metrics` for Prometheus, `/health` (alive) and `/ready` (takes work)
//! for probes.

use axum::{
    Router,
    extract::State as Shared,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio_util::sync::CancellationToken;

use crate::{
    health::{Health, State},
    metrics::Metrics,
};

/// The three routes, to merge into a process's own router or to [`serve`] alone.
pub fn routes(metrics: Metrics, health: Health) -> Router {
    Router::new()
        .route("/metrics", get(show_metrics))
        .with_state(metrics)
        .route("/health", get(show_health).with_state(health.clone()))
        .route("/ready", get(show_ready).with_state(health))
}

/// Serves [`routes`] on `listener` until `stop`; requests that run then are finished.
///
/// # Errors
/// When the listener breaks.
pub async fn serve<L>(
    listener: L,
    metrics: Metrics,
    health: Health,
    stop: CancellationToken,
) -> std::io::Result<()>
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    axum::serve(listener, routes(metrics, health))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn show_metrics(Shared(metrics): Shared<Metrics>) -> Response {
    match metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn show_health(Shared(health): Shared<Health>) -> Response {
    match health.check_liveness() {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
    }
}

async fn show_ready(Shared(health): Shared<Health>) -> Response {
    let state = health.state();
    let status = match state {
        State::Ready => StatusCode::OK,
        State::Starting | State::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, format!("{}\n", state.as_str())).into_response()
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, http::Request};
    use tower::ServiceExt;

    use super::*;

    async fn status(routes: &Router, path: &str) -> StatusCode {
        let request = Request::get(path).body(Body::empty()).unwrap();
        routes.clone().oneshot(request).await.unwrap().status()
    }

    #[tokio::test]
    async fn a_process_is_alive_before_during_and_after_it_is_ready() {
        let health = Health::new();
        let routes = routes(Metrics::new(&[]).unwrap(), health.clone());
        for (state, ready) in [
            (State::Starting, StatusCode::SERVICE_UNAVAILABLE),
            (State::Ready, StatusCode::OK),
            (State::Draining, StatusCode::SERVICE_UNAVAILABLE),
        ] {
            health.advance(state);
            assert_eq!(status(&routes, "/ready").await, ready);
            assert_eq!(status(&routes, "/health").await, StatusCode::OK);
            assert_eq!(status(&routes, "/metrics").await, StatusCode::OK);
        }
    }

    #[tokio::test]
    async fn a_stuck_engine_is_reported_as_not_alive() {
        let health = Health::new().with_liveness(|| Err("no step for 60 s".into()));
        let routes = routes(Metrics::new(&[]).unwrap(), health);
        assert_eq!(
            status(&routes, "/health").await,
            StatusCode::SERVICE_UNAVAILABLE
        );
    }
}
