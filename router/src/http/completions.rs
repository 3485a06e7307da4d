//! `/v1/completions`.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    response::Response,
};
use bytes::BytesMut;
use openai::{
    ApiError, CompletionRequest, Usage,
    completion::{Choice, ChunkChoice, Completion, Logprobs, OBJECT, Prompt},
};
use text::{Entry, Piece, Text};

use super::{
    answer::{Format, Head, Manner, WholeChoice, fail, respond},
    chat::lossy,
};
use crate::{front::Front, metrics::Account, pipeline::request::Ask};

pub(super) async fn complete(State(front): State<Arc<Front>>, request: Request) -> Response {
    let origin = front.origin(request.headers());
    let account = Account::open(&front.pipeline.shared().metrics, &origin);
    match accept(&front, request).await {
        Ok((ask, format, manner)) => respond(front, origin, account, ask, format, manner).await,
        Err(error) => fail(account, error, origin.request_id),
    }
}

async fn accept(
    front: &Front,
    request: Request,
) -> Result<(Ask, CompletionFormat, Manner), ApiError> {
    front.authorise(request.headers())?;
    let body = front.read(request.into_body()).await?;
    let request = CompletionRequest::from_json(&body)?;
    let answers = request.common.n.unwrap_or(1);
    let manner = Manner {
        is_streaming: request.common.is_streaming(),
        includes_usage: request.common.includes_usage(),
        answers,
    };
    let shared = front.pipeline.shared();
    let echoes = if request.echo {
        echoes(&request.prompts, &shared.text)
    } else {
        Vec::new()
    };
    let format = CompletionFormat {
        head: Head {
            id: format!("cmpl-{:032x}", shared.seams.entropy.u128()),
            created: (shared.seams.unix_time)(),
            model: request.model.clone(),
            includes_usage: manner.includes_usage,
        },
        text: Arc::clone(&shared.text),
        has_logprobs: request.logprobs.is_some(),
        answers,
        echoes,
        offsets: Vec::new(),
    };
    Ok((Ask::from_completion(request)?, format, manner))
}

/// Each prompt's text.
fn echoes(prompts: &[Prompt], text: &Text) -> Vec<String> {
    let echo = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(ids) => {
            let bytes = ids.iter().flat_map(|id| text.tokenizer().token_bytes(*id));
            lossy(&bytes.copied().collect::<Vec<u8>>())
        }
    };
    prompts.iter().map(echo).collect()
}

/// Writes answers to raw prompts.
struct CompletionFormat {
    head: Head,
    text: Arc<Text>,
    has_logprobs: bool,
    answers: u32,
    echoes: Vec<String>,
    /// Characters of each choice's tokens so far, for `text_offset`.
    offsets: Vec<u32>,
}

impl CompletionFormat {
    fn choice(&self, choice: ChunkChoice<'_>, out: &mut BytesMut) {
        self.head.chunk(OBJECT, &[choice], None, out);
    }

    fn echo(&self, choice: u32) -> Option<&String> {
        self.echoes.get((choice / self.answers) as usize)
    }

    fn logprobs(&mut self, choice: u32, entries: &[Entry]) -> Option<Logprobs> {
        if !self.has_logprobs {
            return None;
        }
        let tokenizer = self.text.tokenizer();
        let index = choice as usize;
        if self.offsets.len() <= index {
            self.offsets.resize(index + 1, 0);
        }
        let offset = &mut self.offsets[index];
        let mut logprobs = Logprobs::default();
        for entry in entries {
            logprobs.text_offset.push(*offset);
            let token = lossy(tokenizer.token_bytes(entry.token));
            if !tokenizer.is_hidden(entry.token) {
                *offset += token.chars().count() as u32;
            }
            logprobs.tokens.push(token);
            logprobs.token_logprobs.push(entry.logprob);
            let top = entry.top.iter().map(|(token, logprob)| {
                (
                    lossy(tokenizer.token_bytes(*token)),
                    serde_json::json!(logprob),
                )
            });
            logprobs.top_logprobs.push(top.collect());
        }
        Some(logprobs)
    }
}

impl Format for CompletionFormat {
    fn open(&mut self, index: u32, out: &mut BytesMut) {
        if let Some(text) = self.echo(index) {
            let choice = ChunkChoice {
                index,
                text,
                logprobs: None,
                finish_reason: None,
            };
            self.choice(choice, out);
        }
    }

    fn piece(&mut self, index: u32, piece: Piece, out: &mut BytesMut) {
        let logprobs = self.logprobs(index, &piece.entries);
        let choice = ChunkChoice {
            index,
            text: &piece.text,
            logprobs,
            finish_reason: None,
        };
        self.choice(choice, out);
    }

    fn end(&mut self, index: u32, reason: &'static str, out: &mut BytesMut) {
        let finish_reason = Some(reason);
        self.choice(
            ChunkChoice {
                index,
                text: "",
                logprobs: None,
                finish_reason,
            },
            out,
        );
    }

    fn usage(&mut self, usage: Usage, out: &mut BytesMut) {
        let none: [ChunkChoice<'_>; 0] = [];
        self.head.chunk(OBJECT, &none, Some(usage), out);
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> String {
        let choices = choices.into_iter().enumerate().map(|(index, whole)| {
            let index = index as u32;
            let logprobs = self.logprobs(index, &whole.piece.entries);
            let echo = self.echo(index).map_or("", String::as_str);
            Choice {
                index,
                text: format!("{echo}{}", whole.piece.text),
                logprobs,
                finish_reason: Some(whole.reason.into()),
            }
        });
        let choices = choices.collect();
        let answer = Completion {
            id: self.head.id.clone(),
            object: OBJECT.into(),
            created: self.head.created,
            model: self.head.model.clone(),
            choices,
            usage,
            system_fingerprint: None,
        };
        serde_json::to_string(&answer).expect("numbers and text always serialise")
    }
}
