//! Every field that OpenAI and vLLM document for both endpoints, a row each: it changes what it should, it changes nothing because it
//! is about something else than the answer, or it is refused by its name. None is passed over in silence.

use serde_json::{Value, json};

use crate::model::END;
use crate::support::{Answer, MODEL, Service};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// What becomes of a field.
enum Fate {
    /// It is honoured. Requests with these fields, answered without it and with it, differ as this says.
    Changes(Value, fn(&Seen, &Seen) -> bool),
    /// It is taken, and no answer depends on it.
    Nothing,
    /// The value asks for something that isn't done.
    Refused,
}

use Fate::{Changes, Nothing, Refused};

type Row = (&'static str, Value, Fate);

/// What a client sees of an answer.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Of the first choice.
    text: String,
    reason: String,
    choices: usize,
    tokens: Value,
    logprobs: Value,
    is_stream: bool,
    tells_usage: bool,
}

impl Seen {
    fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, 200, "{}", answer.text);
        let is_stream = answer.headers["content-type"] == "text/event-stream";
        let parts = if is_stream { answer.chunks() } else { vec![answer.json()] };
        let first = |part: &Value| part["choices"].get(0).cloned().unwrap_or_default();
        let firsts: Vec<Value> = parts.iter().map(first).collect();
        let text = |choice: &Value| {
            let places = ["/text", "/message/content", "/delta/content"];
            places.iter().find_map(|place| choice.pointer(place)?.as_str().map(str::to_owned)).unwrap_or_default()
        };
        Self {
            text: firsts.iter().map(text).collect(),
            reason: firsts.iter().find_map(|choice| choice["finish_reason"].as_str()).unwrap_or_default().to_owned(),
            choices: parts[0]["choices"].as_array().map_or(0, Vec::len),
            tokens: parts[0]["usage"]["completion_tokens"].clone(),
            logprobs: firsts[0]["logprobs"].clone(),
            is_stream,
            tells_usage: parts.last().is_some_and(|part| part["usage"].is_object()),
        }
    }
}

/// Letters drawn at random.
fn drawn() -> Value {
    json!({"prompt": "?", "temperature": 1, "seed": 7, "max_tokens": 60})
}

/// The letter a again and again, with b nearly as likely.
fn between() -> Value {
    json!({"prompt": "aaaaaaaa", "logit_bias": {"98": 39.5}})
}

/// A text that ends by itself.
fn short() -> Value {
    json!({"prompt": format!("ab{END}")})
}

/// Braces close as soon as they may.
fn closing() -> Value {
    json!({"logit_bias": {"125": 90}})
}

fn schema() -> Value {
    json!({"type": "object", "properties": {}, "additionalProperties": false})
}

fn is_object(seen: &Seen) -> bool {
    seen.reason == "stop" && serde_json::from_str::<Value>(&seen.text).is_ok_and(|value| value == json!({}))
}

