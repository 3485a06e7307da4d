use tonic::Code;

use super::*;

#[tokio::test]
async fn a_dead_prefill_worker_leaves_nothing_behind() {
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(1, 2000);
    // Killed before it starts, while it computes, and when it is nearly done.
    for after_steps in [0, 2, 6] {
        let options = Options {
            chunk_tokens: 128,
            step_tokens: 128,
            ..Options::default()
        };
        let prefill = Node::start_with(Role::Prefill, "p", options);
        let request = format!("request-{after_steps}");
        let reserved = reserve(&decode, &request, &prompt).await.unwrap();
        let mut asked = sequence(&request, &prompt, &greedy(&prompt, 1), 9);
        asked.deadline_ms = 700;
        let waiting = generate(&decode, asked, Some(&reserved)).await.unwrap();
        let stream = run(
            &prefill,
            sequence(&request, &prompt, &[], 9),
            target(&decode, &reserved),
        )
        .await;
        while prefill.engine.counters().steps < after_steps {
            tokio::time::sleep(STEP).await;
        }
        prefill.kill().await;
        let broken = finish_run(stream.unwrap()).await.unwrap_err();
        assert!(
            matches!(
                broken.code(),
                Code::Unknown | Code::Unavailable | Code::Internal
            ),
            "{broken}"
        );
        let late = finish_generate(waiting, 1).await.unwrap_err();
        assert_eq!(late.code(), Code::DeadlineExceeded);
        decode.settled().await;
    }
    decode.stop().await;
}

#[tokio::test]
async fn a_lease_that_nobody_uses_expires() {
    let decode = Node::start(Role::Decode, "d");
    let request = v1::ReserveRequest {
        prompt_tokens: 0,
        key: Some(key("r", 0)),
        tokens: prompt(2, 500),
        kv_fingerprint: decode.engine.format().fingerprint().to_vec(),
        deadline_ms: 100,
        cache_salt: vec![],
    };
    let reserved = decode
        .decode()
        .await
        .reserve(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(decode.usage().quarantined, 8);
    decode.settled().await;
    let prompt = prompt(2, 500);
    let gone = generate(&decode, sequence("r", &prompt, &[1], 5), Some(&reserved)).await;
    let gone = gone.unwrap_err();
    assert_eq!(
        (gone.code(), gone.message()),
        (Code::NotFound, "the lease expired")
    );
    decode.stop().await;
}

#[tokio::test]
async fn leaving_at_any_point_gives_everything_back() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(3, 400);
    let first = greedy(&prompt, 1);
    for answers in 0..6 {
        let request = format!("request-{answers}");
        let reserved = reserve(&decode, &request, &prompt).await.unwrap();
        let asked = sequence(&request, &prompt, &first, 500);
        let mut waiting = generate(&decode, asked, Some(&reserved)).await.unwrap();
        if answers > 0 {
            let stream = run(
                &prefill,
                sequence(&request, &prompt, &[], 500),
                target(&decode, &reserved),
            );
            // Dropped without being read to its end where nothing is wanted of it.
            let stream = stream.await.unwrap();
            finish_run(stream).await.unwrap();
        }
        // `Committed`, then tokens.
        for _ in 0..answers {
            waiting.message().await.unwrap().unwrap();
        }
        drop(waiting);
        decode.settled().await;
        prefill.settled().await;
    }
    // A prefill that is left in the middle.
    let long = super::prompt(4, 2000);
    let reserved = reserve(&decode, "left", &long).await.unwrap();
    let stream = run(
        &prefill,
        sequence("left", &long, &[], 5),
        target(&decode, &reserved),
    )
    .await;
    let steps = prefill.engine.counters().steps;
    while prefill.engine.counters().steps < steps + 2 {
        tokio::time::sleep(STEP).await;
    }
    drop(stream);
    prefill.settled().await;
    let (lease, incarnation) = (reserved.lease, reserved.incarnation);
    decode
        .decode()
        .await
        .release(v1::ReleaseRequest { lease, incarnation })
        .await
        .unwrap();
    decode.settled().await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_restarted_decode_worker_is_somebody_else() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d-1");
    let prompt = prompt(5, 200);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let (address, kv) = (decode.address, decode.kv);
    decode.kill().await;
    let decode = Node::start_at(Role::Decode, "d-2", Options::default(), address, kv);
    // A lease of the same number exists again, and is another's.
    let other = reserve(&decode, "r", &prompt).await.unwrap();
    assert_eq!(other.lease, reserved.lease);
    let stream = run(
        &prefill,
        sequence("r", &prompt, &[], 5),
        target(&decode, &reserved),
    )
    .await;
    let refused = finish_run(stream.unwrap()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.metadata().get("hadal-failed").unwrap(), "transfer");
    let refused = generate(&decode, sequence("r", &prompt, &[1], 5), Some(&reserved)).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
    prefill.settled().await;
    prefill.stop().await;
}

