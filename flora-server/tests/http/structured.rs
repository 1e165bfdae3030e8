//! Structured output: texts have the form that was asked for, however they are drawn and sent, and forms that nobody can follow are
//! refused. A prompt that begins with `?` makes the model draw letters where it may and anything else where it may not.

use std::cell::Cell;
use std::time::{Duration, Instant};

use flora_engine::Options;
use flora_server::{Limits, ServerOptions};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use serde_json::{Map, Value, json};

use crate::support::{MODEL, Service};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn body(fields: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": "?", "max_tokens": 400, "seed": 7});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// The texts of an answer's choices, each with why it ended.
fn choices(answer: &Value) -> Vec<(String, String)> {
    let choice = |choice: &Value| {
        let text = choice["text"].as_str().or_else(|| choice["message"]["content"].as_str()).unwrap();
        (text.to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
    };
    answer["choices"].as_array().unwrap_or_else(|| panic!("{answer}")).iter().map(choice).collect()
}

/// Whether `value` is of `schema`, for the keywords that the schemas here have.
fn is_of(schema: &Value, root: &Value, value: &Value) -> bool {
    if let Some(reference) = schema["$ref"].as_str() {
        return is_of(root.pointer(reference.trim_start_matches('#')).unwrap(), root, value);
    }
    if let Some(options) = schema["anyOf"].as_array() {
        return options.iter().any(|option| is_of(option, root, value));
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.contains(value);
    }
    let within = |count: usize, least: &str, most: &str| {
        let bound = |name: &str| schema[name].as_u64().map(|bound| bound as usize);
        bound(least).is_none_or(|least| count >= least) && bound(most).is_none_or(|most| count <= most)
    };
    match (schema["type"].as_str().unwrap(), value) {
        ("null", Value::Null) | ("boolean", Value::Bool(_)) => true,
        ("integer", Value::Number(number)) => {
            let number = number.as_i64().unwrap();
            (schema["minimum"].as_i64().unwrap()..=schema["maximum"].as_i64().unwrap()).contains(&number)
        }
        ("string", Value::String(text)) => within(text.chars().count(), "minLength", "maxLength"),
        ("array", Value::Array(items)) => {
            within(items.len(), "minItems", "maxItems") && items.iter().all(|item| is_of(&schema["items"], root, item))
        }
        ("object", Value::Object(fields)) => {
            let required = schema["required"].as_array().unwrap();
            required.iter().all(|name| fields.contains_key(name.as_str().unwrap()))
                && fields.iter().all(|(name, value)| {
                    schema["properties"].get(name).is_some_and(|schema| is_of(schema, root, value))
                })
        }
        _ => false,
    }
}

fn schemas() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(json!({"type": "null"})),
        Just(json!({"type": "boolean"})),
        Just(json!({"enum": ["a", "b\"c", 1, null, [true]]})),
        (-1000i64..1000, 0i64..2000)
            .prop_map(|(least, more)| json!({"type": "integer", "minimum": least, "maximum": least + more})),
        (0u32..3, 0u32..6)
            .prop_map(|(least, more)| json!({"type": "string", "minLength": least, "maxLength": least + more})),
        Just(json!({"$ref": "#/$defs/list"})),
    ];
    let inner = leaf.prop_recursive(3, 12, 3, |inner| {
        let fields = proptest::collection::vec((inner.clone(), any::<bool>()), 0..4);
        prop_oneof![
            (inner.clone(), 0u32..2, 0u32..3).prop_map(|(items, least, more)| {
                json!({"type": "array", "items": items, "minItems": least, "maxItems": least + more})
            }),
            fields.prop_map(|fields| {
                let names = ["zebra", "apple", "a \"b\"", "\u{fc}"];
                let required: Vec<&str> =
                    fields.iter().zip(names).filter(|((_, required), _)| *required).map(|(_, name)| name).collect();
                let properties: Map<String, Value> =
                    names.iter().zip(&fields).map(|(name, (schema, _))| ((*name).to_owned(), schema.clone())).collect();
                json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
            }),
            proptest::collection::vec(inner, 1..3).prop_map(|options| json!({"anyOf": options})),
        ]
    });
    // A list that holds lists.
    let list =
        json!({"type": "array", "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}, "maxItems": 2});
    inner.prop_map(move |mut schema| {
        schema["$defs"] = json!({"list": list});
        schema
    })
}

#[test]
fn answers_are_of_their_schema_or_were_cut() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let service = Service::new();
    let config = Config { cases: 60, rng_seed: RngSeed::Fixed(18), failure_persistence: None, ..Config::default() };
    let reasons = Cell::new([0, 0]);
    let outcome = TestRunner::new(config).run(&(schemas(), any::<u32>()), |(schema, seed)| {
        let named = json!({"name": "n", "schema": schema, "strict": true});
        let asked = body(json!({"response_format": {"type": "json_schema", "json_schema": named},
            "n": 3, "seed": seed, "max_tokens": 25}));
        let answer = runtime.block_on(service.post(COMPLETIONS, &asked));
        prop_assert_eq!(answer.status.as_u16(), 200, "{} {}", schema, answer.text);
        for (text, reason) in choices(&answer.json()) {
            match &reason[..] {
                "stop" => {
                    let value: Value = serde_json::from_str(&text)
                        .map_err(|error| TestCaseError::fail(format!("{error} in {text}")))?;
                    prop_assert!(is_of(&schema, &schema, &value), "{} is not of {}", value, schema);
                }
                reason => prop_assert_eq!(reason, "length"),
            }
            let [cut, whole] = reasons.get();
            reasons.set(if reason == "stop" { [cut, whole + 1] } else { [cut + 1, whole] });
        }
        Ok(())
    });
    outcome.unwrap();
    let [cut, whole] = reasons.get();
    assert!(cut > 5 && whole > 60, "{cut} {whole}");
}

#[tokio::test]
async fn every_field_gives_its_form_on_both_endpoints() {
    let service = Service::new();
    let schema = json!({"type": "object", "properties": {"b": {"enum": [1]}, "a": {"const": "x"}},
        "required": ["b", "a"], "additionalProperties": false});
    let tight = r#"{"b":1,"a":"x"}"#;
    for (fields, expected) in [
        (json!({"structured_outputs": {"json": schema, "disable_any_whitespace": true}}), tight),
        (json!({"guided_json": schema.to_string(), "guided_whitespace_pattern": "[x]{0}"}), tight),
        (json!({"guided_choice": ["indeed"]}), "indeed"),
        (json!({"structured_outputs": {"choice": ["\u{fc}ber \"1\""]}}), "\u{fc}ber \"1\""),
        (json!({"guided_regex": "(ab){3}"}), "ababab"),
        (json!({"structured_outputs": {"regex": "^a\\.b$"}}), "a.b"),
        (json!({"guided_grammar": "start: \"x\" middle \"z\"\nmiddle: /[0-9]{1,3}/ \"!\" | \"y\" \"?\""}), ""),
        (json!({"structured_outputs": {"grammar": "start: \"only this\""}}), "only this"),
        (json!({"guided_grammar": "root ::= Word{2}\nWord ::= \"(\" [x]\n  \")\""}), "(x)(x)"),
    ] {
        let completion = service.post(COMPLETIONS, &body(fields.clone())).await.json();
        let mut chat = body(fields.clone());
        chat["messages"] = json!([{"role": "user", "content": "?"}]);
        chat.as_object_mut().unwrap().remove("prompt");
        let chat = service.post(CHAT, &chat).await.json();
        for answer in [completion, chat] {
            let [(text, reason)] = &choices(&answer)[..] else { panic!("{answer}") };
            assert_eq!(reason, "stop", "{fields} {text}");
            match expected {
                "" => assert!(text == "xy?z" || text.starts_with('x') && text.ends_with("!z"), "{text}"),
                expected => assert_eq!(text, expected, "{fields}"),
            }
        }
    }
    let answer =
        service.post(COMPLETIONS, &body(json!({"response_format": {"type": "json_object"}, "n": 4}))).await.json();
    for (text, reason) in choices(&answer) {
        assert!(text.starts_with('{'), "{text}");
        assert!(reason == "length" || serde_json::from_str::<Map<String, Value>>(&text).is_ok(), "{text}");
    }
}

#[tokio::test]
async fn a_form_goes_with_streams_stops_limits_choices_and_log_probabilities() {
    let service = Service::new();
    let digits = json!({"guided_regex": "[0-9]{12}"});
    let ask = async |fields: Value| {
        let mut all = body(digits.clone());
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        service.post(COMPLETIONS, &all).await
    };
    let whole = choices(&ask(json!({"n": 3})).await.json());
    assert!(whole.iter().all(|(text, reason)| text.len() == 12 && reason == "stop"), "{whole:?}");
    assert_ne!(whole[0].0, whole[1].0, "choices are drawn apart");
    let (text, _) = &whole[0];
    let chunks = ask(json!({"stream": true})).await.chunks();
    let said: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!((&said, &chunks.last().unwrap()["choices"][0]["finish_reason"]), (text, &json!("stop")));
    let cut = choices(&ask(json!({"max_tokens": 5})).await.json());
    assert_eq!(cut, [(text[..5].to_owned(), "length".to_owned())]);
    let stopped = choices(&ask(json!({"stop": &text[6..8]})).await.json());
    assert_eq!(stopped, [(text[..text.find(&text[6..8]).unwrap()].to_owned(), "stop".to_owned())]);
    // What the model draws from are the ten digits, each as likely.
    let answer = ask(json!({"logprobs": 12})).await.json();
    let told = &answer["choices"][0]["logprobs"];
    for (own, likeliest) in
        told["token_logprobs"].as_array().unwrap().iter().zip(told["top_logprobs"].as_array().unwrap())
    {
        assert!((own.as_f64().unwrap() - 0.1f64.ln()).abs() < 1e-5, "{own}");
        let finite = likeliest.as_object().unwrap().values().filter(|value| value.as_f64().unwrap() > -100.0);
        assert_eq!(finite.count(), 10);
    }
    // Letters that it would rather say are not taken from it where they may come.
    let free = choices(&service.post(COMPLETIONS, &body(json!({"max_tokens": 12}))).await.json());
    assert!(free[0].0.bytes().all(|byte| byte.is_ascii_lowercase()), "{free:?}");
    let ends = json!({"guided_regex": "[a-z]{2,}", "logit_bias": {"256": 100}});
    let ended = choices(&service.post(COMPLETIONS, &body(ends.clone())).await.json());
    assert_eq!((ended[0].0.len(), &ended[0].1[..]), (2, "stop"));
    let mut endless = ends;
    endless["ignore_eos"] = json!(true);
    endless["max_tokens"] = json!(30);
    let endless = choices(&service.post(COMPLETIONS, &body(endless)).await.json());
    assert_eq!((endless[0].0.len(), &endless[0].1[..]), (30, "length"));
}

#[tokio::test]
async fn free_neighbours_say_what_they_say_alone() {
    let service = Service::new();
    let free = body(json!({"max_tokens": 40}));
    let alone = choices(&service.post(COMPLETIONS, &free).await.json());
    service.gate.close();
    let bound = body(json!({"guided_regex": "[0-9]{40}"}));
    let (a, b, c) =
        (service.post(COMPLETIONS, &bound), service.post(COMPLETIONS, &free), service.post(COMPLETIONS, &bound));
    let opened = async {
        service.until(|service| service.engine.metrics().waiting + service.engine.metrics().running == 3).await;
        service.gate.open();
    };
    let (a, b, c, ()) = tokio::join!(a, b, c, opened);
    assert_eq!(choices(&b.json()), alone);
    assert_eq!(choices(&a.json()), choices(&c.json()));
    assert!(choices(&a.json())[0].0.bytes().all(|byte| byte.is_ascii_digit()));
}

#[tokio::test]
async fn forms_that_cannot_be_followed_are_refused_by_field_and_place() {
    let service = Service::new();
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}});
    let schema_field = "response_format.json_schema.schema";
    for (fields, param, place) in [
        (format(json!({"properties": {"a": {"type": "object", "not": {}}}})), schema_field, "/properties/a"),
        (format(json!({"items": {"pattern": "["}})), schema_field, "/items"),
        (format(json!("object")), schema_field, "object"),
        (json!({"guided_regex": "("}), "guided_regex", "unclosed"),
        (json!({"structured_outputs": {"grammar": "start: \"a\n"}}), "structured_outputs.grammar", "1("),
        (json!({"structured_outputs": {"structural_tag": "{}"}}), "structured_outputs.structural_tag", "leave it out"),
        (json!({"structured_outputs": {"jason": {}}}), "structured_outputs.jason", "known"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schemas": {}}}}),
            "response_format.json_schema.schemas",
            "known",
        ),
        (json!({"guided_json": {}, "guided_regex": "a"}), "guided_regex", "guided_json"),
        (json!({"guided_regex": "a".repeat(200_000)}), "guided_regex", "131072"),
    ] {
        let error = service.post(COMPLETIONS, &body(fields.clone())).await.error(400);
        assert_eq!(error["param"], param, "{fields} {error}");
        assert!(error["message"].as_str().unwrap().contains(place), "{error}");
    }
}

