//! Limits: what is refused, and with what.

use std::time::Duration;

use router::{AdmissionConfig, Keys};
use serde_json::json;
use testkit::fake_worker::{Fault, Faults};

use crate::harness::{Setup, completion, eventually};

#[tokio::test(start_paused = true)]
async fn without_the_right_key_nothing_is_answered() {
    let mut setup = Setup::of(1, 1);
    setup.config.keys = Keys::new(["secret".to_string()]);
    let harness = setup.start().await;
    let mut client = harness.client().await;
    let body = completion(&[5], 2, "");
    let refused = client.call("POST", "/v1/completions", &body, "wrong").await;
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (401, &json!("invalid_api_key"))
    );
    assert_eq!(
        client.call("GET", "/v1/models", "", "wrong").await.status,
        401
    );
    assert_eq!(
        client
            .call("POST", "/v1/completions", &body, "secret")
            .await
            .status,
        200
    );
    assert_eq!(client.get("/health").await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_is_429_with_retry_after_and_moves_on_afterwards() {
    let mut setup = Setup::of(1, 1).paced(Duration::from_millis(100));
    setup.config.pipeline.admission = AdmissionConfig {
        max_running: 1,
        max_queued: 1,
        queue_timeout: Duration::from_secs(60),
    };
    let harness = setup.start().await;
    let body = completion(&[5], 10, "");
    let (mut first, mut second) = (harness.client().await, harness.client().await);
    let running = async {
        let first = first.post("/v1/completions", &body);
        let second = second.post("/v1/completions", &body);
        tokio::join!(first, second)
    };
    let refused = async {
        eventually(async || harness.metric("hadal_router_queue_depth").await == 1).await;
        harness.post("/v1/completions", &body).await
    };
    let ((first, second), refused) = tokio::join!(running, refused);
    assert_eq!((first.status, second.status), (200, 200));
    assert_eq!((refused.status, refused.header("retry-after")), (429, "1"));
    assert_eq!(refused.json()["error"]["code"], "overloaded");
    assert_eq!(harness.metric("hadal_router_queue_depth").await, 0);
    assert_eq!(harness.metric("hadal_router_running_requests").await, 0);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_in_the_queue_gets_429_and_comments_until_then() {
    let mut setup = Setup::of(1, 1);
    setup.config.pipeline.admission = AdmissionConfig {
        max_running: 1,
        max_queued: 9,
        queue_timeout: Duration::from_secs(12),
    };
    let harness = setup.start().await;
    let hang = Faults {
        generate: [Fault::Hang(2)].into(),
        ..Faults::default()
    };
    harness.decode[0].set_faults(hang);
    let blocker = harness.stream(&[5], 9).await;
    let whole = harness
        .post("/v1/completions", &completion(&[6], 9, ""))
        .await;
    assert_eq!(whole.status, 429);
    let streamed = harness
        .post("/v1/completions", &completion(&[6], 9, r#","stream":true"#))
        .await;
    assert_eq!(streamed.status, 200);
    assert!(
        streamed.body.starts_with(": queued\n\n"),
        "{}",
        streamed.body
    );
    assert!(streamed.body.contains(r#"data: {"error":"#) && !streamed.body.contains("[DONE]"));
    drop(blocker);
}

#[tokio::test(start_paused = true)]
async fn a_queued_client_that_leaves_gives_its_place_up() {
    let mut setup = Setup::of(1, 1);
    setup.config.pipeline.admission.max_running = 1;
    let harness = setup.start().await;
    let hang = Faults {
        generate: [Fault::Hang(2)].into(),
        ..Faults::default()
    };
    harness.decode[0].set_faults(hang);
    let blocker = harness.stream(&[5], 9).await;
    let mut waiting = harness.client().await;
    let queued = completion(&[5], 9, "");
    let waiting =
        tokio::spawn(async move { waiting.post("/v1/completions", &queued).await.status });
    eventually(async || harness.metric("hadal_router_queue_depth").await == 1).await;
    waiting.abort();
    eventually(async || harness.metric("hadal_router_queue_depth").await == 0).await;
    drop(blocker);
    harness.wait_for_quiet().await;
    assert_eq!(
        harness
            .post("/v1/completions", &completion(&[5], 2, ""))
            .await
            .status,
        200
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_that_outlives_its_time_ends_in_504() {
    let mut setup = Setup::of(1, 1);
    setup.config.pipeline.timeouts.request = Duration::from_secs(20);
    let harness = setup.start().await;
    let hang = Faults {
        run: [Fault::Hang(0); 9].into(),
        ..Faults::default()
    };
    harness.prefill[0].set_faults(hang);
    let reply = harness
        .post("/v1/completions", &completion(&[5], 9, ""))
        .await;
    assert_eq!(reply.status, 504);
    let told = harness.prefill[0].deadlines_ms();
    assert!(told[0] <= 20_000 && told[0] > 19_000, "{told:?}");
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_long_prompt_has_more_time_than_a_short_one() {
    for (prompt, is_retried) in [(vec![5; 10], true), (vec![5; 2000], false)] {
        for prefills in [1, 0] {
            let harness = Setup::of(prefills, 1).start().await;
            let hang = Faults {
                run: [Fault::Hang(0)].into(),
                generate: [Fault::Hang(0)].into(),
                ..Faults::default()
            };
            let worker = harness.workers().next().unwrap();
            worker.set_faults(hang);
            let mut client = harness.client().await;
            let body = completion(&prompt, 4, "");
            let post = client.post("/v1/completions", &body);
            let answer = tokio::time::timeout(Duration::from_secs(120), post).await;
            assert_eq!(answer.is_ok(), is_retried, "{} tokens", prompt.len());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_wrong_with_a_request_has_a_status_and_a_field() {
    let mut setup = Setup::of(1, 1);
    setup.config.http.max_body_bytes = 64 << 10;
    setup.config.pipeline.max_input_bytes = 32 << 10;
    let harness = setup.start().await;
    let mut client = harness.client().await;
    let long = "x ".repeat(20_000);
    for (body, status, param) in [
        (
            r#"{"model":"other","prompt":[5]}"#.to_string(),
            404,
            json!("model"),
        ),
        ("{".to_string(), 400, json!(null)),
        (completion(&[5], 4096, ""), 400, json!("prompt")),
        (completion(&[1 << 20], 4, ""), 400, json!("prompt")),
        (
            completion(&[5], 4, r#","temperature":9"#),
            400,
            json!("temperature"),
        ),
        (
            format!(r#"{{"model":"m","prompt":"{long}"}}"#),
            400,
            json!("prompt"),
        ),
    ] {
        let reply = client.post("/v1/completions", &body).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        assert_eq!(reply.json()["error"]["param"], param, "{}", reply.body);
        assert!(reply.header("x-request-id").starts_with("req_"));
    }
    let huge = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(70 << 10));
    assert_eq!(harness.post("/v1/completions", &huge).await.status, 413);
}

#[tokio::test(start_paused = true)]
async fn the_client_s_own_request_id_comes_back_and_names_nothing() {
    let harness = Setup::of(1, 1).start().await;
    // Two requests with one id run side by side without getting in each other's way.
    let body = completion(&[5], 6, "");
    let (one, two) = tokio::join!(
        harness.post("/v1/completions", &body),
        harness.post("/v1/completions", &body)
    );
    assert_eq!((one.status, two.status), (200, 200));
    assert_ne!(one.header("x-request-id"), two.header("x-request-id"));
}