/// The fields of both.
fn shared() -> Vec<Row> {
    vec![
        ("model", json!("alice"), Changes(json!({"max_tokens": 8}), |_, with| with.text == "aliceabc")),
        ("adapter", json!("alice"), Changes(json!({"max_tokens": 8}), |_, with| with.text == "aliceabc")),
        ("n", json!(3), Changes(json!({}), |_, with| with.choices == 3)),
        ("temperature", json!(0), Changes(drawn(), |_, with| with.text == "a".repeat(60))),
        ("top_p", json!(0.01), Changes(drawn(), |_, with| with.text == "a".repeat(60))),
        ("top_k", json!(1), Changes(drawn(), |_, with| with.text == "a".repeat(60))),
        (
            "min_p",
            json!(0.5),
            Changes(
                json!({"prompt": "?", "temperature": 1, "seed": 7, "max_tokens": 60, "logit_bias": {"98": 4}}),
                |without, with| with.text == "b".repeat(60) && without.text != with.text,
            ),
        ),
        ("seed", json!(8), Changes(drawn(), |without, with| without.text != with.text)),
        ("stop", json!(["d"]), Changes(json!({}), |_, with| with.text == "abc" && with.reason == "stop")),
        ("stop_token_ids", json!([100]), Changes(json!({}), |_, with| with.text == "abc" && with.reason == "stop")),
        ("stream", json!(true), Changes(json!({}), |without, with| with.is_stream && with.text == without.text)),
        (
            "stream_options",
            json!({"include_usage": true}),
            Changes(json!({"stream": true}), |_, with| with.tells_usage),
        ),
        ("max_tokens", json!(3), Changes(json!({}), |_, with| with.text == "abc" && with.reason == "length")),
        (
            "presence_penalty",
            json!(2),
            Changes(between(), |without, with| without.text == "aaaaaa" && with.text.starts_with("ab")),
        ),
        ("frequency_penalty", json!(2), Changes(between(), |_, with| with.text.starts_with("ab"))),
        ("repetition_penalty", json!(1.5), Changes(between(), |_, with| with.text.starts_with('b'))),
        ("logit_bias", json!({"98": 100}), Changes(json!({}), |_, with| with.text == "bbbbbb")),
        (
            "ignore_eos",
            json!(true),
            Changes(short(), |without, with| (&without.tokens, &with.tokens) == (&json!(2), &json!(6))),
        ),
        (
            "min_tokens",
            json!(4),
            Changes(short(), |without, with| without.tokens == 2 && with.tokens.as_u64() > Some(3)),
        ),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema()}}),
            Changes(closing(), |_, with| is_object(with)),
        ),
        ("structured_outputs", json!({"json": schema()}), Changes(closing(), |_, with| is_object(with))),
        ("guided_json", schema(), Changes(closing(), |_, with| is_object(with))),
        ("json_schema", schema(), Changes(closing(), |_, with| is_object(with))),
        ("guided_regex", json!("[0-9]{3}"), Changes(json!({}), |_, with| with.text == "000")),
        ("guided_choice", json!(["yes"]), Changes(json!({}), |_, with| with.text == "yes")),
        ("guided_grammar", json!("start: \"no\""), Changes(json!({}), |_, with| with.text == "no")),
        ("grammar", json!("root ::= [0-2] \"!\""), Changes(json!({}), |_, with| with.text == "0!")),
        (
            "guided_whitespace_pattern",
            json!("~"),
            Changes(
                json!({"guided_json": {"const": [1, 1]}, "logit_bias": {"126": 100}, "max_tokens": 20}),
                |_, with| with.text == "[~1~,~1~]",
            ),
        ),
        ("user", json!("someone"), Nothing),
        ("metadata", json!({"a": "b"}), Nothing),
        ("store", json!(true), Nothing),
        ("safety_identifier", json!("someone"), Nothing),
        ("service_tier", json!("flex"), Nothing),
        ("prediction", json!({"type": "content", "content": "abc"}), Nothing),
        ("prompt_cache_key", json!("key"), Nothing),
        ("prompt_cache_retention", json!("24h"), Nothing),
        ("prompt_cache_options", json!({"mode": "explicit"}), Nothing),
        ("request_id", json!("1"), Nothing),
        ("session_id", json!("1"), Nothing),
        ("cache_prompt", json!(true), Nothing),
        ("id_slot", json!(1), Nothing),
        ("cache_salt", json!("salt"), Refused),
        ("best_of", json!(2), Refused),
        ("guided_decoding_backend", json!("outlines"), Refused),
        ("structural_tag", json!("{}"), Refused),
        ("use_beam_search", json!(true), Refused),
        ("length_penalty", json!(0.5), Refused),
        ("early_stopping", json!(true), Refused),
        ("prompt_logprobs", json!(1), Refused),
        ("logprob_token_ids", json!([1]), Refused),
        ("truncate_prompt_tokens", json!(3), Refused),
        ("truncation_side", json!("left"), Refused),
        ("allowed_token_ids", json!([1]), Refused),
        ("bad_words", json!(["a"]), Refused),
        ("logits_processors", json!(["a"]), Refused),
        ("watermarking", json!(true), Refused),
        ("skip_special_tokens", json!(false), Refused),
        ("spaces_between_special_tokens", json!(false), Refused),
        ("include_stop_str_in_output", json!(true), Refused),
        ("return_tokens_as_token_ids", json!(true), Refused),
        ("return_token_ids", json!(true), Refused),
        ("return_token_offsets", json!(true), Refused),
        ("return_mm_kwargs", json!(false), Refused),
        ("mm_payload", json!("none"), Refused),
        ("routed_experts_prompt_start", json!(1), Refused),
        ("stream_interval", json!(4), Refused),
        ("repetition_detection", json!({"max_pattern_size": 3}), Refused),
        ("thinking_token_budget", json!(10), Refused),
        ("priority", json!(1), Refused),
        ("kv_transfer_params", json!({"a": 1}), Refused),
        ("ec_transfer_params", json!({"a": 1}), Refused),
        ("vllm_xargs", json!({"a": 1}), Refused),
        ("a_field_of_tomorrow", json!(1), Refused),
    ]
}