#[tokio::test]
async fn what_takes_too_long_is_refused_in_time_and_harms_nobody() {
    let limits = Limits { grammar_timeout: Duration::from_millis(1), ..Limits::default() };
    let service = Service::with(ServerOptions { limits, ..ServerOptions::default() }, Options::default());
    let patterns: Map<String, Value> = (0..70).map(|index| (format!("^(a|b)*{index}(c|d)*$"), json!({}))).collect();
    let slow = body(json!({"guided_json": {"type": "object", "patternProperties": patterns}}));
    let start = Instant::now();
    let mut told = Vec::new();
    for _ in 0..4 {
        let answer = service.post(COMPLETIONS, &slow).await;
        told.push((answer.status.as_u16(), answer.json()["error"]["code"].clone()));
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    // Those that go on keep others from being compiled, and a client that is turned away is told to come again.
    assert!(told.contains(&(400, Value::Null)) && told.contains(&(503, json!("too_many_grammars"))), "{told:?}");
    assert_eq!(service.post(COMPLETIONS, &body(json!({}))).await.status, 200);
}

#[tokio::test]
async fn the_example_in_the_documentation_is_answered() {
    let documentation = include_str!("../../../docs/serving.md");
    let (_, section) = documentation.split_once("### Structured output").unwrap();
    let (_, example) = section.split_once("-d '").unwrap();
    let mut asked: Value = serde_json::from_str(example.split_once("'\n```").unwrap().0).unwrap();
    asked["model"] = json!(MODEL);
    let [(text, reason)] = &choices(&Service::new().post(CHAT, &asked).await.json())[..] else { panic!("one choice") };
    let animal: Value = serde_json::from_str(text).unwrap();
    assert!(
        animal["name"].is_string() && ["plants", "animals", "both"].iter().any(|eats| animal["eats"] == *eats),
        "{text}"
    );
    assert_eq!(reason, "stop");
}
