//! What is answered to requests that are not in order: a status, OpenAI's JSON, and the field that is wrong.

use axum::body::Body;
use axum::http::Request;
use flora_engine::Options;
use flora_server::{ApiKey, Limits, ServerOptions};
use serde_json::{Value, json};

use crate::model::{CONTEXT, FAULT, LATE_FAULT};
use crate::support::{MODEL, Service, patiently};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn completion() -> Value {
    json!({"model": MODEL, "prompt": "abc", "max_tokens": 3})
}

fn chat() -> Value {
    json!({"model": MODEL, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3})
}

fn with(mut body: Value, field: &str, value: impl Into<Value>) -> Value {
    body[field] = value.into();
    body
}

/// The fields of both endpoints, and the kinds of values that are of the right type and may be taken.
const SHARED: &[(&str, &[&str])] = &[
    ("model", &["string"]),
    ("n", &["whole"]),
    ("temperature", &["whole", "fraction"]),
    ("top_p", &["whole", "fraction"]),
    ("seed", &["whole", "negative"]),
    ("stop", &["string", "strings", "empty"]),
    ("stream", &["boolean"]),
    ("stream_options", &["object"]),
    ("presence_penalty", &["whole", "negative", "fraction"]),
    ("frequency_penalty", &["whole", "negative", "fraction"]),
    ("repetition_penalty", &["whole", "fraction"]),
    ("logit_bias", &["object"]),
    ("top_k", &["whole", "negative"]),
    ("min_p", &["whole", "fraction"]),
    ("stop_token_ids", &["empty", "integers"]),
    ("ignore_eos", &["boolean"]),
    ("min_tokens", &["whole"]),
    ("max_tokens", &["whole", "negative"]),
    ("guided_json", &["boolean", "object"]),
    ("guided_regex", &["string"]),
    ("guided_choice", &["strings"]),
    ("guided_grammar", &[]),
    ("response_format", &[]),
    ("structured_outputs", &[]),
    ("skip_special_tokens", &["boolean"]),
    ("never_heard_of", &[]),
];
const OF_COMPLETIONS: &[(&str, &[&str])] = &[
    ("prompt", &["string", "strings", "integers"]),
    ("echo", &["boolean"]),
    ("best_of", &["whole"]),
    ("suffix", &[]),
    ("logprobs", &["whole"]),
];
const OF_CHAT: &[(&str, &[&str])] = &[
    ("messages", &[]),
    ("max_completion_tokens", &["whole", "negative"]),
    ("logprobs", &["boolean"]),
    ("top_logprobs", &[]),
    ("echo", &[]),
    ("tools", &["empty"]),
    ("functions", &["empty"]),
    ("add_generation_prompt", &["boolean"]),
    ("continue_final_message", &[]),
    ("chat_template_kwargs", &["object"]),
    ("reasoning_effort", &[]),
    ("modalities", &["empty"]),
];

#[tokio::test]
async fn a_value_of_the_wrong_type_is_refused_in_every_field() {
    let service = Service::new();
    let kinds = [
        ("boolean", json!(true)),
        ("whole", json!(1)),
        ("negative", json!(-1)),
        ("fraction", json!(0.5)),
        ("huge", json!(1e300)),
        ("string", json!("x")),
        ("empty", json!([])),
        ("integers", json!([1, 2])),
        ("strings", json!(["x"])),
        ("mixed", json!(["x", 1])),
        ("nested", json!([[["x"]]])),
        ("object", json!({})),
    ];
    for (path, body, own) in [(COMPLETIONS, completion(), OF_COMPLETIONS), (CHAT, chat(), OF_CHAT)] {
        for (field, right) in SHARED.iter().chain(own) {
            for (kind, value) in kinds.iter().filter(|(kind, _)| !right.contains(kind)) {
                let answer = service.post(path, &with(body.clone(), field, value.clone())).await;
                let error = answer.error(400);
                let param = error["param"].as_str().unwrap_or_default();
                assert!(param.starts_with(field), "{path} {field} {kind}: {error}");
                assert_eq!(error["type"], "invalid_request_error");
            }
        }
    }
}

