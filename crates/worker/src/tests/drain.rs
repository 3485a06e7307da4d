use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;

#[tokio::test]
async fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let mut node = Node::start(Role::Combined, "c");
    let mut health = HealthClient::new(node.channel().await);
    let mut watch = node
        .worker()
        .await
        .watch(v1::WatchRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut client = node.decode().await;
    let prompts: Vec<Vec<u32>> = (0..4).map(|i| prompt(i, 50)).collect();
    let mut running = vec![];
    for (i, prompt) in prompts.iter().enumerate() {
        let sequence = sequence(&format!("request-{i}"), prompt, &[], 100);
        let mut stream = generate(&node, sequence, None).await.unwrap();
        stream.message().await.unwrap().unwrap();
        running.push(stream);
    }
    let drain = v1::DrainRequest {
        deadline_ms: 10_000,
    };
    let drained = node.worker().await.drain(drain).await.unwrap().into_inner();
    assert_eq!(drained.running, 4);
    for service in [
        "",
        "hadal.v1.Worker",
        "hadal.v1.Decode",
        "hadal.v1.KvTransfer",
    ] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::NotServing, "{service:?}");
    }
    let request = v1::DecodeRequest {
        sequence: Some(sequence("late", &prompts[0], &[], 5)),
        ..v1::DecodeRequest::default()
    };
    assert_eq!(
        client.generate(request).await.unwrap_err().code(),
        Code::Unavailable
    );
    while !watch.message().await.unwrap().unwrap().draining {}
    for (stream, prompt) in running.into_iter().zip(&prompts) {
        let (tokens, _) = finish_generate(stream, 1).await.unwrap();
        assert_eq!(tokens, greedy(prompt, 100)[1..]);
    }
    while let Some(message) = watch.message().await.unwrap() {
        assert!(message.draining);
    }
    assert_eq!(node.ended().await, Ended::Whole);
}

#[tokio::test]
async fn a_drain_gives_up_at_its_deadline_and_says_why() {
    let mut node = Node::start(Role::Combined, "c");
    let prompt = prompt(1, 50);
    let mut stream = generate(&node, sequence("r", &prompt, &[], 1900), None)
        .await
        .unwrap();
    stream.message().await.unwrap().unwrap();
    node.worker()
        .await
        .drain(v1::DrainRequest { deadline_ms: 100 })
        .await
        .unwrap();
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an end"),
            Err(status) => break status,
        }
    };
    assert_eq!(
        (ended.code(), ended.message()),
        (Code::Unavailable, "the worker is draining")
    );
    assert_eq!(node.ended().await, Ended::GaveUp { calls: 1 });
}

#[tokio::test]
async fn a_lease_given_before_the_drain_is_kept() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(2, 200);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    decode.stop.cancel();
    while reserve(&decode, "other", &prompt).await.is_ok() {}
    let stream = run(
        &prefill,
        sequence("r", &prompt, &[], 9),
        target(&decode, &reserved),
    )
    .await;
    let (first, _) = finish_run(stream.unwrap()).await.unwrap();
    let stream = generate(
        &decode,
        sequence("r", &prompt, &[first], 9),
        Some(&reserved),
    )
    .await;
    let (rest, _) = finish_generate(stream.unwrap(), 1).await.unwrap();
    assert_eq!(rest, greedy(&prompt, 9)[1..]);
    assert_eq!(
        (decode.stop().await, prefill.stop().await),
        (Ended::Whole, Ended::Whole)
    );
}
