//! What the HTTP and the gRPC front share: the pipeline, the keys, and who asks.

use http::{HeaderMap, HeaderValue, header};
use openai::ApiError;
use telemetry::trace::{REQUEST_ID, TraceContext};
use tokio::time::Instant;

use crate::{
    auth::Keys,
    http::HttpConfig,
    pipeline::{Pipeline, request::Origin},
};

/// What all handlers share.
#[derive(Clone)]
pub(crate) struct Front {
    pub(crate) pipeline: Pipeline,
    pub(crate) keys: Keys,
    pub(crate) config: HttpConfig,
    /// Unix seconds of the start: when the model was "created".
    pub(crate) started: u64,
}

impl Front {
    /// Who asks. A client's own request id is shown back to it, and is no key to anything.
    pub(crate) fn origin(&self, headers: &HeaderMap) -> Origin {
        let entropy = &self.pipeline.shared().seams.entropy;
        let given = headers
            .get(REQUEST_ID)
            .filter(|id| (1..=128).contains(&id.len()));
        let request_id = given.cloned().unwrap_or_else(|| {
            HeaderValue::try_from(format!("req_{:032x}", entropy.u128())).expect("hex digits")
        });
        let trace = TraceContext::extract(headers)
            .unwrap_or_else(|| TraceContext::root(entropy.u128(), entropy.u64()));
        Origin {
            request_id,
            trace,
            arrived: Instant::now(),
            timeout: None,
        }
    }

    /// # Errors
    /// 401 without the right key.
    pub(crate) fn authorise(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        self.keys.check(
            headers
                .get(header::AUTHORIZATION)
                .map(HeaderValue::as_bytes),
        )
    }
}
