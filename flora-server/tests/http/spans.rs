//! Several adapters in one request: sums with weights, spans of a prompt, adapters of messages, and what is wrong with them.

use serde_json::{Value, json};

use crate::support::{MODEL, Service};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn body(prompt: Value, fields: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 8, "temperature": 0, "prompt": prompt});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

async fn said(service: &Service, prompt: Value, fields: Value) -> String {
    let answer = service.post(COMPLETIONS, &body(prompt, &fields)).await;
    let value: Value = serde_json::from_str(&answer.text).unwrap();
    value["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("{value}")).to_owned()
}

#[tokio::test]
async fn each_token_is_run_with_its_own_adapter() {
    let service = Service::new();
    let span =
        |start: usize, end: Option<usize>, adapter: Value| json!({"start": start, "end": end, "adapter": adapter});
    let text = || json!("äbcd");
    let tokens = || json!([97, 98, 99, 100]);
    // What comes next is said by the last token's adapter, and then by those of the tokens that were said.
    assert_eq!(said(&service, tokens(), json!({})).await, "abcdabcd");
    assert_eq!(said(&service, tokens(), json!({"adapter": "user7"})).await, "user7abc");
    assert_eq!(
        said(&service, tokens(), json!({"adapter_spans": [span(3, Some(4), json!("user7"))]})).await,
        "ubcdabcd"
    );
    assert_eq!(said(&service, tokens(), json!({"adapter_spans": [span(3, None, json!("user7"))]})).await, "user7abc");
    assert_eq!(said(&service, tokens(), json!({"adapter_spans": [span(4, None, json!("user7"))]})).await, "aser7abc");
    let others =
        json!({"model": "user7", "adapter_spans": [span(0, Some(4), Value::Null), span(4, None, json!("user9"))]});
    assert_eq!(said(&service, tokens(), others).await, "aser9abc");
    // Positions in a text are characters, whatever they take of tokens.
    let last = json!({"adapter_spans": [span(3, Some(4), json!("user7"))]});
    assert!(said(&service, text(), last).await.starts_with('u'));
    let before = json!({"adapter_spans": [span(0, Some(3), json!("user7"))]});
    assert!(!said(&service, text(), before).await.starts_with('u'));
    // A sum is an adapter like others; this one says its name.
    let sum = json!([{"name": "user1", "weight": 0.5}, {"name": "user2", "weight": -1}]);
    assert_eq!(said(&service, tokens(), json!({"adapter": sum, "max_tokens": 9})).await, "user1×0.");
    assert_eq!(said(&service, tokens(), json!({"adapter_spans": [span(3, Some(4), sum)]})).await, "ubcdabcd");
}

#[tokio::test]
async fn what_is_wrong_is_refused_by_its_field() {
    let service = Service::new();
    let spans = |spans: Value| json!({"adapter_spans": spans});
    for (fields, status, param) in [
        (json!({"adapter": "nobody"}), 404, "adapter"),
        (json!({"adapter": "../alice"}), 404, "adapter"),
        (json!({"adapter": "broken"}), 422, "model"),
        (json!({"adapter": 3}), 400, "adapter"),
        (json!({"adapter": []}), 400, "adapter"),
        (json!({"model": "alice", "adapter": "user1"}), 400, "adapter"),
        (json!({"adapter": [{"name": "nobody", "weight": 1}]}), 404, "adapter"),
        (json!({"adapter": [{"name": MODEL, "weight": 1}]}), 400, "adapter"),
        (json!({"adapter": [{"name": "alice", "weight": 1}, {"name": "alice", "weight": 1}]}), 400, "adapter"),
        (json!({"adapter": [{"name": "alice", "weight": null}]}), 400, "adapter[0].weight"),
        (json!({"adapter": [{"name": "alice", "weight": 1, "rank": 3}]}), 400, "adapter[0].rank"),
        (spans(json!("alice")), 400, "adapter_spans"),
        (spans(json!([{"start": 0, "end": 2, "adapter": "nobody"}])), 404, "adapter_spans[0].adapter"),
        (spans(json!([{"start": 0, "end": 9, "adapter": "alice"}])), 400, "adapter_spans[0].end"),
        (spans(json!([{"start": 9, "adapter": "alice"}])), 400, "adapter_spans[0].start"),
        (spans(json!([{"start": 2, "end": 2, "adapter": "alice"}])), 400, "adapter_spans"),
        (
            spans(json!([{"start": 0, "end": 3, "adapter": "alice"}, {"start": 2, "adapter": "user1"}])),
            400,
            "adapter_spans",
        ),
        (json!({"prompt": ["a", "b"], "adapter_spans": [{"start": 0, "adapter": "alice"}]}), 400, "adapter_spans"),
    ] {
        let error = service.post(COMPLETIONS, &body(json!("abcd"), &fields)).await.error(status);
        assert_eq!(error["param"], param, "{fields} {error}");
    }
    let message =
        |adapter: Value| json!({"model": MODEL, "messages": [{"role": "user", "content": "a", "adapter": adapter}]});
    let error = service.post(CHAT, &message(json!(1))).await.error(400);
    assert_eq!(error["param"], "messages[0].adapter");
    // The functions that this service reads chats by don't say which tokens are whose.
    let error = service.post(CHAT, &message(json!("alice"))).await.error(400);
    assert!(error["message"].as_str().unwrap().contains("leave `adapter` out of messages"), "{error}");
}
