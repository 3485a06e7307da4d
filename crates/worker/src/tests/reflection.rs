//! What a person with `grpcurl` sees.

use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::*;

/// The services that a worker lists.
async fn listed(role: Role) -> Vec<String> {
    let node = Node::start(role, "w");
    let ask = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let mut client = ServerReflectionClient::new(node.channel().await);
    let answers = client
        .server_reflection_info(futures::stream::iter([ask]))
        .await
        .unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        unreachable!("asked for a list, got {answer:?}")
    };
    let mut names: Vec<String> = list.service.into_iter().map(|it| it.name).collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_worker_lists_what_it_serves_and_nothing_else() {
    let health = "grpc.health.v1.Health";
    assert_eq!(
        listed(Role::Prefill).await,
        [health, "hadal.v1.Prefill", "hadal.v1.Worker"]
    );
    assert_eq!(
        listed(Role::Combined).await,
        [health, "hadal.v1.Decode", "hadal.v1.Worker"]
    );
}
