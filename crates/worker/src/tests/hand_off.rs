use proto::v1::FinishReason;

use super::*;

#[tokio::test]
async fn a_handed_over_sequence_says_what_it_says_whole() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    // Less than a block, a block exactly, several and a part, several chunks.
    for (i, len) in [1, 63, 64, 65, 200, 700].into_iter().enumerate() {
        let (request, prompt) = (format!("request-{i}"), prompt(i as u32, len));
        let (tokens, done, finished) = hand_off(&prefill, &decode, &request, &prompt, 20)
            .await
            .unwrap();
        assert_eq!(tokens, greedy(&prompt, 20), "prompt of {len}");
        assert_eq!(finished.reason(), FinishReason::Length);
        assert_eq!(
            (finished.prompt_tokens, finished.completion_tokens),
            (len, 20)
        );
        let format = prefill.engine.format();
        let bytes = len as usize * format.row_bytes() * format.layers;
        assert_eq!(done.transferred_bytes, bytes as u64);

        let whole = generate(
            &decode,
            sequence(&format!("whole-{i}"), &prompt, &[], 20),
            None,
        );
        let (whole, _) = finish_generate(whole.await.unwrap(), 0).await.unwrap();
        assert_eq!(whole, tokens);
    }
    prefill.settled().await;
    decode.settled().await;
    assert_eq!(
        (prefill.stop().await, decode.stop().await),
        (Ended::Whole, Ended::Whole)
    );
}

#[tokio::test]
async fn generate_may_wait_before_anything_was_sent() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(1, 150);
    let expected = greedy(&prompt, 9);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    // The router cannot know the first token yet; this test does.
    let waiting = generate(
        &decode,
        sequence("r", &prompt, &expected[..1], 9),
        Some(&reserved),
    );
    let waiting = finish_generate(waiting.await.unwrap(), 1);
    let running = async {
        let stream = run(
            &prefill,
            sequence("r", &prompt, &[], 9),
            target(&decode, &reserved),
        );
        finish_run(stream.await.unwrap()).await
    };
    let (generated, ran) = tokio::join!(waiting, running);
    assert_eq!(ran.unwrap().0, expected[0]);
    assert_eq!(generated.unwrap().0, expected[1..]);
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn what_both_caches_hold_is_neither_computed_nor_sent_again() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(2, 300);
    let (first, ..) = hand_off(&prefill, &decode, "a", &prompt, 5).await.unwrap();
    let (again, done, _) = hand_off(&prefill, &decode, "b", &prompt, 5).await.unwrap();
    assert_eq!(first, again);
    assert_eq!(done.cached_tokens, 256);
    let format = prefill.engine.format();
    let tail = (300 - 256) * format.row_bytes() * format.layers;
    assert_eq!(done.transferred_bytes, tail as u64);
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn many_sequences_at_once_do_not_mix() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let requests = (0..8).map(|i| {
        let prompt = prompt(i, 40 + i * 31);
        let (prefill, decode) = (&prefill, &decode);
        async move {
            let request = format!("request-{i}");
            let (tokens, ..) = hand_off(prefill, decode, &request, &prompt, 12)
                .await
                .unwrap();
            assert_eq!(tokens, greedy(&prompt, 12), "request {i}");
        }
    });
    futures::future::join_all(requests).await;
    prefill.settled().await;
    decode.settled().await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_first_token_that_ends_the_sequence_needs_no_decode() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(3, 100);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let stream = run(
        &prefill,
        sequence("r", &prompt, &[], 1),
        target(&decode, &reserved),
    )
    .await;
    let (first, done) = finish_run(stream.unwrap()).await.unwrap();
    assert_eq!(first, greedy(&prompt, 1)[0]);
    assert_eq!(done.finish(), FinishReason::Length);
    let (lease, incarnation) = (reserved.lease, reserved.incarnation);
    let release = v1::ReleaseRequest { lease, incarnation };
    let mut client = decode.decode().await;
    assert!(
        client
            .release(release.clone())
            .await
            .unwrap()
            .into_inner()
            .released
    );
    assert!(
        !client.release(release).await.unwrap().into_inner().released,
        "it is idempotent"
    );
    decode.settled().await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_watcher_sees_load_and_cached_prefixes() {
    let node = Node::start(Role::Combined, "c");
    let describe = node
        .worker()
        .await
        .describe(v1::DescribeRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(describe.identity.unwrap().role(), v1::Role::Combined);
    let mut watch = node
        .worker()
        .await
        .watch(v1::WatchRequest {})
        .await
        .unwrap()
        .into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(
        (first.sequence, first.draining, first.stored.len()),
        (1, false, 0)
    );
    let prompt = prompt(4, 130);
    let stream = generate(&node, sequence("r", &prompt, &[], 4), None)
        .await
        .unwrap();
    finish_generate(stream, 0).await.unwrap();
    let mut stored = vec![];
    while stored.len() < 2 {
        stored.extend(watch.message().await.unwrap().unwrap().stored);
    }
    assert_eq!(stored.len(), 2);
    let mut hashes = node.engine.pool().hashes(&prompt, &[]);
    hashes.sort_unstable();
    stored.sort_unstable();
    assert_eq!(stored, hashes);
    node.stop().await;
}

#[tokio::test]
async fn what_happened_shows_in_the_metrics() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(5, 100);
    hand_off(&prefill, &decode, "r", &prompt, 6).await.unwrap();
    // Counters of the engine are read a few times a second.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let bytes = 100 * prefill.engine.format().row_bytes() * prefill.engine.format().layers;
    let (sent, received) = (
        prefill.metrics.render().unwrap(),
        decode.metrics.render().unwrap(),
    );
    for (text, line) in [
        (
            &sent,
            format!(
                "hadal_kv_transfer_bytes_total{{direction=\"sent\",transport=\"grpc\"}} {bytes}"
            ),
        ),
        (
            &received,
            format!(
                "hadal_kv_transfer_bytes_total{{direction=\"received\",transport=\"grpc\"}} {bytes}"
            ),
        ),
        (
            &sent,
            "hadal_worker_prompt_tokens_total{source=\"computed\"} 100".into(),
        ),
        (
            &received,
            "hadal_worker_prompt_tokens_total{source=\"transferred\"} 100".into(),
        ),
        (
            &sent,
            "hadal_worker_requests_total{result=\"hand_off\"} 1".into(),
        ),
        (
            &received,
            "hadal_worker_requests_total{result=\"length\"} 1".into(),
        ),
        (&received, "hadal_worker_generated_tokens_total 5".into()),
        (&received, "hadal_kv_leases 0".into()),
        (
            &sent,
            "hadal_kv_transport_info{transport=\"grpc\"} 1".into(),
        ),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    assert!(
        received.contains("hadal_expert_layer_balancedness_ratio"),
        "{received}"
    );
    prefill.stop().await;
    decode.stop().await;
}
