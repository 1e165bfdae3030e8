//! Every field of a request, and what becomes of it: it is read, it changes nothing about an answer, or it is refused by name.
//! A field that is in no table is refused too, because leaving it out in silence would be another answer than what was asked for.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// What becomes of a field.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// It is done, and its value checked, by whoever reads it.
    Read,
    /// No answer depends on it.
    Harmless,
    /// It isn't done. These values, as JSON, ask for nothing and are taken, and so is null.
    Refused(&'static [&'static str]),
}

use Fate::{Harmless, Read, Refused};

/// A table of fields.
type Fields = &'static [(&'static str, Fate)];

/// The fields of both endpoints: OpenAI's, then those that vLLM and llama.cpp add.
const SHARED: Fields = &[
    ("model", Read),
    // Ours: an adapter or a sum of several, where `model` is the base model.
    ("adapter", Read),
    ("n", Read),
    ("temperature", Read),
    ("top_p", Read),
    ("seed", Read),
    ("stop", Read),
    ("stream", Read),
    ("stream_options", Read),
    ("max_tokens", Read),
    ("presence_penalty", Read),
    ("frequency_penalty", Read),
    ("logit_bias", Read),
    ("top_k", Read),
    ("min_p", Read),
    ("repetition_penalty", Read),
    ("stop_token_ids", Read),
    ("ignore_eos", Read),
    ("min_tokens", Read),
    // Who asks, what for, and what is kept or computed where.
    ("user", Harmless),
    ("metadata", Harmless),
    ("store", Harmless),
    ("safety_identifier", Harmless),
    ("service_tier", Harmless),
    ("prediction", Harmless),
    ("prompt_cache_key", Harmless),
    ("prompt_cache_retention", Harmless),
    ("prompt_cache_options", Harmless),
    ("cache_prompt", Harmless),
    ("id_slot", Harmless),
    ("request_id", Harmless),
    ("session_id", Harmless),
    // Its requests would have to be kept from having keys and values in common with others.
    ("cache_salt", Refused(&[r#""""#])),
    ("best_of", Refused(&["1"])),
    ("response_format", Read),
    ("guided_json", Read),
    ("guided_regex", Read),
    ("guided_choice", Read),
    ("guided_grammar", Read),
    // There is one way to do it.
    ("guided_decoding_backend", Refused(&[r#""auto""#, r#""guidance""#])),
    ("guided_whitespace_pattern", Read),
    ("structured_outputs", Read),
    ("structural_tag", Refused(&[])),
    ("json_schema", Read),
    ("grammar", Read),
    ("use_beam_search", Refused(&["false"])),
    ("length_penalty", Refused(&["1"])),
    ("early_stopping", Refused(&["false"])),
    ("prompt_logprobs", Refused(&[])),
    ("logprob_token_ids", Refused(&[])),
    ("truncate_prompt_tokens", Refused(&[])),
    ("truncation_side", Refused(&[])),
    ("allowed_token_ids", Refused(&[])),
    ("bad_words", Refused(&["[]"])),
    ("logits_processors", Refused(&["[]"])),
    ("watermarking", Refused(&["false"])),
    ("skip_special_tokens", Refused(&["true"])),
    ("spaces_between_special_tokens", Refused(&["true"])),
    ("include_stop_str_in_output", Refused(&["false"])),
    ("return_tokens_as_token_ids", Refused(&["false"])),
    ("return_token_ids", Refused(&["false"])),
    ("return_token_offsets", Refused(&["false"])),
    ("return_mm_kwargs", Refused(&["true"])),
    ("mm_payload", Refused(&[r#""tensors""#])),
    ("routed_experts_prompt_start", Refused(&["0"])),
    ("stream_interval", Refused(&["1"])),
    ("repetition_detection", Refused(&[])),
    ("thinking_token_budget", Refused(&["-1"])),
    ("priority", Refused(&["0"])),
    ("kv_transfer_params", Refused(&["{}"])),
    ("ec_transfer_params", Refused(&["{}"])),
    ("vllm_xargs", Refused(&["{}"])),
    ("typical_p", Refused(&["1"])),
    ("tfs_z", Refused(&["1"])),
    ("top_a", Refused(&["0"])),
    ("top_n_sigma", Refused(&["-1", "0"])),
    ("repeat_penalty", Refused(&["1"])),
    ("mirostat", Refused(&["0"])),
    ("mirostat_mode", Refused(&["0"])),
    ("dynatemp_range", Refused(&["0"])),
    ("dry_multiplier", Refused(&["0"])),
    ("xtc_probability", Refused(&["0"])),
    ("n_probs", Refused(&["0"])),
    ("n_keep", Refused(&["0"])),
    ("lora", Refused(&["[]"])),
];

/// The fields of `/v1/completions` alone.
const COMPLETIONS: Fields = &[
    ("prompt", Read),
    // Ours: other adapters for parts of it.
    ("adapter_spans", Read),
    ("logprobs", Read),
    ("echo", Read),
    ("suffix", Refused(&[r#""""#])),
    ("prompt_embeds", Refused(&[])),
    ("add_special_tokens", Refused(&["true"])),
];

/// The fields of `/v1/chat/completions` alone.
const CHAT: Fields = &[
    ("messages", Read),
    ("max_completion_tokens", Read),
    ("add_generation_prompt", Read),
    ("continue_final_message", Read),
    ("chat_template_kwargs", Read),
    // Of vLLM's chats alone; a message can't be given back with its template.
    ("echo", Refused(&["false"])),
    ("parallel_tool_calls", Harmless),
    ("logprobs", Read),
    ("top_logprobs", Read),
    ("tools", Read),
    ("tool_choice", Read),
    ("functions", Refused(&["[]"])),
    ("function_call", Refused(&[r#""none""#, r#""auto""#])),
    ("modalities", Refused(&["[]", r#"["text"]"#])),
    ("audio", Refused(&[])),
    ("moderation", Refused(&[])),
    ("reasoning_effort", Refused(&[])),
    ("verbosity", Refused(&[])),
    ("web_search_options", Refused(&[])),
    ("chat_template", Refused(&[])),
    ("documents", Refused(&["[]"])),
    ("media_io_kwargs", Refused(&["{}"])),
    ("return_prompt_text", Refused(&["false"])),
    ("mm_processor_kwargs", Refused(&["{}"])),
    ("add_special_tokens", Refused(&["false"])),
    ("include_reasoning", Refused(&["true"])),
];

const STREAM_OPTIONS: Fields = &[
    ("include_usage", Read),
    // Padding against whoever measures the lengths of packets.
    ("include_obfuscation", Harmless),
    ("continuous_usage_stats", Refused(&["false"])),
];

/// The fields of `response_format`.
const RESPONSE_FORMAT: Fields = &[("type", Read), ("json_schema", Read)];

/// The fields of `response_format.json_schema`.
const NAMED_SCHEMA: Fields = &[
    ("schema", Read),
    // Texts are always exactly of the schema, whatever it is called.
    ("name", Harmless),
    ("description", Harmless),
    ("strict", Harmless),
];

/// The fields of `structured_outputs`.
const STRUCTURED_OUTPUTS: Fields = &[
    ("json", Read),
    ("json_object", Read),
    ("regex", Read),
    ("choice", Read),
    ("grammar", Read),
    ("disable_any_whitespace", Read),
    ("disable_additional_properties", Read),
    ("whitespace_pattern", Read),
    ("structural_tag", Refused(&[])),
];

/// The fields of a part of a sum of adapters.
const ADAPTER_PART: Fields = &[("name", Read), ("weight", Read)];

/// The fields of a span of a prompt.
const SPAN: Fields = &[("start", Read), ("end", Read), ("adapter", Read)];

const MESSAGE: Fields = &[
    ("role", Read),
    ("content", Read),
    ("adapter", Read),
    ("name", Read),
    ("refusal", Refused(&[])),
    ("annotations", Refused(&["[]"])),
    ("audio", Refused(&[])),
    ("function_call", Refused(&[])),
    ("tool_calls", Read),
    ("tool_call_id", Read),
    ("reasoning_content", Refused(&[r#""""#])),
    ("reasoning", Refused(&[r#""""#])),
];

/// The fields of `/tokenize`, for a prompt and for a chat.
const TOKENIZE: Fields = &[
    ("model", Read),
    ("prompt", Read),
    ("add_special_tokens", Read),
    ("return_token_strs", Read),
    ("messages", Read),
    ("add_generation_prompt", Read),
    ("continue_final_message", Read),
    ("chat_template_kwargs", Read),
    ("tools", Read),
    ("tool_choice", Read),
    ("chat_template", Refused(&[])),
    ("mm_processor_kwargs", Refused(&["{}"])),
];

const DETOKENIZE: Fields = &[("model", Read), ("tokens", Read)];

/// The fields of `/v1/load_lora_adapter`.
const LOAD: Fields = &[
    ("lora_name", Read),
    ("lora_path", Read),
    ("load_inplace", Read),
    // The one that there is.
    ("base_model_name", Harmless),
];

/// The fields of `/v1/unload_lora_adapter`.
const UNLOAD: Fields = &[("lora_name", Read), ("lora_int_id", Refused(&[]))];

const PART: Fields = &[("type", Read), ("text", Read), ("cache_control", Harmless)];

/// Refuses what a body for completions asks for and isn't done.
pub(crate) fn check_completions(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[SHARED, COMPLETIONS])
}

/// Refuses what a body for a chat asks for and isn't done, messages and their parts included.
pub(crate) fn check_chat(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[SHARED, CHAT])?;
    check_messages(body)
}

/// Refuses what a body for `/tokenize` asks for and isn't done.
pub(crate) fn check_tokenize(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[TOKENIZE])?;
    check_messages(body)
}

/// Refuses what a body for `/detokenize` asks for and isn't done.
pub(crate) fn check_detokenize(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[DETOKENIZE])
}

/// Refuses what a body that loads an adapter asks for and isn't done.
pub(crate) fn check_load(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[LOAD])
}

/// Refuses what a body that unloads an adapter asks for and isn't done.
pub(crate) fn check_unload(body: &Value) -> Result<(), ApiError> {
    check(body, "", &[UNLOAD])
}

/// Refuses what a part of a sum of adapters, at `path`, asks for and isn't done.
pub(crate) fn check_adapter_part(part: &Value, path: &str) -> Result<(), ApiError> {
    check(part, path, &[ADAPTER_PART])
}

/// Refuses what a span of a prompt, at `path`, asks for and isn't done.
pub(crate) fn check_span(span: &Value, path: &str) -> Result<(), ApiError> {
    check(span, path, &[SPAN])
}

fn check_messages(body: &Value) -> Result<(), ApiError> {
    for (index, message) in items(&body["messages"]) {
        let path = format!("messages[{index}].");
        check(message, &path, &[MESSAGE])?;
        for (part_index, part) in items(&message["content"]) {
            // Parts of another kind are refused for their kind by whoever reads them.
            if part["type"] == "text" {
                check(part, &format!("{path}content[{part_index}]."), &[PART])?;
            }
        }
    }
    Ok(())
}

/// The items of a list, numbered; none of anything else, which is refused where it is read.
fn items(value: &Value) -> impl Iterator<Item = (usize, &Value)> {
    value.as_array().into_iter().flatten().enumerate()
}

fn check(object: &Value, path: &str, tables: &[Fields]) -> Result<(), ApiError> {
    let Some(fields) = object.as_object() else { return Ok(()) };
    if path.is_empty() {
        let format = &object["response_format"];
        check(&object["stream_options"], "stream_options.", &[STREAM_OPTIONS])?;
        check(format, "response_format.", &[RESPONSE_FORMAT])?;
        check(&format["json_schema"], "response_format.json_schema.", &[NAMED_SCHEMA])?;
        check(&object["structured_outputs"], "structured_outputs.", &[STRUCTURED_OUTPUTS])?;
    }
    fields.iter().try_for_each(|(name, value)| check_field(fields, name, value, path, tables))
}

fn check_field(
    fields: &Map<String, Value>,
    name: &str,
    value: &Value,
    path: &str,
    tables: &[Fields],
) -> Result<(), ApiError> {
    let known = tables.iter().copied().flatten().find(|(known, _)| known == &name);
    let reason = match known.map(|(_, fate)| fate) {
        Some(Read | Harmless) => return Ok(()),
        Some(Refused(_)) if value.is_null() => return Ok(()),
        // As many as are asked for anyhow.
        Some(Refused(_)) if name == "best_of" && same(value, fields.get("n").unwrap_or(&Value::Null)) => return Ok(()),
        Some(Refused(harmless)) if harmless.iter().any(|text| is(value, text)) => return Ok(()),
        Some(Refused(_)) => "is not supported",
        None => "is not a field that is known here",
    };
    let param = format!("{path}{name}");
    let message = format!("{param} {reason}; leave it out");
    Err(ApiError::invalid(&param, message))
}

/// Whether `value` is what `text` says, 1.0 being 1.
fn is(value: &Value, text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|expected| same(value, &expected))
}

fn same(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn param(result: Result<(), ApiError>) -> Option<String> {
        match result {
            Ok(()) => None,
            Err(ApiError::Invalid { param, .. }) => param,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn each_table_names_a_field_once_and_its_values_are_json() {
        let within =
            [STREAM_OPTIONS, RESPONSE_FORMAT, NAMED_SCHEMA, STRUCTURED_OUTPUTS, ADAPTER_PART, SPAN, MESSAGE, PART];
        let alone = within.into_iter().chain([TOKENIZE, DETOKENIZE, LOAD, UNLOAD]).map(|table| vec![table]);
        for tables in [vec![SHARED, COMPLETIONS], vec![SHARED, CHAT]].into_iter().chain(alone) {
            let mut names: Vec<&str> = Vec::new();
            for (name, fate) in tables.into_iter().flatten() {
                assert!(!names.contains(name), "{name}");
                names.push(name);
                if let Refused(values) = fate {
                    assert!(values.iter().all(|value| serde_json::from_str::<Value>(value).is_ok()), "{name}");
                }
            }
        }
    }

    #[test]
    fn what_asks_for_nothing_is_taken_and_what_asks_is_refused_by_name() {
        for (name, value) in SHARED.iter().chain(COMPLETIONS).filter_map(|(name, fate)| match fate {
            Refused(values) => Some((name, values)),
            Read | Harmless => None,
        }) {
            let ask = |value: Value| param(check_completions(&json!({"prompt": "a", *name: value})));
            assert_eq!(ask(Value::Null), None, "{name}");
            for text in *value {
                assert_eq!(ask(serde_json::from_str(text).unwrap()), None, "{name} {text}");
            }
            assert_eq!(ask(json!({"something": [7]})).as_deref(), Some(*name));
        }
    }

    #[test]
    fn a_field_that_nobody_knows_is_refused_wherever_it_is() {
        assert_eq!(param(check_completions(&json!({"prompt": "a", "temprature": 0}))).as_deref(), Some("temprature"));
        assert_eq!(param(check_completions(&json!({"messages": []}))).as_deref(), Some("messages"));
        assert_eq!(param(check_completions(&json!({"n": 2, "best_of": 2, "length_penalty": 1.0}))), None);
        let nested = [
            (json!({"stream_options": {"often": true}}), "stream_options.often"),
            (json!({"messages": [{"role": "user", "content": "a"}, {"weight": 0}]}), "messages[1].weight"),
            (json!({"messages": [{"function_call": {"name": "f"}}]}), "messages[0].function_call"),
            (
                json!({"messages": [{"content": [{"type": "text", "text": "a", "bold": true}]}]}),
                "messages[0].content[0].bold",
            ),
        ];
        for (body, expected) in nested {
            assert_eq!(param(check_chat(&body)).as_deref(), Some(expected));
        }
        let message = json!({"role": "assistant", "content": "a", "refusal": null, "tool_calls": [], "name": "b"});
        assert_eq!(param(check_chat(&json!({"messages": [message], "user": "someone", "metadata": {}}))), None);
    }
}
