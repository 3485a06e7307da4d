//! `hadal.v1.Inference`.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};
use http::HeaderValue;
use openai::ApiError;
use proto::v1::{
    Delta, Finished, GenerateRequest, GenerateResponse, ListModelsRequest, ListModelsResponse,
    Model, generate_response::Event as Answer, inference_server,
};
use tonic::{Code, Request, Response, Status};

use crate::{
    front::Front,
    metrics::Account,
    pipeline::{Event, request::Ask},
};

/// The service.
pub(crate) struct Inference(Arc<Front>);

impl Inference {
    pub(crate) fn new(front: Arc<Front>) -> Self {
        Self(front)
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl inference_server::Inference for Inference {
    type GenerateStream = Answers;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Answers>, Status> {
        let headers = request.metadata().as_ref();
        self.0.authorise(headers).map_err(|error| status(&error))?;
        let mut origin = self.0.origin(headers);
        origin.timeout = headers.get("grpc-timeout").and_then(grpc_timeout);
        let message = request.into_inner();
        let returns_ids = message.return_token_ids;
        let ask = Ask::from_proto(message).map_err(|error| status(&error))?;
        let mut account = Account::open(&self.0.pipeline.shared().metrics, &origin);
        let generation = match self.0.pipeline.start(ask, &origin).await {
            Ok(generation) => generation,
            Err(error) => {
                account.close(error.status);
                return Err(status(&error));
            }
        };
        let answers = stream::unfold(Some((generation, account)), |state| async {
            let (mut generation, mut account) = state?;
            match generation.next().await {
                Some(Ok(event)) => Some((Ok(event), Some((generation, account)))),
                Some(Err(error)) => {
                    account.close(error.status);
                    Some((Err(status(&error)), None))
                }
                None => {
                    account.close(200);
                    None
                }
            }
        });
        let answers = answers.flat_map(move |event| match event {
            Ok(event) => {
                stream::iter(messages(event, returns_ids).into_iter().map(Ok)).left_stream()
            }
            Err(status) => stream::iter([Err(status)]).right_stream(),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn list_models(
        &self,
        request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        self.0
            .authorise(request.metadata().as_ref())
            .map_err(|error| status(&error))?;
        let pipeline = &self.0.pipeline;
        let id = pipeline.shared().config.model.clone();
        let models = vec![Model {
            id,
            max_model_len: pipeline.max_model_len(),
        }];
        Ok(Response::new(ListModelsResponse { models }))
    }
}

/// An event as messages: what is new, then the end.
fn messages(event: Event, returns_ids: bool) -> Vec<GenerateResponse> {
    let (choice, piece, token, end) = match event {
        Event::Delta {
            choice,
            piece,
            token,
        } => (choice, piece, Some(token), None),
        Event::Finished {
            choice,
            piece,
            token,
            reason,
            counts,
        } => {
            let finished = Finished {
                reason: reason.into(),
                prompt_tokens: counts.prompt,
                cached_tokens: counts.cached,
                completion_tokens: counts.completion,
            };
            (choice, piece, token, Some(finished))
        }
    };
    let tokens: Vec<_> = token.into_iter().filter(|_| returns_ids).collect();
    let delta = Delta {
        text: piece.text,
        tokens,
    };
    let is_empty = delta.text.is_empty() && delta.tokens.is_empty();
    let delta = (!is_empty).then_some(Answer::Delta(delta));
    let answers = delta.into_iter().chain(end.map(Answer::Finished));
    answers
        .map(|event| GenerateResponse {
            choice,
            event: Some(event),
        })
        .collect()
}

/// The canonical code of an error.
fn status(error: &ApiError) -> Status {
    let code = match error.status {
        401 => Code::Unauthenticated,
        404 => Code::NotFound,
        400..=428 => Code::InvalidArgument,
        429 => Code::ResourceExhausted,
        503 => Code::Unavailable,
        504 => Code::DeadlineExceeded,
        _ => Code::Internal,
    };
    Status::new(code, error.body.message.clone())
}

/// `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(value: &HeaderValue) -> Option<Duration> {
    let (digits, unit) = value
        .to_str()
        .ok()?
        .split_at_checked(value.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_s_deadline_is_read() {
        let read = |text: &'static str| grpc_timeout(&HeaderValue::from_static(text));
        assert_eq!(read("150m"), Some(Duration::from_millis(150)));
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        for broken in ["", "S", "5", "999999999S", "1x"] {
            assert_eq!(read(broken), None, "{broken}");
        }
    }
}
