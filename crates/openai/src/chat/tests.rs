//! Requests that are understood, refused, and chunks as clients expect them.

use super::*;
use crate::Chunk;

fn request(extra: &str) -> Result<ChatRequest, ApiError> {
    let body = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{extra}}}"#);
    ChatRequest::from_json(body.as_bytes())
}

fn with_message(message: &str) -> Result<ChatRequest, ApiError> {
    ChatRequest::from_json(format!(r#"{{"model":"m","messages":[{message}]}}"#).as_bytes())
}

#[test]
fn both_names_of_max_tokens_are_understood_and_the_new_one_wins() {
    assert_eq!(request("").unwrap().common.max_tokens, None);
    assert_eq!(
        request(r#","max_tokens":5"#).unwrap().common.max_tokens,
        Some(5)
    );
    let both = request(r#","max_tokens":5,"max_completion_tokens":7"#).unwrap();
    assert_eq!(both.common.max_tokens, Some(7));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let cases = [
        (r#","tools":[{"type":"function"}]"#, "tools"),
        (r#","tool_choice":"required""#, "tool_choice"),
        (
            r#","response_format":{"type":"json_object"}"#,
            "response_format",
        ),
        (r#","modalities":["text","audio"]"#, "modalities"),
        (r#","functions":[{}]"#, "functions"),
        (r#","reasoning_effort":"high""#, "reasoning_effort"),
    ];
    for (extra, param) in cases {
        let error = request(extra).unwrap_err();
        assert_eq!(error.status, 400);
        assert_eq!(error.body.param.as_deref(), Some(param));
        assert_eq!(error.body.code.as_deref(), Some("unsupported_parameter"));
    }
}

#[test]
fn asking_for_nothing_is_not_asking() {
    let extra =
        r#","tools":[],"tool_choice":"auto","response_format":{"type":"text"},"audio":null"#;
    assert!(request(extra).is_ok());
}

#[test]
fn top_logprobs_need_logprobs() {
    let error = request(r#","top_logprobs":3"#).unwrap_err();
    assert_eq!(error.body.param.as_deref(), Some("top_logprobs"));
    assert!(request(r#","logprobs":true,"top_logprobs":20"#).is_ok());
    assert!(request(r#","logprobs":true,"top_logprobs":21"#).is_err());
}

#[test]
fn parts_of_text_are_joined_and_other_parts_refused() {
    let parts =
        r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#;
    assert_eq!(with_message(parts).unwrap().messages[0].content, "ab");
    let image = r#"{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}"#;
    let error = with_message(image).unwrap_err();
    assert_eq!(
        error.body.param.as_deref(),
        Some("messages[0].content[0].type")
    );
}

#[test]
fn turns_of_tool_use_are_refused() {
    for (message, param) in [
        (r#"{"role":"tool","content":"x"}"#, "messages[0].role"),
        (
            r#"{"role":"assistant","content":null,"tool_calls":[{}]}"#,
            "messages[0].tool_calls",
        ),
        (r#"{"role":"user","content":null}"#, "messages[0].content"),
        (r#"{"role":"wizard","content":"x"}"#, "messages[0].role"),
    ] {
        assert_eq!(
            with_message(message).unwrap_err().body.param.as_deref(),
            Some(param)
        );
    }
    let developer = with_message(r#"{"role":"developer","content":"x"}"#).unwrap();
    assert_eq!(developer.messages[0].role, Role::System);
}

#[test]
fn thinking_is_understood_in_both_dialects() {
    let ours = request(r#","chat_template_kwargs":{"thinking":true}"#).unwrap();
    assert_eq!(ours.thinking, Some(true));
    let theirs = request(r#","thinking":{"type":"disabled"}"#).unwrap();
    assert_eq!(theirs.thinking, Some(false));
    assert_eq!(request("").unwrap().thinking, None);
}

#[test]
fn a_chunk_says_null_where_the_client_expects_null() {
    let delta = Delta {
        role: Some("assistant"),
        content: Some(""),
    };
    let choice = ChunkChoice {
        index: 0,
        delta,
        logprobs: None,
        finish_reason: None,
    };
    let chunk = Chunk {
        id: "chatcmpl-1",
        object: CHUNK_OBJECT,
        created: 1,
        model: "m",
        choices: &[choice],
        usage: Some(None),
    };
    assert_eq!(
        serde_json::to_string(&chunk).unwrap(),
        r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#
    );
}
