//! What is answered to requests that are in order.

use serde_json::{Value, json};

use crate::model::END;
use crate::support::{MODEL, Service};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// The texts of all choices, and why each ended, put together from chunks.
fn joined(chunks: &[Value], text: &str) -> Vec<(String, String)> {
    let mut choices: Vec<(String, String)> = Vec::new();
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        let index = choice["index"].as_u64().unwrap() as usize;
        choices.resize(choices.len().max(index + 1), Default::default());
        let (said, reason) = &mut choices[index];
        assert_eq!(reason, "", "a chunk after the last");
        said.push_str(choice.pointer(text).and_then(Value::as_str).unwrap_or_default());
        reason.push_str(choice["finish_reason"].as_str().unwrap_or_default());
    }
    choices
}

fn one(text: &str, reason: &str) -> Vec<(String, String)> {
    vec![(text.to_owned(), reason.to_owned())]
}

#[tokio::test]
async fn a_completion_comes_whole() {
    let service = Service::new();
    let answer = service.post(COMPLETIONS, &json!({"model": MODEL, "prompt": "abc", "max_tokens": 5})).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], MODEL);
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(body["choices"], json!([{"index": 0, "text": "abcab", "logprobs": null, "finish_reason": "length"}]));
    assert_eq!(body["usage"], json!({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}));
}

#[tokio::test]
async fn a_completion_comes_in_chunks() {
    let service = Service::new();
    let mut body = json!({"model": MODEL, "prompt": "abc", "max_tokens": 5, "stream": true});
    let chunks = service.post(COMPLETIONS, &body).await.chunks();
    assert_eq!(joined(&chunks, "/text"), one("abcab", "length"));
    assert!(chunks.len() >= 5, "one chunk a token: {chunks:?}");
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"] && chunk["object"] == "text_completion"));
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));

    body["stream_options"] = json!({"include_usage": true});
    let chunks = service.post(COMPLETIONS, &body).await.chunks();
    let (last, others) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], json!({"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}));
    assert!(others.iter().all(|chunk| chunk["usage"] == Value::Null));
}

#[tokio::test]
async fn a_chat_comes_whole_and_in_chunks() {
    let service = Service::new();
    let mut body = json!({"model": MODEL, "max_completion_tokens": 8, "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u1"}, {"type": "text", "text": "u2"}]},
    ]});
    let answer = service.post(CHAT, &body).await.json();
    assert_eq!(answer["object"], "chat.completion");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let message = json!({"role": "assistant", "content": "s|u1u2s|", "refusal": null});
    assert_eq!(
        answer["choices"],
        json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": "length"}])
    );
    assert_eq!(answer["usage"], json!({"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}));

    body["stream"] = json!(true);
    let chunks = service.post(CHAT, &body).await.chunks();
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let roles = chunks.iter().filter(|chunk| chunk.pointer("/choices/0/delta/role").is_some()).count();
    assert_eq!(roles, 1);
    assert_eq!(joined(&chunks, "/delta/content"), one("s|u1u2s|", "length"));
}

#[tokio::test]
async fn a_chat_without_a_limit_goes_on_to_its_end() {
    let service = Service::new();
    let messages = json!([{"role": "user", "content": format!("{}{END}", "x".repeat(300))}]);
    let answer = service.post(CHAT, &json!({"model": MODEL, "messages": messages})).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "x".repeat(300));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 300);
}

#[tokio::test]
async fn stop_strings_end_a_text_and_are_not_in_it() {
    let service = Service::new();
    for (stop, expected, reason) in [
        (json!("ef"), "abcd", "stop"),
        (json!(["zzz", "cd", "f"]), "ab", "stop"),
        (json!("zzz"), "abcdefghabcdefgh", "length"),
        (json!([]), "abcdefghabcdefgh", "length"),
    ] {
        for stream in [false, true] {
            let body = json!({"model": MODEL, "prompt": "abcdefgh", "stop": stop, "stream": stream});
            let answer = service.post(COMPLETIONS, &body).await;
            let choices = if stream { joined(&answer.chunks(), "/text") } else { joined(&[answer.json()], "/text") };
            assert_eq!(choices, one(expected, reason), "{stop} {stream}");
        }
    }
}

