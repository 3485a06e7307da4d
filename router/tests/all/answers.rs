//! What a client gets when all is well.

use std::{fmt::Write, time::Duration};

use proto::v1::Role;
use serde_json::{Value, json};
use testkit::fake_worker::{Fault, Faults, Options};

use crate::{
    client::text_of,
    harness::{Setup, completion},
};

#[tokio::test(start_paused = true)]
async fn a_streamed_chat_looks_exactly_like_this() {
    let harness = Setup::default().start().await;
    let body = r#"{"model":"m","messages":[{"role":"user","content":"Hello!"}],"max_tokens":3,
        "stream":true,"stream_options":{"include_usage":true}}"#;
    let reply = harness.post("/v1/chat/completions", body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.header("content-type"),
        "text/event-stream; charset=utf-8"
    );
    assert_eq!(reply.header("cache-control"), "no-cache");
    assert!(reply.header("x-request-id").starts_with("req_"));
    let id = reply.body.split('"').nth(3).unwrap().to_string();
    assert!(id.starts_with("chatcmpl-"), "{id}");
    let prompt = harness.text.encode_chat(
        &[text::Message {
            role: text::Role::User,
            content: "Hello!".into(),
        }],
        None,
        0,
    );
    let prompt = prompt.unwrap();
    let answer = harness.expected(&prompt, 3);
    let mut transcript = String::new();
    let mut chunk = |choices: Value, usage: Value| {
        let head = format!(
            r#"data: {{"id":"{id}","object":"chat.completion.chunk","created":1700000000,"model":"m""#
        );
        let _ = write!(
            transcript,
            "{head},\"choices\":{choices},\"usage\":{usage}}}\n\n"
        );
    };
    let mut choice = |delta: Value, reason: Value| {
        let choice =
            json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
        chunk(choice, Value::Null);
    };
    choice(json!({"role": "assistant", "content": ""}), Value::Null);
    for c in answer.chars() {
        choice(json!({"content": c.to_string()}), Value::Null);
    }
    choice(json!({}), json!("length"));
    let usage = json!({"prompt_tokens": prompt.len(), "completion_tokens": 3, "total_tokens": prompt.len() + 3,
        "prompt_tokens_details": {"cached_tokens": 0}});
    chunk(json!([]), usage);
    transcript.push_str("data: [DONE]\n\n");
    assert_eq!(reply.body, transcript);
}

