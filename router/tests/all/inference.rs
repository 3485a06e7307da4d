//! The gRPC front.

use http::Uri;
use hyper_util::rt::TokioIo;
use proto::v1::{
    Chat, ChatMessage, GenerateRequest, GenerateResponse, ListModelsRequest, TokenIds,
    generate_request::Input, generate_response::Event, inference_client::InferenceClient,
};
use router::Keys;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::harness::{Harness, Setup};

async fn connect(harness: &Harness) -> InferenceClient<Channel> {
    let network = harness.network.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let network = network.clone();
        async move { network.dial("router:grpc").await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://router");
    InferenceClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

fn request(ids: Vec<u32>) -> GenerateRequest {
    GenerateRequest {
        model: "m".into(),
        input: Some(Input::TokenIds(TokenIds { ids })),
        max_tokens: 6,
        return_token_ids: true,
        ..GenerateRequest::default()
    }
}

async fn answers(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
) -> Vec<GenerateResponse> {
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut answers = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        answers.push(answer);
    }
    answers
}

#[tokio::test(start_paused = true)]
async fn an_answer_streams_with_text_ids_and_one_end() {
    let harness = Setup::default().start().await;
    let mut client = connect(&harness).await;
    let answers = answers(&mut client, request(vec![5, 6])).await;
    let (mut text, mut ids, mut ends) = (String::new(), Vec::new(), Vec::new());
    for answer in answers {
        match answer.event.unwrap() {
            Event::Delta(delta) => {
                text.push_str(&delta.text);
                ids.extend(delta.tokens.iter().map(|token| token.index));
            }
            Event::Finished(finished) => ends.push(finished),
        }
    }
    assert_eq!(text, harness.expected(&[5, 6], 6));
    assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
    assert_eq!(ends.len(), 1);
    assert_eq!((ends[0].prompt_tokens, ends[0].completion_tokens), (2, 6));
}

#[tokio::test(start_paused = true)]
async fn both_fronts_render_a_chat_alike() {
    let harness = Setup::default().start().await;
    let body = r#"{"model":"m","messages":[{"role":"user","content":"Hello!"}],"max_tokens":6}"#;
    let http = harness.post("/v1/chat/completions", body).await.json();
    let message = ChatMessage {
        role: "user".into(),
        content: "Hello!".into(),
    };
    let chat = Chat {
        messages: vec![message],
        thinking: false,
    };
    let mut client = connect(&harness).await;
    let request = GenerateRequest {
        input: Some(Input::Chat(chat)),
        ..request(Vec::new())
    };
    let mut text = String::new();
    for answer in answers(&mut client, request).await {
        if let Some(Event::Delta(delta)) = answer.event {
            text.push_str(&delta.text);
        }
    }
    assert_eq!(http["choices"][0]["message"]["content"], text);
}

#[tokio::test(start_paused = true)]
async fn errors_have_canonical_codes() {
    let mut setup = Setup::default();
    setup.config.keys = Keys::new(["secret".to_string()]);
    let harness = setup.start().await;
    let mut client = connect(&harness).await;
    let refused = client.generate(request(vec![5])).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let with_key = |message| {
        let mut request = tonic::Request::new(message);
        request
            .metadata_mut()
            .insert("authorization", "Bearer secret".parse().unwrap());
        request
    };
    for (wrong, code) in [
        (
            GenerateRequest {
                model: "other".into(),
                ..request(vec![5])
            },
            Code::NotFound,
        ),
        (
            GenerateRequest {
                input: None,
                ..request(vec![5])
            },
            Code::InvalidArgument,
        ),
        (
            GenerateRequest {
                n: 500,
                ..request(vec![5])
            },
            Code::InvalidArgument,
        ),
        (request(Vec::new()), Code::InvalidArgument),
    ] {
        assert_eq!(
            client.generate(with_key(wrong)).await.unwrap_err().code(),
            code
        );
    }
    let mut list = tonic::Request::new(ListModelsRequest {});
    list.metadata_mut()
        .insert("authorization", "Bearer secret".parse().unwrap());
    let models = client.list_models(list).await.unwrap().into_inner().models;
    assert_eq!(
        (models[0].id.as_str(), models[0].max_model_len),
        ("m", 4096)
    );
}

#[tokio::test(start_paused = true)]
async fn health_says_when_the_router_leaves() {
    let harness = Setup::default().start().await;
    let network = harness.network.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let network = network.clone();
        async move { network.dial("router:grpc").await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://router")
        .connect_with_connector(connector)
        .await
        .unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let service = "hadal.v1.Inference".to_string();
    let request = tonic_health::pb::HealthCheckRequest { service };
    let status = health.check(request).await.unwrap().into_inner().status();
    assert_eq!(
        status,
        tonic_health::pb::health_check_response::ServingStatus::Serving
    );
}
