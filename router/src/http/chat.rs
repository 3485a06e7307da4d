//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    response::Response,
};
use bytes::BytesMut;
use openai::{
    ApiError, ChatRequest, Usage,
    chat::{
        Alternative, AssistantMessage, CHUNK_OBJECT, Chat, Choice, ChunkChoice, Delta, Logprobs,
        OBJECT, TokenLogprob,
    },
};
use text::{Entry, Piece, Text, Tokenizer};

use super::answer::{Format, Head, Manner, WholeChoice, fail, respond};
use crate::{front::Front, metrics::Account, pipeline::request::Ask};

pub(super) async fn complete(State(front): State<Arc<Front>>, request: Request) -> Response {
    let origin = front.origin(request.headers());
    let account = Account::open(&front.pipeline.shared().metrics, &origin);
    match accept(&front, request).await {
        Ok((ask, format, manner)) => respond(front, origin, account, ask, format, manner).await,
        Err(error) => fail(account, error, origin.request_id),
    }
}

async fn accept(front: &Front, request: Request) -> Result<(Ask, ChatFormat, Manner), ApiError> {
    front.authorise(request.headers())?;
    let body = front.read(request.into_body()).await?;
    let request = ChatRequest::from_json(&body)?;
    let manner = Manner {
        is_streaming: request.common.is_streaming(),
        includes_usage: request.common.includes_usage(),
        answers: request.common.n.unwrap_or(1),
    };
    let shared = front.pipeline.shared();
    let format = ChatFormat {
        head: Head {
            id: format!("chatcmpl-{:032x}", shared.seams.entropy.u128()),
            created: (shared.seams.unix_time)(),
            model: request.model.clone(),
            includes_usage: manner.includes_usage,
        },
        text: Arc::clone(&shared.text),
        has_logprobs: request.logprobs,
    };
    Ok((Ask::from_chat(request)?, format, manner))
}

/// Writes chat answers.
struct ChatFormat {
    head: Head,
    text: Arc<Text>,
    has_logprobs: bool,
}

impl ChatFormat {
    fn choice(&self, choice: ChunkChoice<'_>, out: &mut BytesMut) {
        self.head.chunk(CHUNK_OBJECT, &[choice], None, out);
    }

    fn logprobs(&self, entries: &[Entry]) -> Option<Logprobs> {
        let content = entries
            .iter()
            .map(|entry| token_logprob(self.text.tokenizer(), entry));
        self.has_logprobs.then(|| Logprobs {
            content: content.collect(),
        })
    }
}

impl Format for ChatFormat {
    fn open(&mut self, index: u32, out: &mut BytesMut) {
        let delta = Delta {
            role: Some("assistant"),
            content: Some(""),
        };
        self.choice(
            ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
            },
            out,
        );
    }

    fn piece(&mut self, index: u32, piece: Piece, out: &mut BytesMut) {
        let delta = Delta {
            role: None,
            content: Some(&piece.text),
        };
        let logprobs = self.logprobs(&piece.entries);
        self.choice(
            ChunkChoice {
                index,
                delta,
                logprobs,
                finish_reason: None,
            },
            out,
        );
    }

    fn end(&mut self, index: u32, reason: &'static str, out: &mut BytesMut) {
        let (delta, finish_reason) = (Delta::default(), Some(reason));
        self.choice(
            ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason,
            },
            out,
        );
    }

    fn usage(&mut self, usage: Usage, out: &mut BytesMut) {
        let none: [ChunkChoice<'_>; 0] = [];
        self.head.chunk(CHUNK_OBJECT, &none, Some(usage), out);
    }

    fn whole(&mut self, choices: Vec<WholeChoice>, usage: Usage) -> String {
        let choices = choices
            .into_iter()
            .enumerate()
            .map(|(index, whole)| Choice {
                index: index as u32,
                logprobs: self.logprobs(&whole.piece.entries),
                message: AssistantMessage::new(whole.piece.text),
                finish_reason: whole.reason.into(),
            });
        let answer = Chat {
            id: self.head.id.clone(),
            object: OBJECT.into(),
            created: self.head.created,
            model: self.head.model.clone(),
            choices: choices.collect(),
            usage,
            system_fingerprint: None,
        };
        serde_json::to_string(&answer).expect("numbers and text always serialise")
    }
}

fn token_logprob(tokenizer: &Tokenizer, entry: &Entry) -> TokenLogprob {
    let alternative = |&(token, logprob): &(u32, f32)| Alternative {
        token: lossy(tokenizer.token_bytes(token)),
        logprob,
        bytes: tokenizer.text_bytes(token).to_vec(),
    };
    let Alternative {
        token,
        logprob,
        bytes,
    } = alternative(&(entry.token, entry.logprob));
    let top_logprobs = entry.top.iter().map(alternative).collect();
    TokenLogprob {
        token,
        logprob,
        bytes,
        top_logprobs,
    }
}

/// Bytes of a token as text.
pub(super) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_that_is_left_out_of_the_text_has_a_name_and_no_bytes() {
        let folder = tempfile::tempdir().unwrap();
        testkit::checkpoint::write_tiny(folder.path(), 1).unwrap();
        let text = Text::load(folder.path()).unwrap();
        let pad = text.tokenizer().id_of("<｜▁pad▁｜>").unwrap();
        let entry = Entry {
            token: pad,
            logprob: -1.0,
            top: vec![(pad, -1.0)],
        };
        let told = token_logprob(text.tokenizer(), &entry);
        let [alternative] = &told.top_logprobs[..] else {
            panic!("{told:?}");
        };
        assert_eq!((&*told.token, &*told.bytes), ("<｜▁pad▁｜>", &[][..]));
        assert_eq!(
            (&*alternative.token, &*alternative.bytes),
            ("<｜▁pad▁｜>", &[][..])
        );
    }
}