fn of_completions() -> Vec<Row> {
    vec![
        ("prompt", json!("xyz"), Changes(json!({}), |_, with| with.text == "xyzxyz")),
        (
            "adapter_spans",
            json!([{"start": 7, "adapter": "alice"}]),
            Changes(json!({"max_tokens": 8}), |_, with| with.text == "aliceabc"),
        ),
        ("echo", json!(true), Changes(json!({}), |_, with| with.text == "abcdefghabcdef")),
        (
            "logprobs",
            json!(2),
            Changes(json!({}), |_, with| with.logprobs["tokens"].as_array().map(Vec::len) == Some(6)),
        ),
        ("suffix", json!("end"), Refused),
        ("prompt_embeds", json!("AAAA"), Refused),
        ("add_special_tokens", json!(false), Refused),
    ]
}

fn of_chat() -> Vec<Row> {
    let long = || json!({"max_tokens": 14});
    let tool = || json!([{"type": "function", "function": {"name": "f"}}]);
    vec![
        ("messages", json!([{"role": "user", "content": "xyz"}]), Changes(json!({}), |_, with| with.text == "xyzxyz")),
        ("max_completion_tokens", json!(3), Changes(json!({}), |_, with| with.text == "abc")),
        ("add_generation_prompt", json!(false), Changes(long(), |_, with| with.text == "abcdefgh*abcde")),
        (
            "continue_final_message",
            json!(true),
            Changes(json!({"max_tokens": 14, "add_generation_prompt": false}), |_, with| with.text == "abcdefgh+abcde"),
        ),
        ("chat_template_kwargs", json!({"x": 1}), Changes(long(), |_, with| with.text == "abcdefghx=1;ab")),
        (
            "logprobs",
            json!(true),
            Changes(json!({}), |_, with| with.logprobs["content"].as_array().map(Vec::len) == Some(6)),
        ),
        (
            "top_logprobs",
            json!(2),
            Changes(json!({"logprobs": true}), |_, with| {
                with.logprobs["content"][0]["top_logprobs"].as_array().map(Vec::len) == Some(2)
            }),
        ),
        ("tools", tool(), Changes(long(), |_, with| with.text == "abcdefghtools=")),
        (
            "tool_choice",
            json!("none"),
            Changes(json!({"max_tokens": 14, "tools": tool()}), |_, with| with.text == "abcdefghabcdef"),
        ),
        ("parallel_tool_calls", json!(false), Nothing),
        ("echo", json!(true), Refused),
        ("functions", json!([{"name": "f"}]), Refused),
        ("function_call", json!({"name": "f"}), Refused),
        ("modalities", json!(["text", "audio"]), Refused),
        ("audio", json!({"voice": "ash", "format": "wav"}), Refused),
        ("moderation", json!({"model": "m"}), Refused),
        ("reasoning_effort", json!("low"), Refused),
        ("include_reasoning", json!(false), Refused),
        ("verbosity", json!("low"), Refused),
        ("web_search_options", json!({}), Refused),
        ("chat_template", json!("{{ messages }}"), Refused),
        ("documents", json!([{"title": "a", "text": "b"}]), Refused),
        ("media_io_kwargs", json!({"image": {}}), Refused),
        ("mm_processor_kwargs", json!({"a": 1}), Refused),
        ("return_prompt_text", json!(true), Refused),
        ("add_special_tokens", json!(true), Refused),
    ]
}