#[tokio::test]
async fn what_must_be_there_must_be_there() {
    let service = Service::new();
    for (path, body, fields) in
        [(COMPLETIONS, completion(), ["model", "prompt"]), (CHAT, chat(), ["model", "messages"])]
    {
        for field in fields {
            let mut without = body.clone();
            without.as_object_mut().unwrap().remove(field);
            for body in [without, with(body.clone(), field, Value::Null)] {
                let error = service.post(path, &body).await.error(400);
                assert!(error["message"].as_str().unwrap().contains(field), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn a_body_is_a_json_object() {
    let service = Service::new();
    let whole = completion().to_string();
    for cut in 0..whole.len() {
        service.post_bytes(COMPLETIONS, whole[..cut].to_owned()).await.error(400);
    }
    for body in ["[]", "null", "\"model\"", "{} {}", "{\"model\": NaN}", "{'model': 1}", "\u{feff}{}"] {
        service.post_bytes(COMPLETIONS, body).await.error(400);
    }
    service.post_bytes(COMPLETIONS, &b"{\"model\": \"\xff\xfe\"}"[..]).await.error(400);
    // A lone surrogate is JSON, but no text.
    service.post_bytes(COMPLETIONS, r#"{"model": "\ud800", "prompt": "a"}"#).await.error(400);
}

#[tokio::test]
async fn other_content_types_are_refused() {
    let service = Service::new();
    for content_type in [None, Some("text/plain"), Some("application/x-www-form-urlencoded")] {
        let mut request = Request::post(COMPLETIONS);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        service.ask(request.body(Body::from(completion().to_string())).unwrap()).await.error(415);
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let service = Service::new();
    for path in ["/index.html", "/v1", "/v1/embeddings", "/v1/completions/", "/v1/../etc/passwd"] {
        assert_eq!(service.get(path).await.error(404)["code"], "unknown_url", "{path}");
    }
    for (method, path) in [
        ("GET", COMPLETIONS),
        ("DELETE", CHAT),
        ("POST", "/v1/models"),
        ("POST", "/health"),
        ("POST", "/"),
        ("GET", "/tokenize"),
        ("POST", "/tokenizer_info"),
        ("BREW", "/metrics"),
    ] {
        service.ask(Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await.error(405);
    }
}

#[tokio::test]
async fn a_model_that_is_nobodys_is_unknown() {
    let service = Service::new();
    let long = "m".repeat(10_000);
    for model in
        ["nobody", "", "..", "../x", "/etc", "/etc/passwd", "a/../alice", "..\\x", "a\0b", "alice\0", "%2e%2e", &long]
    {
        for (path, body) in [(COMPLETIONS, completion()), (CHAT, chat())] {
            for stream in [false, true] {
                let body = with(with(body.clone(), "model", model), "stream", stream);
                let answer = service.post(path, &body).await;
                let error = answer.error(404);
                assert_eq!(error["code"], "model_not_found");
                assert_eq!(error["param"], "model");
                assert!(answer.text.len() < 1000);
            }
        }
    }
    for path in ["nobody", "..", "%2Fetc%2Fpasswd", "..%2F..%2Fx", "a%00b", "%ff", &long] {
        assert_eq!(service.get(&format!("/v1/models/{path}")).await.error(404)["code"], "model_not_found");
    }
}

#[tokio::test]
async fn an_adapter_that_cant_be_used_says_why() {
    let service = Service::new();
    for stream in [false, true] {
        let body = with(with(completion(), "model", "broken"), "stream", stream);
        let error = service.post(COMPLETIONS, &body).await.error(422);
        assert_eq!(error["code"], "adapter_unusable");
        assert!(error["message"].as_str().unwrap().contains("its file holds 3 bytes"), "{error}");
    }
    assert_eq!(service.post(COMPLETIONS, &completion()).await.status, 200);
}

#[tokio::test]
async fn prompts_and_choices_have_limits() {
    let limits = Limits { prompt_tokens: 10, choices: 4, ..Limits::default() };
    let service = Service::with(ServerOptions { limits, ..ServerOptions::default() }, Options::default());
    let ask = async |field, value: Value| service.post(COMPLETIONS, &with(completion(), field, value)).await;
    assert_eq!(ask("prompt", json!("0123456789")).await.status, 200);
    let error = ask("prompt", json!("0123456789a")).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    ask("prompt", json!("")).await.error(400);
    ask("prompt", json!([0, 257])).await.error(400);
    assert_eq!(ask("prompt", json!(["a", "b", "c", "d"])).await.status, 200);
    ask("prompt", json!(["a", "b", "c", "d", "e"])).await.error(400);
    ask("n", json!(5)).await.error(400);
    ask("n", json!(u32::MAX)).await.error(400);
    let messages = json!([{"role": "user", "content": "unspeakable"}]);
    let error = service.post(CHAT, &with(chat(), "messages", messages)).await.error(400);
    assert_eq!(error["message"], "that can't be said");
    assert_eq!(error["param"], "messages");
}

#[tokio::test]
async fn the_models_context_is_a_limit_too() {
    let service = Service::new();
    let longest = "x".repeat(CONTEXT as usize - 1);
    let answer = service.post(COMPLETIONS, &with(completion(), "prompt", longest.as_str())).await.json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    let error = service.post(COMPLETIONS, &with(completion(), "prompt", longest + "x")).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
}

#[tokio::test]
async fn a_body_too_large_is_refused() {
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let service = Service::with(ServerOptions { limits, ..ServerOptions::default() }, Options::default());
    let body = |bytes: usize| {
        let body = with(completion(), "user", "").to_string();
        body.replace("\"user\":\"\"", &format!("\"user\":\"{}\"", "x".repeat(bytes - body.len())))
    };
    assert_eq!(service.post_bytes(COMPLETIONS, body(1000)).await.status, 200);
    service.post_bytes(COMPLETIONS, body(1001)).await.error(413);
}

#[tokio::test]
async fn a_full_queue_says_to_come_again() {
    let service = Service::with(ServerOptions::default(), Options { sequences: 1, waiting: 2, ..Options::default() });
    service.gate.close();
    // More than run and wait: some are told at once. The gate opens only when they were.
    let full = async {
        loop {
            let answer = service.post(COMPLETIONS, &with(completion(), "prompt", json!(["a", "b", "c", "d"]))).await;
            if answer.status == 429 {
                service.gate.open();
                return answer;
            }
        }
    };
    let answer = patiently(full).await;
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(answer.error(429)["code"], "queue_full");
    // Those that were taken before were cancelled with it, and give their places back.
    patiently(async { while service.post(COMPLETIONS, &completion()).await.status != 200 {} }).await;
    service.idle().await;
    assert_eq!(service.engine.metrics().finished, 1);
}

#[tokio::test]
async fn a_model_that_fails_is_the_servers_fault() {
    let service = Service::new();
    let prompt = format!("a{FAULT}");
    for stream in [false, true] {
        let body = with(with(completion(), "prompt", prompt.as_str()), "stream", stream);
        let error = service.post(COMPLETIONS, &body).await.error(500);
        assert_eq!(error["type"], "server_error");
        assert!(error["message"].as_str().unwrap().contains("fell silent"), "{error}");
    }
    assert_eq!(service.post(COMPLETIONS, &completion()).await.status, 200);
}

#[tokio::test]
async fn an_error_after_the_first_text_is_an_event_and_the_last() {
    let service = Service::new();
    let prompt = format!("abc{LATE_FAULT}");
    let body = with(with(with(completion(), "prompt", prompt.as_str()), "stream", true), "max_tokens", 50);
    let answer = service.post(COMPLETIONS, &body).await;
    assert_eq!(answer.status, 200);
    let events = answer.events();
    let (last, texts) = events.split_last().unwrap();
    assert_eq!(last.0, "error");
    let error: Value = serde_json::from_str(&last.1).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("fell silent"), "{error}");
    assert!(texts.len() >= 3 && texts.iter().all(|(name, _)| name.is_empty()), "{events:?}");
    service.idle().await;
}

#[tokio::test]
async fn an_engine_that_stops_takes_nothing() {
    let service = Service::new();
    service.engine.shutdown(std::time::Duration::ZERO);
    patiently(service.engine.stopped()).await;
    let answer = service.post(COMPLETIONS, &completion()).await;
    assert_eq!(answer.headers["retry-after"], "1");
    answer.error(503);
    assert_eq!(service.get("/health").await.status, 503);
}

#[tokio::test]
async fn a_key_opens_all_but_health() {
    let options = ServerOptions { api_key: ApiKey::new("sk-right").ok(), ..ServerOptions::default() };
    let service = Service::with(options, Options::default());
    let ask = async |path: &str, authorization: Option<&[u8]>| {
        let mut request = Request::get(path);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        service.ask(request.body(Body::empty()).unwrap()).await
    };
    assert_eq!(ask("/health", None).await.status, 200);
    for path in ["/v1/models", "/v1/models/alice", "/metrics", "/v1/completions", "/nowhere"] {
        for wrong in [
            None,
            Some(&b""[..]),
            Some(b"Bearer"),
            Some(b"Bearer "),
            Some(b"Bearer sk-wrong"),
            Some(b"Bearer sk-right "),
            Some(b"Basic sk-right"),
            Some(b"sk-right"),
            Some(b"Bearer \xff\xfe"),
        ] {
            let answer = ask(path, wrong).await;
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            let error = answer.error(401);
            assert_eq!(error["code"], "invalid_api_key");
            assert!(!answer.text.contains("right"), "{answer:?}");
        }
    }
    assert_eq!(ask("/v1/models", Some(b"Bearer sk-right")).await.status, 200);
    assert_eq!(ask("/metrics", Some(b"bearer sk-right")).await.status, 200);
}
