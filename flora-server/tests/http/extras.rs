//! What there is beside completions and chats: tokens, adapters that clients load, other pages, readiness, and a limit of time.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use flora_engine::Options;
use flora_server::{AdapterUpdates, AllowedOrigins, ApiKey, Limits, ServerOptions, UpdateError};
use serde_json::{Value, json};

use crate::support::{MODEL, Service, patiently};

const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn texts_become_tokens_and_tokens_texts() {
    let service = Service::new();
    let body = json!({"model": MODEL, "prompt": "h\u{e9}", "return_token_strs": true});
    let answer = service.post("/tokenize", &body).await.json();
    let expected = json!({
        "count": 3, "tokens": [104, 0xc3, 0xa9], "max_model_len": crate::model::CONTEXT,
        "token_strs": ["h", "\u{fffd}", "\u{fffd}"],
    });
    assert_eq!(answer, expected);
    let answer = service.post("/detokenize", &json!({"tokens": answer["tokens"]})).await.json();
    assert_eq!(answer, json!({"prompt": "h\u{e9}"}));
    let told = service.get("/tokenizer_info").await.json();
    assert_eq!(told["model_max_length"], crate::model::CONTEXT);
    // No files of a tokenizer say more of it.
    assert!(told.get("eos_token").is_some_and(Value::is_null), "{told}");
    let chat =
        json!({"model": "alice", "messages": [{"role": "user", "content": "ab"}], "add_generation_prompt": false});
    let answer = service.post("/tokenize", &chat).await.json();
    assert_eq!((&answer["tokens"], &answer["token_strs"]), (&json!([97, 98, 42]), &Value::Null));
    for (path, body, status) in [
        ("/tokenize", json!({"model": MODEL}), 400),
        ("/tokenize", json!({"prompt": "a", "truncate": 3}), 400),
        ("/tokenize", json!({"model": "nobody", "prompt": "a"}), 404),
        ("/detokenize", json!({"model": "nobody", "tokens": [1]}), 404),
        ("/detokenize", json!({"tokens": ["a"]}), 400),
        ("/detokenize", json!({}), 400),
    ] {
        service.post(path, &body).await.error(status);
    }
}

/// Names that were loaded, in place of folders.
fn updates() -> AdapterUpdates {
    let loaded: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let (names, loading) = (Arc::clone(&loaded), loaded);
    AdapterUpdates::new(
        move |name, path, replaces| {
            if path.to_str() != Some("/adapters/good") {
                let reason = "there is no such folder".to_owned();
                return Err(UpdateError::Unusable { name: name.to_owned(), reason });
            }
            let is_new = loading.lock().unwrap().insert(name.to_owned());
            if is_new || replaces { Ok(()) } else { Err(UpdateError::Exists(name.to_owned())) }
        },
        move |name| match names.lock().unwrap().remove(name) {
            true => Ok(()),
            false => Err(UpdateError::Unknown(name.to_owned())),
        },
    )
}

#[tokio::test]
async fn clients_load_adapters_where_they_may() {
    let body = json!({"lora_name": "new", "lora_path": "/adapters/good"});
    let closed = Service::new();
    closed.post("/v1/load_lora_adapter", &body).await.error(404);
    closed.post("/v1/unload_lora_adapter", &body).await.error(404);
    let options = ServerOptions { adapter_updates: Some(updates()), ..ServerOptions::default() };
    let service = Service::with(options, Options::default());
    let load = async |body: &Value| service.post("/v1/load_lora_adapter", body).await;
    let answer = load(&body).await;
    assert_eq!((answer.status.as_u16(), &answer.text[..]), (200, "Success: LoRA adapter 'new' added successfully."));
    assert_eq!(load(&body).await.error(400)["code"], "adapter_exists");
    let mut again = body.clone();
    again["load_inplace"] = json!(true);
    assert_eq!(load(&again).await.status, 200);
    again["lora_path"] = json!("/etc");
    assert_eq!(load(&again).await.error(422)["code"], "adapter_unusable");
    for (field, value) in [
        ("lora_name", json!(MODEL)),
        ("lora_name", json!("../new")),
        ("lora_name", json!("")),
        ("lora_name", json!(null)),
        ("lora_path", json!(7)),
        ("rank", json!(8)),
    ] {
        let mut wrong = body.clone();
        wrong[field] = value;
        let error = load(&wrong).await.error(400);
        assert!(error["param"].is_null() || error["param"] == field, "{error}");
    }
    let unload = async || service.post("/v1/unload_lora_adapter", &json!({"lora_name": "new"})).await;
    assert_eq!(unload().await.text, "Success: LoRA adapter 'new' removed successfully.");
    assert_eq!(unload().await.error(404)["code"], "model_not_found");
}