/// The parameters of `completions.create` in OpenAI's client 3.57, and of vLLM's `CompletionRequest`.
const OF_COMPLETIONS: &str = "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed \
    stop stream stream_options suffix temperature top_p user use_beam_search top_k min_p repetition_penalty watermarking length_penalty \
    stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens \
    truncate_prompt_tokens truncation_side allowed_token_ids prompt_logprobs logprob_token_ids bad_words prompt_embeds \
    add_special_tokens response_format structured_outputs priority request_id session_id return_tokens_as_token_ids return_token_ids \
    routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs \
    repetition_detection thinking_token_budget stream_interval";

/// The parameters of `chat.completions.create` in OpenAI's client 3.57, and of vLLM's `ChatCompletionRequest`.
const OF_CHAT: &str = "messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens \
    max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key \
    prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream \
    stream_options temperature tool_choice tools top_logprobs top_p user verbosity web_search_options thinking_token_budget \
    include_reasoning use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids \
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens \
    truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message \
    add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority \
    request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets \
    return_prompt_text return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection \
    stream_interval";

/// A request to `path` with these fields; what completions are told as a prompt, chats are as a message.
fn request(path: &str, fields: &Value) -> Value {
    let mut body = json!({"model": MODEL, "max_tokens": 6, "temperature": 0, "prompt": "abcdefgh"});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    if path == CHAT {
        let prompt = body.as_object_mut().unwrap().remove("prompt").unwrap();
        if body.get("messages").is_none() {
            body["messages"] = json!([{"role": "user", "content": prompt}]);
        }
    }
    body
}

#[tokio::test]
async fn every_documented_field_is_honoured_or_refused_by_name() {
    let service = Service::new();
    for (path, own, documented) in [(COMPLETIONS, of_completions(), OF_COMPLETIONS), (CHAT, of_chat(), OF_CHAT)] {
        let rows: Vec<Row> = shared().into_iter().chain(own).collect();
        let names: Vec<&str> = rows.iter().map(|(name, _, _)| *name).collect();
        for name in documented.split_whitespace() {
            assert_eq!(names.iter().filter(|known| **known == name).count(), 1, "{path} {name}");
        }
        for (name, value, fate) in rows {
            let with = |mut fields: Value| {
                fields[name] = value.clone();
                request(path, &fields)
            };
            match fate {
                Changes(fields, as_it_should) => {
                    let without = Seen::of(&service.post(path, &request(path, &fields)).await);
                    let with = Seen::of(&service.post(path, &with(fields)).await);
                    assert!(without != with && as_it_should(&without, &with), "{path} {name}: {without:?} {with:?}");
                }
                Nothing => {
                    let without = Seen::of(&service.post(path, &request(path, &json!({}))).await);
                    assert_eq!(without, Seen::of(&service.post(path, &with(json!({}))).await), "{path} {name}");
                }
                Refused => {
                    let error = service.post(path, &with(json!({}))).await.error(400);
                    assert_eq!(error["param"], name, "{path} {error}");
                    assert!(error["message"].as_str().unwrap().contains(name), "{error}");
                }
            }
        }
    }
}