#[tokio::test]
async fn bytes_that_do_not_match_their_checksum_are_never_used() {
    let prefill = Node::start(Role::Prefill, "p");
    let (one, two) = (
        Node::start(Role::Decode, "d-1"),
        Node::start(Role::Decode, "d-2"),
    );
    let prompt = prompt(6, 256);
    let (expected, ..) = hand_off(&prefill, &one, "a", &prompt, 8).await.unwrap();
    // As if the prefill worker's memory had lost a bit since the blocks were filled.
    let pool = prefill.engine.pool();
    for block in 0..pool.usage().total as u32 {
        pool.set_sum(kv::BlockId(block), 1, kv::BLOCK_TOKENS, 42);
    }
    let lost = hand_off(&prefill, &two, "b", &prompt, 8).await.unwrap_err();
    assert_eq!(lost.code(), Code::DataLoss, "{lost}");
    // What a router does then: another attempt, computed where it is decoded.
    let mut again = sequence("b", &prompt, &[], 8);
    again.key = Some(key("b", 1));
    let stream = generate(&two, again, None).await.unwrap();
    assert_eq!(finish_generate(stream, 0).await.unwrap().0, expected);
    prefill.stop().await;
    one.stop().await;
    two.stop().await;
}

#[tokio::test]
async fn a_newer_attempt_ends_the_older_one() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(7, 200);
    let older = reserve(&decode, "r", &prompt).await.unwrap();
    let waiting = generate(&decode, sequence("r", &prompt, &[1], 5), Some(&older))
        .await
        .unwrap();
    let request = v1::ReserveRequest {
        prompt_tokens: 0,
        key: Some(key("r", 1)),
        tokens: prompt.clone(),
        kv_fingerprint: decode.engine.format().fingerprint().to_vec(),
        deadline_ms: 10_000,
        cache_salt: vec![],
    };
    decode.decode().await.reserve(request).await.unwrap();
    assert_eq!(
        finish_generate(waiting, 1).await.unwrap_err().code(),
        Code::Aborted
    );
    let stream = run(
        &prefill,
        sequence("r", &prompt, &[], 5),
        target(&decode, &older),
    )
    .await;
    assert_eq!(
        finish_run(stream.unwrap()).await.unwrap_err().code(),
        Code::Aborted
    );
    let late = reserve(&decode, "r", &prompt).await.unwrap_err();
    assert_eq!(late.code(), Code::Aborted);
    prefill.stop().await;
}

#[tokio::test]
async fn a_lease_is_only_good_for_its_own_tokens() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let (prompt, other) = (prompt(8, 200), prompt(9, 200));
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let stream = run(
        &prefill,
        sequence("r", &prompt, &[], 5),
        target(&decode, &reserved),
    )
    .await;
    finish_run(stream.unwrap()).await.unwrap();
    let stream = generate(&decode, sequence("r", &other, &[1], 5), Some(&reserved)).await;
    let refused = finish_generate(stream.unwrap(), 1).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    decode.settled().await;
    prefill.stop().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_worker_whose_engine_died_leaves_and_says_so() {
    let mut node = Node::start(Role::Combined, "c");
    node.stepper.take().unwrap().abort();
    let prompt = prompt(10, 20);
    // The engine's end is noticed by whoever asks next.
    let refused = loop {
        let mut asked = sequence("r", &prompt, &[], 5);
        asked.deadline_ms = 100;
        let Ok(stream) = generate(&node, asked, None).await else {
            break None;
        };
        match finish_generate(stream, 0).await {
            Err(status) if status.code() == Code::Unavailable => break Some(status),
            Err(_) => {}
            Ok(_) => panic!("an answer from a dead engine"),
        }
    };
    assert!(refused.is_none_or(|status| status.message().contains("broken")));
    let ended = tokio::time::timeout(PATIENCE, &mut node.serving)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(ended, Err(Error::Engine(_))), "{ended:?}");
}