#[tokio::test(start_paused = true)]
async fn a_whole_chat_has_text_reason_and_usage() {
    let harness = Setup::default().start().await;
    let body = r#"{"model":"m","messages":[{"role":"user","content":"Hello!"}],"max_completion_tokens":5}"#;
    let reply = harness.post("/v1/chat/completions", body).await;
    let answer = reply.json();
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(
        choice["message"]["content"]
            .as_str()
            .unwrap()
            .chars()
            .count(),
        5
    );
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn whole_and_streamed_answers_are_the_same_text() {
    let harness = Setup::default().start().await;
    let prompt = [40, 41, 42];
    let whole = harness
        .post("/v1/completions", &completion(&prompt, 20, ""))
        .await
        .json();
    let body = completion(&prompt, 20, r#","stream":true"#);
    let client = harness.client().await;
    let events = client.stream("/v1/completions", &body).await.rest().await;
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert_eq!(whole["choices"][0]["text"], harness.expected(&prompt, 20));
    assert_eq!(text_of(&events), harness.expected(&prompt, 20));
}

#[tokio::test(start_paused = true)]
async fn the_first_token_comes_before_decode_says_anything() {
    let harness = Setup::of(1, 1).start().await;
    let faults = Faults {
        generate: [Fault::Hang(0)].into(),
        ..Faults::default()
    };
    harness.decode[0].set_faults(faults);
    let mut events = harness.stream(&[5, 6], 9).await;
    let first = events.next().await.unwrap();
    assert_eq!(text_of(&[first]), harness.expected(&[5, 6], 1));
}

#[tokio::test(start_paused = true)]
async fn an_answer_ends_at_the_end_of_text_token_which_is_not_shown() {
    let mut setup = Setup::of(1, 1);
    for options in setup.prefill.iter_mut().chain(&mut setup.decode) {
        options.script.length = 4;
    }
    let harness = setup.start().await;
    let answer = harness
        .post("/v1/completions", &completion(&[7], 50, ""))
        .await
        .json();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["text"], harness.expected(&[7], 4));
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    let on = harness
        .post(
            "/v1/completions",
            &completion(&[7], 9, r#","ignore_eos":true"#),
        )
        .await;
    assert_eq!(on.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(on.json()["usage"]["completion_tokens"], 9);
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_one_token_needs_no_decode() {
    let harness = Setup::of(1, 1).start().await;
    let answer = harness
        .post("/v1/completions", &completion(&[7], 1, ""))
        .await
        .json();
    assert_eq!(answer["choices"][0]["text"], harness.expected(&[7], 1));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    harness.wait_for_quiet().await;
    assert_eq!(harness.decode[0].counts().generations, 0);
}

#[tokio::test(start_paused = true)]
async fn a_stop_string_cuts_the_answer_and_cancels_the_rest() {
    let harness = Setup::of(1, 1)
        .paced(Duration::from_millis(20))
        .start()
        .await;
    let whole = harness.expected(&[9, 9], 40);
    let stop: String = whole.chars().skip(10).take(3).collect();
    let cut = whole.split(&stop).next().unwrap();
    let more = format!(r#","stop":[{}]"#, json!(stop));
    let answer = harness
        .post("/v1/completions", &completion(&[9, 9], 40, &more))
        .await
        .json();
    assert_eq!(answer["choices"][0]["text"], cut);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    harness.wait_for_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn log_probabilities_come_with_bytes_and_alternatives() {
    let harness = Setup::of(1, 1).start().await;
    let body = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":2,"logprobs":true,"top_logprobs":2}"#;
    let answer = harness.post("/v1/chat/completions", body).await.json();
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    let text: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(
        String::from_utf8(text).unwrap(),
        answer["choices"][0]["message"]["content"]
    );
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["top_logprobs"][1]["logprob"], -1.5);
    let legacy = harness
        .post("/v1/completions", &completion(&[5], 2, r#","logprobs":1"#))
        .await
        .json();
    let logprobs = &legacy["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 2);
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
}

#[tokio::test(start_paused = true)]
async fn several_prompts_and_answers_keep_their_order() {
    let harness = Setup::default().start().await;
    let body = r#"{"model":"m","prompt":[[5],[6,6]],"n":2,"max_tokens":4,"echo":true}"#;
    let answer = harness.post("/v1/completions", body).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (i, (prompt, choice)) in [&[5][..], &[5], &[6, 6], &[6, 6]]
        .iter()
        .zip(choices)
        .enumerate()
    {
        let bytes = prompt
            .iter()
            .flat_map(|id| harness.text.tokenizer().token_bytes(*id));
        let echo = String::from_utf8_lossy(&bytes.copied().collect::<Vec<u8>>()).into_owned();
        assert_eq!(choice["index"], i);
        assert_eq!(choice["text"], echo + &harness.expected(prompt, 4));
    }
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 16);
}

#[tokio::test(start_paused = true)]
async fn without_a_prefill_worker_decode_does_it_all() {
    let harness = Setup::of(0, 2).start().await;
    let answer = harness
        .post("/v1/completions", &completion(&[5, 6], 8, ""))
        .await
        .json();
    assert_eq!(answer["choices"][0]["text"], harness.expected(&[5, 6], 8));
}

#[tokio::test(start_paused = true)]
async fn a_combined_worker_serves_alone() {
    let mut setup = Setup::of(0, 0);
    setup
        .decode
        .push(Options::instant(Role::Combined, "combined-0"));
    let harness = setup.start().await;
    assert_eq!(harness.client().await.get("/ready").await.status, 200);
    let answer = harness
        .post("/v1/completions", &completion(&[5, 6], 8, ""))
        .await
        .json();
    assert_eq!(answer["choices"][0]["text"], harness.expected(&[5, 6], 8));
}

#[tokio::test(start_paused = true)]
async fn the_prefill_worker_that_holds_the_prefix_gets_the_prompt() {
    let harness = Setup::of(3, 1).start().await;
    let prompt: Vec<u32> = (0..200).map(|i| 30 + i % 60).collect();
    let hashes = prefix::block_hashes("r1", b"", &prompt);
    harness.prefill[1].store(&hashes);
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..5 {
        harness
            .post("/v1/completions", &completion(&prompt, 2, ""))
            .await;
    }
    let prefills: Vec<usize> = harness
        .prefill
        .iter()
        .map(|w| w.counts().prefills)
        .collect();
    assert_eq!(prefills, [0, 5, 0]);
}

#[tokio::test(start_paused = true)]
async fn only_workers_of_one_revision_are_paired() {
    let mut setup = Setup::of(2, 2);
    setup.prefill[0].revision = "r2".into();
    setup.decode[0].revision = "r3".into();
    let harness = setup.start().await;
    for _ in 0..4 {
        assert_eq!(
            harness
                .post("/v1/completions", &completion(&[5], 4, ""))
                .await
                .status,
            200
        );
    }
    assert_eq!(harness.prefill[0].counts().prefills, 0);
    assert_eq!(harness.decode[0].counts().generations, 0);
}

#[tokio::test(start_paused = true)]
async fn models_health_and_unknown_paths() {
    let harness = Setup::default().start().await;
    let mut client = harness.client().await;
    let models = client.get("/v1/models").await.json();
    assert_eq!(models["data"][0]["id"], "m");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    assert_eq!(client.get("/v1/models/m").await.json()["object"], "model");
    let missing = client.get("/v1/models/no/such").await;
    assert_eq!(
        (missing.status, &missing.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    assert_eq!(client.get("/health").await.status, 200);
    assert_eq!(client.get("/version").await.status, 200);
    let lost = client.get("/v2").await;
    assert_eq!(
        (lost.status, &lost.json()["error"]["code"]),
        (404, &json!("unknown_url"))
    );
    assert_eq!(client.get("/v1/completions").await.status, 405);
}