#[tokio::test]
async fn characters_come_whole() {
    let service = Service::new();
    let body = json!({"model": MODEL, "prompt": format!("ü🦀ß{END}"), "max_tokens": 50, "stream": true});
    let chunks = service.post(COMPLETIONS, &body).await.chunks();
    assert_eq!(joined(&chunks, "/text"), one("ü🦀ß", "stop"));
    assert!(chunks.iter().all(|chunk| !chunk.to_string().contains('\u{fffd}')));
}

#[tokio::test]
async fn prompts_of_every_form_are_choices_in_order() {
    let service = Service::new();
    for (prompt, texts, prompt_tokens) in [
        (json!("ab"), vec!["aba"], 2),
        (json!(["ab", "c"]), vec!["aba", "ccc"], 3),
        (json!([97, 98]), vec!["aba"], 2),
        (json!([[97, 98], [99], [100, 101, 102, 103]]), vec!["aba", "ccc", "def"], 7),
    ] {
        for stream in [false, true] {
            let options = if stream { json!({"include_usage": true}) } else { json!(null) };
            let body = json!({
                "model": MODEL, "prompt": prompt, "max_tokens": 3, "stream": stream, "stream_options": options,
            });
            let answer = service.post(COMPLETIONS, &body).await;
            let chunks = if stream { answer.chunks() } else { vec![answer.json()] };
            let said = joined(&chunks, "/text");
            assert_eq!(said.iter().map(|(text, _)| text.as_str()).collect::<Vec<_>>(), texts, "{prompt}");
            let usage = &chunks.last().unwrap()["usage"];
            assert_eq!(usage["prompt_tokens"], prompt_tokens, "{prompt}");
            assert_eq!(usage["completion_tokens"], 3 * texts.len());
        }
    }
}

#[tokio::test]
async fn a_seed_makes_the_same_choices_again() {
    let service = Service::new();
    let ask = async |body: Value| {
        let answer = service.post(COMPLETIONS, &body).await;
        joined(&[answer.json()], "/text")
    };
    let mut body = json!({"model": MODEL, "prompt": "?", "max_tokens": 40, "n": 3, "seed": -7, "temperature": 1.5});
    let first = ask(body.clone()).await;
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2], "{first:?}");
    assert_eq!(ask(body.clone()).await, first);
    body["seed"] = json!(8);
    assert_ne!(ask(body.clone()).await, first);
    body.as_object_mut().unwrap().remove("seed");
    assert_ne!(ask(body.clone()).await, ask(body.clone()).await);
    body["temperature"] = json!(0);
    body["n"] = json!(2);
    let greedy = "a".repeat(40);
    assert_eq!(ask(body).await, [one(&greedy, "length"), one(&greedy, "length")].concat());
}