#[tokio::test]
async fn pages_of_allowed_origins_may_ask() {
    let of = |origins| {
        let options = ServerOptions { origins, api_key: ApiKey::new("sk-right").ok(), ..ServerOptions::default() };
        Service::with(options, Options::default())
    };
    let preflight = async |service: &Service, origin: &str| {
        let request = Request::options(COMPLETIONS)
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type");
        service.ask(request.body(Body::empty()).unwrap()).await
    };
    let service = of(AllowedOrigins::parse(&["http://a", "http://b:3000"]).unwrap());
    for origin in ["http://a", "http://b:3000"] {
        let answer = preflight(&service, origin).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["access-control-allow-origin"], origin);
        let headers = answer.headers["access-control-allow-headers"].to_str().unwrap();
        assert!(headers.contains("authorization") && headers.contains("content-type"), "{headers}");
    }
    assert!(!preflight(&service, "http://c").await.headers.contains_key("access-control-allow-origin"));
    // The key is asked for all the same.
    let request = Request::get("/v1/models").header("origin", "http://a").body(Body::empty()).unwrap();
    let answer = service.ask(request).await;
    assert_eq!(answer.headers["access-control-allow-origin"], "http://a");
    answer.error(401);
    let any = of(AllowedOrigins::Any);
    assert_eq!(preflight(&any, "http://c").await.headers["access-control-allow-origin"], "*");
    let own = of(AllowedOrigins::Own);
    assert!(!preflight(&own, "http://a").await.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn a_request_has_a_limit_of_time() {
    let limits = Limits { request_timeout: Some(Duration::from_secs(1)), ..Limits::default() };
    let service = Service::with(ServerOptions { limits, ..ServerOptions::default() }, Options::default());
    let mut body = json!({"model": MODEL, "prompt": "abc", "max_tokens": 3});
    assert_eq!(service.post(COMPLETIONS, &body).await.status, 200);
    service.gate.close();
    for stream in [false, true] {
        body["stream"] = json!(stream);
        assert_eq!(patiently(service.post(COMPLETIONS, &body)).await.error(504)["code"], "timeout");
    }
    service.gate.open();
    service.idle().await;
    assert_eq!((service.engine.metrics().finished, service.engine.metrics().cancelled), (1, 2));
}

#[tokio::test]
async fn who_is_full_is_healthy_and_not_ready() {
    let service = Service::with(ServerOptions::default(), Options { sequences: 1, waiting: 2, ..Options::default() });
    assert_eq!(service.get("/ready").await.json(), json!({"status": "ready"}));
    service.gate.close();
    let body = json!({"model": "alice", "prompt": "abc", "max_tokens": 3});
    let answers = async {
        let ask = || service.post(COMPLETIONS, &body);
        tokio::join!(ask(), ask(), ask())
    };
    let watch = async {
        service.until(|service| !service.engine.is_ready()).await;
        assert_eq!(service.get("/ready").await.status, 503);
        assert_eq!(service.get("/health").await.status, 200);
        service.gate.open();
    };
    patiently(async { tokio::join!(answers, watch) }).await;
    service.idle().await;
    assert_eq!(service.get("/ready").await.status, 200);
    service.engine.shutdown(Duration::ZERO);
    patiently(service.engine.stopped()).await;
    assert_eq!(service.get("/ready").await.status, 503);
}

#[tokio::test]
async fn a_scrape_names_the_adapters_of_requests() {
    let service = Service::new();
    service.gate.close();
    let label = |text: &str, name: &str| -> String {
        let line = text.lines().find(|line| line.starts_with("vllm:lora_requests_info{")).unwrap();
        line.split_once(&format!("{name}=\"")).unwrap().1.split_once('"').unwrap().0.to_owned()
    };
    let body = json!({"model": "alice", "prompt": "abc", "max_tokens": 3});
    let watch = async {
        service.until(|service| !service.engine.adapter_requests().waiting.is_empty()).await;
        let text = service.get("/metrics").await.text;
        assert_eq!(label(&text, "waiting_lora_adapters"), "alice");
        service.gate.open();
    };
    patiently(async { tokio::join!(service.post(COMPLETIONS, &body), watch) }).await;
    service.idle().await;
    service.until(|service| service.engine.adapter_requests().running.is_empty()).await;
    let text = service.get("/metrics").await.text;
    assert_eq!((label(&text, "running_lora_adapters"), label(&text, "max_lora")), (String::new(), "64".to_owned()));
}

#[tokio::test]
async fn a_page_is_open_and_loads_nothing_from_elsewhere() {
    let service = Service::with(
        ServerOptions { api_key: ApiKey::new("sk").ok(), ..ServerOptions::default() },
        Options::default(),
    );
    let answer = service.get("/").await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
    assert!(answer.headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    assert!(!answer.text.contains("http://") && !answer.text.contains("https://"));
    // What it asks for is there.
    for path in ["v1/models", "v1/chat/completions", "metrics"] {
        assert!(answer.text.contains(&format!("fetch(\"{path}\"")), "{path}");
    }
}
