//! `/v1/models`.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, header};
use openai::{
    ApiError,
    models::{Model, ModelList},
};
use serde::Serialize;
use telemetry::trace::REQUEST_ID;

use super::ErrorResponse;
use crate::front::Front;

pub(super) async fn list(State(front): State<Arc<Front>>, headers: HeaderMap) -> Response {
    respond(&front, &headers, || Ok(ModelList::new(vec![model(&front)])))
}

pub(super) async fn show(
    State(front): State<Arc<Front>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    respond(&front, &headers, || {
        front.pipeline.check_model(&id).map(|()| model(&front))
    })
}

fn model(front: &Front) -> Model {
    let name = front.pipeline.shared().config.model.clone();
    let length = front.pipeline.max_model_len();
    Model::new(
        name,
        front.started,
        Some(length).filter(|length| *length > 0),
    )
}

fn respond<T: Serialize>(
    front: &Front,
    headers: &HeaderMap,
    answer: impl FnOnce() -> Result<T, ApiError>,
) -> Response {
    let request_id = front.origin(headers).request_id;
    match front.authorise(headers).and_then(|()| answer()) {
        Ok(answer) => {
            let json = serde_json::to_string(&answer).expect("numbers and text always serialise");
            let content = header::HeaderValue::from_static("application/json");
            (
                [(header::CONTENT_TYPE, content), (REQUEST_ID, request_id)],
                json,
            )
                .into_response()
        }
        Err(error) => ErrorResponse::new(error, request_id).into_response(),
    }
}
