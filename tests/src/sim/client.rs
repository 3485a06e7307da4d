//! A client of the router's gRPC front that writes down all it is told.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use proto::v1::{
    FinishReason, GenerateRequest, Sampling, TokenIds, generate_request, generate_response::Event,
    inference_client::InferenceClient,
};
use tonic::transport::Endpoint;

use super::{net::Net, plan::Ask};

/// What a client saw of its request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// (index, token) as they came.
    pub tokens: Vec<(u32, u32)>,
    /// How it ended; more than one entry is a fault of the router.
    pub ends: Vec<End>,
}

/// How a request ended for its client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// With a reason.
    Finished(FinishReason),
    /// With an error of this code.
    Failed(tonic::Code),
    /// The client left.
    Left,
    /// The stream ended without a terminal event: a fault of the router.
    Silent,
    /// Nothing came for longer than the router may take: a fault of the router.
    Hung,
}

/// Longest time that a client waits for the next message: more than the router's own limit on a request.
pub(super) const PATIENCE: Duration = Duration::from_secs(40);

/// Sends `ask` and follows it to its end.
pub(super) async fn follow(net: &Net, ask: &Ask, seen: &Arc<Mutex<Outcome>>) {
    let end = match tokio::time::timeout(PATIENCE, stream(net, ask, seen)).await {
        Ok(end) => end,
        Err(_) => Some(End::Hung),
    };
    seen.lock().ends.extend(end);
}

/// Returns how it ended where the stream itself did not say.
async fn stream(net: &Net, ask: &Ask, seen: &Arc<Mutex<Outcome>>) -> Option<End> {
    let endpoint = Endpoint::from_static("http://router:9000");
    let mut client = InferenceClient::new(net.dial()(endpoint));
    let request = GenerateRequest {
        model: "toy".into(),
        input: Some(generate_request::Input::TokenIds(TokenIds {
            ids: ask.prompt.clone(),
        })),
        sampling: Some(Sampling {
            temperature: Some(ask.temperature),
            ..Sampling::default()
        }),
        max_tokens: ask.count as u32,
        ignore_eos: true,
        seed: Some(ask.seed),
        return_token_ids: true,
        ..GenerateRequest::default()
    };
    if ask.leave_after == Some(0) {
        // Leaves while the request is somewhere between queue and first token.
        let delay = Duration::from_millis(ask.seed % 200);
        let _ = tokio::time::timeout(delay, client.generate(request)).await;
        return Some(End::Left);
    }
    let mut messages = match client.generate(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Some(End::Failed(status.code())),
    };
    loop {
        let message = match messages.message().await {
            Ok(Some(message)) => message,
            Ok(None) if seen.lock().ends.is_empty() => return Some(End::Silent),
            Ok(None) => return None,
            Err(status) => return Some(End::Failed(status.code())),
        };
        let mut seen = seen.lock();
        match message.event {
            Some(Event::Delta(delta)) => seen
                .tokens
                .extend(delta.tokens.iter().map(|t| (t.index, t.token))),
            Some(Event::Finished(finished)) => seen.ends.push(End::Finished(finished.reason())),
            None => {}
        }
        if ask
            .leave_after
            .is_some_and(|count| seen.tokens.len() >= count)
            && seen.ends.is_empty()
        {
            return Some(End::Left);
        }
    }
}