#[tokio::test]
async fn several_choices_count_their_prompt_once() {
    let service = Service::new();
    let body = json!({"model": MODEL, "prompt": ["abcd", "ab"], "n": 2, "max_tokens": 4});
    let answer = service.post(COMPLETIONS, &body).await.json();
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect();
    assert_eq!(texts, ["abcd", "abcd", "abab", "abab"]);
    assert_eq!(answer["usage"], json!({"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}));
}

#[tokio::test]
async fn the_model_names_the_adapter() {
    let service = Service::new();
    for name in ["alice", "user7", "two words, one name: ü"] {
        let body = json!({"model": name, "prompt": format!("!{END}"), "max_tokens": 100});
        let answer = service.post(COMPLETIONS, &body).await.json();
        assert_eq!(answer["choices"][0]["text"], format!("{name}!"));
        assert_eq!(answer["model"], name);
    }
}

#[tokio::test]
async fn models_are_the_base_and_its_adapters() {
    let service = Service::new();
    let list = service.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let models = list["data"].as_array().unwrap();
    assert_eq!(models.len(), 1 + 35);
    assert_eq!(models[0]["id"], MODEL);
    assert_eq!(models[0]["parent"], Value::Null);
    let alice = models.iter().find(|model| model["id"] == "alice").unwrap();
    assert_eq!((&alice["object"], &alice["parent"], &alice["root"]), (&json!("model"), &json!(MODEL), &json!(MODEL)));
    for (path, id) in [
        ("test/parrot", MODEL),
        ("test%2Fparrot", MODEL),
        ("alice", "alice"),
        ("two%20words,%20one%20name:%20%C3%BC", "two words, one name: ü"),
    ] {
        let model = service.get(&format!("/v1/models/{path}")).await.json();
        assert_eq!(&model, models.iter().find(|model| model["id"] == id).unwrap());
    }
}

#[tokio::test]
async fn health_and_metrics_tell_how_it_is() {
    let service = Service::new();
    assert_eq!(service.get("/health").await.status, 200);
    let body = json!({"model": "alice", "prompt": "abc", "max_tokens": 5, "stream": true});
    service.post(COMPLETIONS, &body).await.chunks();
    let scrape = service.get("/metrics").await;
    assert_eq!(scrape.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    for line in [
        "flora_http_answers_total{method=\"POST\",path=\"/v1/completions\",status=\"200\"} 1",
        "flora_requests_finished_total 1",
        "flora_requests_running 0.0",
        "flora_generated_tokens_total 5",
        "flora_adapter_loads_total 1",
        "flora_time_to_first_token_seconds_count 1",
        "flora_time_per_output_token_seconds_count 1",
    ] {
        assert!(scrape.text.lines().any(|found| found == line), "no `{line}` in\n{}", scrape.text);
    }
}

#[tokio::test]
async fn tokens_are_chosen_as_a_request_says() {
    let service = Service::new();
    let ended = format!("ab{END}");
    for (prompt, fields, expected, reason) in [
        ("abc", json!({"stop_token_ids": [99]}), "ab", "stop"),
        (&ended, json!({}), "ab", "stop"),
        (&ended, json!({"ignore_eos": true, "max_tokens": 5}), "abab", "length"),
        // The end of the text may not come third, and the first of all other tokens is the byte 0.
        (&ended, json!({"min_tokens": 4}), "ab\0ab", "stop"),
        ("abc", json!({"stop": "b", "min_tokens": 2}), "abca", "stop"),
        ("abc", json!({"logit_bias": {"98": -100, "100": 1}, "max_tokens": 3}), "adc", "length"),
        ("abc", json!({"presence_penalty": 2, "frequency_penalty": 2, "max_tokens": 4}), "abca", "length"),
        // What the prompt holds is worth next to nothing, and so is `d` once it was said.
        ("abc", json!({"repetition_penalty": 1e30, "logit_bias": {"100": 1}, "max_tokens": 2}), "db", "length"),
        ("abc", json!({"top_k": 1, "min_p": 1, "temperature": 2, "max_tokens": 4}), "abca", "length"),
    ] {
        for stream in [false, true] {
            let mut body = json!({"model": MODEL, "prompt": prompt, "stream": stream, "temperature": 0});
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let answer = service.post(COMPLETIONS, &body).await;
            let choices = if stream { joined(&answer.chunks(), "/text") } else { joined(&[answer.json()], "/text") };
            assert_eq!(choices, one(expected, reason), "{fields} {stream}");
        }
    }
}

#[tokio::test]
async fn a_chat_goes_on_as_a_request_says() {
    let service = Service::new();
    for (fields, expected) in [
        (json!({"max_tokens": 3}), "abc"),
        (json!({"add_generation_prompt": false, "max_tokens": 4}), "abc*"),
        (json!({"add_generation_prompt": false, "continue_final_message": true, "max_tokens": 4}), "abc+"),
        (json!({"chat_template_kwargs": {"thinking": false}, "max_tokens": 18}), "abcthinking=false;"),
    ] {
        let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "abc"}]});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let answer = service.post(CHAT, &body).await.json();
        assert_eq!(answer["choices"][0]["message"]["content"], expected, "{fields}");
    }
}
