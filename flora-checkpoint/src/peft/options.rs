//! Every field of PEFT 0.21's configs, and whether an adapter that sets it can be served.

use super::AdapterError;
use crate::json::Json;
use std::path::Path;

/// What to do about an option.
#[derive(Clone, Copy)]
enum Rule {
    /// It concerns training, bookkeeping or where files come from: the result is the same.
    Harmless,
    /// `Config` reads it.
    Supported,
    /// Refused unless null, false or empty, or one of the given values, because it would do what the text says.
    RefusedUnless(&'static [Plain], &'static str),
}

/// A value at which a refused option does nothing.
#[derive(Clone, Copy)]
enum Plain {
    True,
    Text(&'static str),
}

use Rule::{Harmless, RefusedUnless, Supported};

type Table = &'static [(&'static str, Rule)];

const COMMON: Table = &[
    ("peft_type", Supported),
    ("target_modules", Supported),
    ("exclude_modules", Supported),
    ("fan_in_fan_out", Supported),
    ("task_type", Harmless),
    ("auto_mapping", Harmless),
    ("peft_version", Harmless),
    ("base_model_name_or_path", Harmless),
    ("revision", Harmless),
    ("inference_mode", Harmless),
    ("modules_to_save", RefusedUnless(&[], "it replaces whole modules of the base model")),
];

const LAYERS: Table =
    &[("r", Supported), ("layers_to_transform", Supported), ("layers_pattern", Supported), ("rank_pattern", Supported)];

/// Initialisations that leave the base weights alone: what was trained from them is plain LoRA.
const PLAIN_INIT: &[Plain] =
    &[Plain::True, Plain::Text("gaussian"), Plain::Text("orthogonal"), Plain::Text("eva"), Plain::Text("mica")];

const LORA: Table = &[
    ("lora_alpha", Supported),
    ("alpha_pattern", Supported),
    ("use_rslora", Supported),
    ("use_dora", Supported),
    ("lora_dropout", Harmless),
    ("megatron_core", Harmless),
    ("qalora_group_size", Harmless),
    ("runtime_config", Harmless),
    ("eva_config", Harmless),
    ("bias", RefusedUnless(&[Plain::Text("none")], "it trains biases of the base model")),
    (
        "init_lora_weights",
        RefusedUnless(PLAIN_INIT, "it changes the base weights; save the adapter converted to plain LoRA"),
    ),
    ("megatron_config", RefusedUnless(&[], "it splits layers over devices")),
    ("trainable_token_indices", RefusedUnless(&[], "it replaces rows of the embedding")),
    ("loftq_config", RefusedUnless(&[], "it changes the base weights")),
    ("corda_config", RefusedUnless(&[], "it changes the base weights")),
    ("lora_ga_config", RefusedUnless(&[], "it changes the base weights")),
    ("velora_config", RefusedUnless(&[], "it is another variant of LoRA (VeLoRA)")),
    ("alora_invocation_tokens", RefusedUnless(&[], "the adapter acts only after these tokens (activated LoRA)")),
    ("use_qalora", RefusedUnless(&[], "it pools the inputs (QALoRA)")),
    ("monteclora_config", RefusedUnless(&[], "it samples weights (MonteCLoRA)")),
    ("layer_replication", RefusedUnless(&[], "it repeats layers of the base model")),
    ("lora_bias", RefusedUnless(&[], "it adds a bias to the adapter")),
    ("target_parameters", RefusedUnless(&[], "it adapts parameters that are no linear layers")),
    ("use_bdlora", RefusedUnless(&[], "its factors are block-diagonal (BD-LoRA)")),
    ("arrow_config", RefusedUnless(&[], "it routes tokens between adapters (Arrow)")),
    ("kasa_config", RefusedUnless(&[], "it truncates the base weights and scales the ranks (KaSA)")),
    ("ensure_weight_tying", RefusedUnless(&[], "it ties the adapters of embedding and output layer")),
];

const IA3: Table = &[("feedforward_modules", Supported), ("init_ia3_weights", Harmless)];

const HIRA: Table = &[("hira_dropout", Harmless), ("init_weights", Harmless)];

