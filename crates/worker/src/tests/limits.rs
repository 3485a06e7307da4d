use tonic::Code;

use super::*;

#[tokio::test]
async fn a_full_queue_says_so_at_once() {
    let options = Options {
        max_running: 1,
        max_waiting: 1,
        ..Options::default()
    };
    let node = Node::start_with(Role::Combined, "c", options);
    let prompt = prompt(1, 20);
    let mut streams = vec![];
    let refused = loop {
        let request = format!("request-{}", streams.len());
        match generate(&node, sequence(&request, &prompt, &[], 1000), None).await {
            // The queue is the engine's: it may speak after the stream began.
            Ok(mut stream) => match tokio::time::timeout(STEP * 50, stream.message()).await {
                Ok(Err(status)) => break status,
                _ => streams.push(stream),
            },
            Err(status) => break status,
        }
        assert!(streams.len() < 4, "nothing is ever refused");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(streams);
    node.settled().await;
    node.stop().await;
}

#[tokio::test]
async fn a_call_that_is_taken_is_answered_with_headers_before_anything_is_computed() {
    let any = "127.0.0.1:0".parse().unwrap();
    let start = |role, name| {
        let scripted = Scripted::new(&ToyConfig::default(), Options::default(), STEP, true);
        let (engine, violations) = (scripted.engine, scripted.violations);
        let node = Node::over(engine, violations, runtime(), role, name, any, any);
        // It would compute, if anybody ran it.
        (node, scripted.stepper)
    };
    let (prefill, _computes_nothing) = start(Role::Prefill, "p");
    let (decode, _computes_nothing) = start(Role::Decode, "d");
    let prompt = prompt(5, 20);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let asked = |name| sequence(name, &prompt, &[], 5);
    let taken = async {
        run(&prefill, asked("r"), target(&decode, &reserved))
            .await
            .unwrap();
        generate(&decode, asked("whole"), None).await.unwrap();
    };
    tokio::time::timeout(PATIENCE, taken).await.unwrap();
}

#[tokio::test]
async fn a_pool_without_room_refuses_a_lease_at_once() {
    let decode = Node::start(Role::Decode, "d");
    let mut leases = 0;
    let full = loop {
        let tokens = prompt(leases, 1000);
        match reserve(&decode, &format!("request-{leases}"), &tokens).await {
            Ok(_) => leases += 1,
            Err(status) => break status,
        }
    };
    // 64 blocks, 16 a lease.
    assert_eq!((full.code(), leases), (Code::ResourceExhausted, 4));
}

#[tokio::test]
async fn a_deadline_ends_a_wait_for_kv_and_gives_the_blocks_back() {
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(2, 200);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let mut asked = sequence("r", &prompt, &[1], 5);
    asked.deadline_ms = 150;
    let stream = generate(&decode, asked, Some(&reserved)).await.unwrap();
    assert_eq!(
        finish_generate(stream, 1).await.unwrap_err().code(),
        Code::DeadlineExceeded
    );
    decode.settled().await;
    decode.stop().await;
}

#[tokio::test]
async fn a_deadline_ends_a_generation() {
    let node = Node::start(Role::Combined, "c");
    let prompt = prompt(3, 50);
    let mut asked = sequence("r", &prompt, &[], 1900);
    asked.deadline_ms = 200;
    let stream = generate(&node, asked, None).await.unwrap();
    assert_eq!(
        finish_generate(stream, 0).await.unwrap_err().code(),
        Code::DeadlineExceeded
    );
    node.settled().await;
    node.stop().await;
}

#[tokio::test]
async fn calls_that_say_too_little_are_refused_before_anything_is_held() {
    let prefill = Node::start(Role::Prefill, "p");
    let decode = Node::start(Role::Decode, "d");
    let prompt = prompt(4, 50);
    let reserved = reserve(&decode, "r", &prompt).await.unwrap();
    let good = || sequence("s", &prompt, &[], 5);
    let bad = [
        v1::Sequence {
            key: None,
            ..good()
        },
        v1::Sequence {
            deadline_ms: 0,
            ..good()
        },
        v1::Sequence {
            tokens: vec![],
            ..good()
        },
        v1::Sequence {
            tokens: vec![9999],
            prompt_tokens: 1,
            ..good()
        },
        v1::Sequence {
            stop: None,
            ..good()
        },
    ];
    for sequence in bad {
        let shown = format!("{sequence:?}");
        let refused = generate(&decode, sequence.clone(), None).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{shown}");
        let refused = run(&prefill, sequence, target(&decode, &reserved))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{shown}");
    }
    let nowhere = v1::TransferTarget::default();
    let refused = run(&prefill, good(), nowhere).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let other = v1::ReserveRequest {
        prompt_tokens: 0,
        key: Some(key("t", 0)),
        tokens: prompt.clone(),
        kv_fingerprint: vec![0; 32],
        deadline_ms: 1000,
        cache_salt: vec![],
    };
    let refused = decode.decode().await.reserve(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    prefill.stop().await;
}
