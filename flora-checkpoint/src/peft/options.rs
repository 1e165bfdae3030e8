//! The options of a config, and whether an adapter that sets them can be served: those that every config has, and those of the
//! description of its kind. The built-in descriptions know every field of PEFT 0.21's configs.

use super::AdapterError;
use super::description::{Choice, KindDescription, OptionRule, Refusal};
use crate::json::Json;
use std::path::Path;

/// The options that every config has and that are read.
const READ: [&str; 5] = ["peft_type", "target_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save"];

/// The options that every config has and that don't change the result.
pub(super) const HARMLESS: [&str; 6] =
    ["task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"];

/// The options that every config has.
pub(super) fn common<'a>() -> impl Iterator<Item = &'a str> {
    READ.into_iter().chain(HARMLESS)
}

/// What a kind says of an option.
enum Rule<'a> {
    Accepted,
    Refused { because: &'a str, unless: &'a [Choice] },
    Required { because: &'a str, unless: &'a [Choice] },
    Unknown,
}

fn rule<'a>(kind: &'a KindDescription, option: &str) -> Rule<'a> {
    if READ.contains(&option) || HARMLESS.contains(&option) || is_read(kind, option) {
        return Rule::Accepted;
    }
    match kind.options.get(option) {
        Some(OptionRule::Harmless | OptionRule::Read) => Rule::Accepted,
        Some(OptionRule::Refused(Refusal { because, unless })) => Rule::Refused { because, unless },
        Some(OptionRule::Required(Refusal { because, unless })) => Rule::Required { because, unless },
        None => Rule::Unknown,
    }
}

/// Whether a rank, a number, a choice or a list of modules comes from `option`.
pub(super) fn is_read(kind: &KindDescription, option: &str) -> bool {
    let is = |name: &String| name == option;
    kind.rank.as_ref().is_some_and(|rank| is(&rank.option) || rank.patterns.as_ref().is_some_and(is))
        || kind.layers.iter().any(|layer| {
            layer.when.contains_key(option)
                || layer.modules.as_ref().is_some_and(is)
                || layer.scalars.iter().any(|scalar| {
                    is(&scalar.option)
                        || scalar.patterns.as_ref().is_some_and(is)
                        || scalar.root.as_ref().is_some_and(is)
                })
        })
}

/// Refuses every option of `config` that would change the result and isn't supported, and the unknown ones that are set.
pub(super) fn check(path: &Path, kind: &KindDescription, config: &[(String, Json)]) -> Result<(), AdapterError> {
    for (key, value) in config {
        let (path, shown) = (path.to_owned(), value.to_string());
        match rule(kind, key) {
            Rule::Refused { because, unless } if !is_plain(value, unless) => {
                let (key, reason) = (key.clone(), because.to_owned());
                return Err(AdapterError::UnsupportedOption { path, key, value: shown, reason });
            }
            Rule::Required { because, unless } if !unless.iter().any(|choice| is_choice(value, choice)) => {
                let (key, reason) = (key.clone(), because.to_owned());
                return Err(AdapterError::UnsupportedOption { path, key, value: shown, reason });
            }
            Rule::Unknown if !value.is_falsy() => {
                return Err(AdapterError::UnknownOption { path, key: key.clone(), value: shown });
            }
            Rule::Accepted | Rule::Refused { .. } | Rule::Required { .. } | Rule::Unknown => {}
        }
    }
    // What is missing has PEFT's default, which may be another value than the one that is needed.
    for (key, rule) in &kind.options {
        let OptionRule::Required(Refusal { because, .. }) = rule else { continue };
        if config.iter().all(|(known, _)| known != key) {
            let (path, key, reason) = (path.to_owned(), key.clone(), because.clone());
            return Err(AdapterError::UnsupportedOption { path, key, value: "missing".to_owned(), reason });
        }
    }
    Ok(())
}

fn is_plain(value: &Json, plain: &[Choice]) -> bool {
    // 0 is falsy in Python, but as a list of tokens or a count it may mean something.
    let unset = value.is_falsy() && !matches!(value, Json::Number(_));
    unset || plain.iter().any(|plain| is_choice(value, plain))
}

/// Whether an option has the value of a choice.
pub(super) fn is_choice(value: &Json, choice: &Choice) -> bool {
    match choice {
        Choice::Flag(flag) => *value == Json::Bool(*flag),
        Choice::Word(word) => value.as_str() == Some(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peft::AdapterKinds;
    use crate::peft::description::OptionRule;

    fn checked(peft_type: &str, key: &str, value: &str) -> Result<(), AdapterError> {
        let value = Json::parse(Path::new("value.json"), value.as_bytes()).expect("a JSON value");
        let kinds = AdapterKinds::builtin();
        let kind = kinds.described(peft_type).expect("a kind");
        // Beside what the kind asks for.
        let required =
            kind.options.iter().filter(|(option, rule)| matches!(rule, OptionRule::Required(_)) && *option != key);
        let required = required.map(|(option, _)| (option.clone(), Json::Bool(true)));
        check(Path::new("c.json"), kind, &required.chain([(key.to_string(), value)]).collect::<Vec<_>>())
    }

    #[test]
    fn every_refused_option_is_refused_by_name_and_its_plain_values_pass() {
        let kinds = AdapterKinds::builtin();
        let mut refused = 0;
        for peft_type in kinds.peft_types() {
            let kind = kinds.described(peft_type).expect("a kind");
            for key in kind.options.keys().map(String::as_str).chain(common()) {
                let Rule::Refused { unless, .. } = rule(kind, key) else { continue };
                refused += 1;
                for value in [r#""something""#, "1", "0", r#"[["a", 1]]"#, r#"{"a": null}"#] {
                    let message = checked(peft_type, key, value).expect_err(key).to_string();
                    assert!(message.contains(&format!("`{key}`")) && message.contains("not supported"), "{message}");
                }
                for value in ["null", "false", "[]", "{}", r#""""#] {
                    assert!(checked(peft_type, key, value).is_ok(), "{key} = {value}");
                }
                for plain in unless {
                    let value = match plain {
                        Choice::Flag(flag) => flag.to_string(),
                        Choice::Word(text) => format!("\"{text}\""),
                    };
                    assert!(checked(peft_type, key, &value).is_ok(), "{key} = {value}");
                }
            }
        }
        // LoRA's are 10, AdaLoRA's 15.
        assert_eq!(refused, 29);
    }

    #[test]
    fn a_required_option_is_asked_for() {
        let kinds = AdapterKinds::builtin();
        for (peft_type, key) in [("VERA", "save_projection"), ("UNILORA", "save_indices")] {
            let kind = kinds.described(peft_type).expect("a kind");
            let missing = check(Path::new("c.json"), kind, &[]).expect_err(key).to_string();
            assert!(missing.contains(&format!("`{key}` = missing")), "{missing}");
            for value in ["false", "null", "1", "\"yes\""] {
                let message = checked(peft_type, key, value).expect_err(key).to_string();
                assert!(message.contains(&format!("`{key}`")) && message.contains("not supported"), "{message}");
            }
            assert!(checked(peft_type, key, "true").is_ok());
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