const FLORA: Table = &[("reduce", Supported)];

/// The tables that hold for a `peft_type`, which is written in capitals; `None` when it is not supported.
fn tables(peft_type: &str) -> Option<&'static [Table]> {
    match peft_type {
        "LORA" => Some(&[COMMON, LAYERS, LORA]),
        "IA3" => Some(&[COMMON, IA3]),
        "HIRA" => Some(&[COMMON, LAYERS, HIRA]),
        "FLORA" => Some(&[COMMON, LAYERS, FLORA]),
        _ => None,
    }
}

/// Refuses every option of `config` that would change the result and isn't supported, and the unknown ones that are set.
pub(super) fn check(path: &Path, peft_type: &str, config: &[(String, Json)]) -> Result<(), AdapterError> {
    let Some(tables) = tables(peft_type) else {
        return Err(AdapterError::UnknownPeftType { path: path.to_owned(), found: format!("`{peft_type}`") });
    };
    for (key, value) in config {
        let rule = tables.iter().copied().flatten().find(|(name, _)| name == key).map(|(_, rule)| *rule);
        let (path, key, shown) = (path.to_owned(), key.clone(), value.to_string());
        match rule {
            Some(Harmless | Supported) => {}
            Some(RefusedUnless(plain, reason)) if !is_plain(value, plain) => {
                return Err(AdapterError::UnsupportedOption { path, key, value: shown, reason });
            }
            None if !value.is_falsy() => return Err(AdapterError::UnknownOption { path, key, value: shown }),
            Some(RefusedUnless(..)) | None => {}
        }
    }
    Ok(())
}

fn is_plain(value: &Json, plain: &[Plain]) -> bool {
    // 0 is falsy in Python, but as a list of tokens or a count it may mean something.
    let unset = value.is_falsy() && !matches!(value, Json::Number(_));
    unset
        || plain.iter().any(|plain| match plain {
            Plain::True => *value == Json::Bool(true),
            Plain::Text(text) => value.as_str() == Some(text),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(peft_type: &str, key: &str, value: &str) -> Result<(), AdapterError> {
        let value = Json::parse(Path::new("value.json"), value.as_bytes()).expect("a JSON value");
        check(Path::new("c.json"), peft_type, &[(key.to_string(), value)])
    }

    #[test]
    fn every_refused_option_is_refused_by_name_and_its_plain_values_pass() {
        for peft_type in ["LORA", "IA3", "HIRA", "FLORA"] {
            let rows = tables(peft_type).into_iter().flatten().copied().flatten();
            for (key, rule) in rows {
                let RefusedUnless(plain, _) = rule else { continue };
                for value in [r#""something""#, "1", "0", r#"[["a", 1]]"#, r#"{"a": null}"#] {
                    let message = checked(peft_type, key, value).expect_err(key).to_string();
                    assert!(message.contains(&format!("`{key}`")) && message.contains("not supported"), "{message}");
                }
                for value in ["null", "false", "[]", "{}", r#""""#] {
                    assert!(checked(peft_type, key, value).is_ok(), "{key} = {value}");
                }
                for plain in *plain {
                    let value = match plain {
                        Plain::True => "true".to_string(),
                        Plain::Text(text) => format!("\"{text}\""),
                    };
                    assert!(checked(peft_type, key, &value).is_ok(), "{key} = {value}");
                }
            }
        }
    }

    #[test]
    fn initialisations_that_change_the_base_are_refused() {
        for name in ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "Gaussian?"] {
            assert!(checked("LORA", "init_lora_weights", &format!("\"{name}\"")).is_err(), "{name}");
        }
    }

    #[test]
    fn an_unknown_option_is_refused_only_when_it_is_set() {
        for value in ["null", "false", "[]", "{}"] {
            assert!(checked("IA3", "new_option", value).is_ok(), "{value}");
        }
        let message = checked("IA3", "new_option", "3").expect_err("set").to_string();
        assert!(message.contains("`new_option` = 3"), "{message}");
        assert!(checked("IA3", "use_dora", "true").is_err(), "another kind's option");
    }
}
