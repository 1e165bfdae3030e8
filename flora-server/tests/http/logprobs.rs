//! Log-probabilities and prompts that are given back, whole and in chunks, and requests of many prompts.

use flora_engine::Options;
use flora_server::{Limits, ServerOptions};
use serde_json::{Value, json};

use crate::model::END;
use crate::support::{MODEL, Service};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// What the model gives the token that it says next, of 257: ln(e^40 / (e^40 + 256)).
fn certain() -> f64 {
    -(256.0 * (-40.0f64).exp()).ln_1p()
}

fn near(found: &Value, expected: f64) -> bool {
    found.as_f64().is_some_and(|found| (found - expected).abs() < 1e-4)
}

/// The `logprobs` of a completion, put together from chunks.
fn together(chunks: &[Value]) -> Value {
    let mut all = json!({"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []});
    for logprobs in chunks.iter().map(|chunk| &chunk["choices"][0]["logprobs"]).filter(|logprobs| !logprobs.is_null()) {
        for (name, items) in all.as_object_mut().unwrap() {
            items.as_array_mut().unwrap().extend(logprobs[name].as_array().unwrap().iter().cloned());
        }
    }
    all
}

#[tokio::test]
async fn a_completion_tells_log_probabilities_whole_and_in_chunks() {
    let service = Service::new();
    let mut body = json!({"model": MODEL, "prompt": "üb", "max_tokens": 4, "logprobs": 2, "temperature": 0});
    let answer = service.post(COMPLETIONS, &body).await.json();
    let told = &answer["choices"][0]["logprobs"];
    assert_eq!(told["tokens"], json!(["bytes:\\xc3", "bytes:\\xbc", "b", "bytes:\\xc3"]));
    assert_eq!(told["text_offset"], json!([0, 10, 20, 21]));
    assert!(told["token_logprobs"].as_array().unwrap().iter().all(|own| near(own, certain())), "{told}");
    let likeliest = told["top_logprobs"].as_array().unwrap();
    assert!(likeliest.iter().all(|others| others.as_object().unwrap().len() == 2), "{told}");
    assert!(near(&likeliest[2]["b"], certain()) && near(&likeliest[2]["\0"], certain() - 40.0), "{told}");
    body["stream"] = json!(true);
    assert_eq!(together(&service.post(COMPLETIONS, &body).await.chunks()), *told);
    body["logprobs"] = json!(0);
    let chunks = service.post(COMPLETIONS, &body).await.chunks();
    assert_eq!(together(&chunks)["top_logprobs"][2], json!({"b": told["token_logprobs"][2]}));
}

#[tokio::test]
async fn a_prompt_is_given_back_with_its_log_probabilities() {
    let service = Service::new();
    for (prompt, max_tokens, text) in [
        (json!("abd"), 0, "abd"),
        (json!("abd"), 2, "abdab"),
        (json!([97, 98, 100]), 1, "abda"),
        (json!("a"), 0, "a"),
        (json!("a"), 1, "aa"),
    ] {
        for stream in [false, true] {
            let mut body = json!({
                "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "echo": true, "stream": stream, "temperature": 0,
            });
            let ask = async |body: &Value| {
                let answer = service.post(COMPLETIONS, body).await;
                if stream { answer.chunks() } else { vec![answer.json()] }
            };
            let said = |chunks: &[Value]| -> String {
                chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect()
            };
            let chunks = ask(&body).await;
            assert_eq!(said(&chunks), text);
            assert!(chunks.iter().all(|chunk| chunk["choices"][0]["logprobs"].is_null()));
            body["logprobs"] = json!(1);
            let chunks = ask(&body).await;
            assert_eq!(said(&chunks), text);
            let told = together(&chunks);
            let letters: Vec<String> = text.chars().map(String::from).collect();
            assert_eq!(told["tokens"], json!(letters));
            assert_eq!(told["text_offset"], json!((0..text.len()).collect::<Vec<_>>()));
            let own = told["token_logprobs"].as_array().unwrap();
            assert!(own[0].is_null() && told["top_logprobs"][0].is_null(), "{told}");
            // `b` is the letter after `a`, and `d` isn't the one after `b`.
            for (at, expected) in [(1, certain()), (2, certain() - 40.0), (3, certain()), (4, certain())] {
                assert!(own.get(at).is_none_or(|own| text.starts_with("aa") || near(own, expected)), "{at} {told}");
            }
            assert!(own.len() < 3 || near(&told["top_logprobs"][2]["c"], certain()), "{told}");
        }
    }
}

#[tokio::test]
async fn an_echo_alone_takes_the_whole_context() {
    let service = Service::new();
    let prompt = "x".repeat(crate::model::CONTEXT as usize);
    let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 0, "echo": true});
    let answer = service.post(COMPLETIONS, &body).await.json();
    assert_eq!(answer["choices"][0]["text"], prompt);
    assert_eq!(answer["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn a_chat_tells_log_probabilities_whole_and_in_chunks() {
    let service = Service::new();
    let mut body = json!({
        "model": MODEL, "messages": [{"role": "user", "content": format!("ab{END}")}], "logprobs": true, "top_logprobs": 3,
    });
    let answer = service.post(CHAT, &body).await.json();
    let told = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    // The end of the text is none of it, and was chosen all the same.
    assert_eq!(answer["choices"][0]["message"]["content"], "ab");
    assert_eq!(told.iter().map(|token| token["token"].as_str().unwrap()).collect::<String>(), "ab<end>");
    for token in told {
        assert!(near(&token["logprob"], certain()), "{token}");
        let likeliest = token["top_logprobs"].as_array().unwrap();
        assert_eq!(likeliest.len(), 3);
        assert_eq!((&likeliest[0]["token"], &likeliest[0]["bytes"]), (&token["token"], &token["bytes"]));
    }
    body["stream"] = json!(true);
    let chunks = service.post(CHAT, &body).await.chunks();
    let content = chunks.iter().filter_map(|chunk| chunk.pointer("/choices/0/logprobs/content")?.as_array());
    assert_eq!(content.flatten().collect::<Vec<_>>(), told.iter().collect::<Vec<_>>());
    body["logprobs"] = json!(false);
    body["top_logprobs"] = json!(0);
    body["stream"] = json!(false);
    assert!(service.post(CHAT, &body).await.json()["choices"][0]["logprobs"].is_null());
}

#[tokio::test]
async fn many_prompts_run_as_there_is_room() {
    let limits = Limits { choices_at_once: 3, ..Limits::default() };
    let options = ServerOptions { limits, ..ServerOptions::default() };
    let service = Service::with(options, Options { waiting: 4, sequences: 1, ..Options::default() });
    let prompts: Vec<String> = (0..100).map(|number| format!("{number:03}")).collect();
    for stream in [false, true] {
        let body = json!({"model": MODEL, "prompt": prompts, "max_tokens": 3, "temperature": 0, "stream": stream});
        let answer = service.post(COMPLETIONS, &body).await;
        let mut texts = vec![String::new(); prompts.len()];
        for chunk in if stream { answer.chunks() } else { vec![answer.json()] } {
            for choice in chunk["choices"].as_array().unwrap() {
                texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
            }
        }
        assert_eq!(texts, prompts);
    }
    service.idle().await;
    assert_eq!(service.engine.metrics().finished, 200);
}

#[tokio::test]
async fn no_limit_is_as_much_as_there_is_room_for() {
    let service = Service::new();
    let prompt = format!("{}{END}", "x".repeat(300));
    let answer = service.post(COMPLETIONS, &json!({"model": MODEL, "prompt": prompt, "max_tokens": -1})).await.json();
    assert_eq!(answer["usage"]["completion_tokens"], 300);
}
