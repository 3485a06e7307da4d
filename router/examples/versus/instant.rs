//! A gRPC worker for the benchmark that answers at once, as the HTTP workers beside it do: with bytes that were made once,
//! as soon as the whole question is there.

use std::{collections::HashMap, sync::Arc};

use axum::body::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response};
use prost::Message;
use proto::v1::{
    Committed, DecodeResponse, DescribeResponse, FinishReason, Finished, Identity, Load,
    PrefillDone, ReleaseResponse, ReserveResponse, Role, RunResponse, Token, WatchResponse,
    decode_response, run_response,
};
use tokio::net::TcpStream;

/// The answer to each method, framed.
#[derive(Debug)]
pub(crate) struct Answers(HashMap<&'static str, Bytes>);

/// The one that goes on for as long as the connection does.
const WATCH: &str = "/hadal.v1.Worker/Watch";

impl Answers {
    /// Of a worker that gives every answer `tokens` tokens.
    pub(crate) fn new(role: Role, name: &str, tokens: u32) -> Arc<Self> {
        let token = |index| Token {
            index,
            token: 30 + index,
            ..Token::default()
        };
        let run = [
            run_response::Event::Token(token(0)),
            run_response::Event::Done(PrefillDone::default()),
        ];
        let run = run.map(|event| RunResponse { event: Some(event) });
        let committed = decode_response::Event::Committed(Committed::default());
        let finished = decode_response::Event::Finished(Finished {
            reason: FinishReason::Length.into(),
            completion_tokens: tokens,
            ..Finished::default()
        });
        let rest = (1..tokens).map(|index| decode_response::Event::Token(token(index)));
        let generate = [committed].into_iter().chain(rest).chain([finished]);
        let generate = generate.map(|event| DecodeResponse { event: Some(event) });
        let reserve = ReserveResponse {
            lease: 1,
            incarnation: name.into(),
            cached_blocks: 0,
            total_blocks: 1,
        };
        Arc::new(Self(HashMap::from([
            ("/hadal.v1.Worker/Describe", framed([describe(role, name)])),
            (WATCH, framed([watch()])),
            ("/hadal.v1.Prefill/Run", framed(run)),
            ("/hadal.v1.Decode/Reserve", framed([reserve])),
            ("/hadal.v1.Decode/Generate", framed(generate)),
            (
                "/hadal.v1.Decode/Release",
                framed([ReleaseResponse { released: true }]),
            ),
        ])))
    }
}

fn describe(role: Role, name: &str) -> DescribeResponse {
    DescribeResponse {
        identity: Some(Identity {
            role: role.into(),
            incarnation: name.into(),
            revision: "r1".into(),
            ..Identity::default()
        }),
        kv_address: format!("{name}:kv"),
        kv_fingerprint: b"kv".to_vec(),
        block_tokens: 64,
        total_blocks: 1024,
        max_model_len: 4096,
        max_running: 64,
        vocab_size: 1 << 17,
        ..DescribeResponse::default()
    }
}

fn watch() -> WatchResponse {
    let load = Load {
        free_blocks: 1024,
        total_blocks: 1024,
        ..Load::default()
    };
    WatchResponse {
        sequence: 1,
        load: Some(load),
        ..WatchResponse::default()
    }
}

/// gRPC messages: not compressed, length, bytes.
fn framed<M: Message>(messages: impl IntoIterator<Item = M>) -> Bytes {
    let mut bytes = Vec::new();
    for message in messages {
        bytes.push(0);
        bytes.extend((message.encoded_len() as u32).to_be_bytes());
        bytes.extend(message.encode_to_vec());
    }
    bytes.into()
}

/// Serves one connection to its end.
pub(crate) async fn serve(stream: TcpStream, answers: Arc<Answers>) -> Result<(), h2::Error> {
    let mut connection = h2::server::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        .handshake(stream)
        .await?;
    while let Some(call) = connection.accept().await {
        let (request, respond) = call?;
        tokio::spawn(answer(request, respond, Arc::clone(&answers)));
    }
    Ok(())
}

async fn answer(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    answers: Arc<Answers>,
) -> Result<(), h2::Error> {
    let (head, mut body) = request.into_parts();
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data?.len())?;
    }
    let path = head.uri.path();
    let mut response = Response::new(());
    let content = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", content);
    let mut stream = respond.send_response(response, false)?;
    let Some(bytes) = answers.0.get(path) else {
        return stream.send_trailers(status("12"));
    };
    stream.send_data(bytes.clone(), false)?;
    if path == WATCH {
        // The stream lives until the router leaves.
        let left = std::future::poll_fn(|cx| stream.poll_reset(cx)).await;
        return left.map(drop);
    }
    stream.send_trailers(status("0"))
}

fn status(code: &'static str) -> HeaderMap {
    HeaderMap::from_iter([(
        http::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static(code),
    )])
}
