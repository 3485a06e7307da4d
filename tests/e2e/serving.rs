//! The API of a running deployment, as a client sees it.

use hadal_tests::{http, up::Up};
use serde_json::json;

use super::{MODEL, alone, checkpoint, completion, prompt};

#[test]
fn requests_without_the_key_are_refused() {
    let _alone = alone();
    let up = Up::start(
        checkpoint(),
        &["--api-key", "s3cret", "--served-name", MODEL],
    );
    let body =
        json!({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3});
    let status = |key| http::send(&up.http(), "/v1/chat/completions", key, Some(&body)).status;
    assert_eq!(status(None), 401);
    assert_eq!(status(Some("wrong")), 401);
    assert_eq!(status(Some("s3cret")), 200);
    assert_eq!(
        http::send(&up.http(), "/health", None, None).status,
        200,
        "probes need no key"
    );
}

#[test]
fn the_same_prompt_gives_the_same_answer_alone_and_in_company() {
    let _alone = alone();
    let up = Up::start(checkpoint(), &["--served-name", MODEL]);
    let address = &up.http();
    let ask = |name| {
        let body = completion(&prompt(name, 300), 40);
        http::send(address, "/v1/completions", None, Some(&body))
            .rest_of_completion()
            .unwrap()
    };
    let alone: Vec<String> = (0..6).map(ask).collect();
    let together: Vec<String> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..6).map(|name| scope.spawn(move || ask(name))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn every_process_shows_its_metrics() {
    let _alone = alone();
    let up = Up::start(checkpoint(), &["--served-name", MODEL]);
    let body = completion(&prompt(1, 100), 8);
    http::send(&up.http(), "/v1/completions", None, Some(&body))
        .rest_of_completion()
        .unwrap();
    let text = http::send(&up.http(), "/metrics", None, None).text();
    for name in [
        "hadal_router_requests_total",
        "hadal_router_time_to_first_token_seconds_count",
    ] {
        assert!(text.contains(name), "{name} in {text}");
    }
}

#[test]
fn a_prompt_that_does_not_fit_is_the_client_s_mistake() {
    let _alone = alone();
    let up = Up::start(
        checkpoint(),
        &["--served-name", MODEL, "--max-model-len", "256"],
    );
    let body = completion(&prompt(1, 300), 8);
    let response = http::send(&up.http(), "/v1/completions", None, Some(&body));
    assert_eq!(response.status, 400);
    assert!(
        response.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("256")
    );
}
