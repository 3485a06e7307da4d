//! Errors as HTTP responses.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use openai::ApiError;
use telemetry::trace::REQUEST_ID;

/// What the official client asks before it looks at the status.
const SHOULD_RETRY: http::HeaderName = http::HeaderName::from_static("x-should-retry");

/// An error envelope with the headers that belong to it.
#[derive(Debug)]
pub(crate) struct ErrorResponse {
    error: ApiError,
    request_id: HeaderValue,
}

impl ErrorResponse {
    pub(crate) fn new(error: ApiError, request_id: HeaderValue) -> Self {
        Self { error, request_id }
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.error.status);
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, self.error.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        headers.insert(REQUEST_ID, self.request_id);
        if let Some(seconds) = self.error.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.error.is_final {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}
