//! `--lora-modules`: adapters by name, as vLLM takes them, so that its command lines work here.

use std::path::PathBuf;

use serde::Deserialize;

/// One adapter and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoraModule {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// What a JSON object says of one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    path: PathBuf,
    /// The model that it was trained on, which there is only one of here.
    #[serde(default, rename = "base_model_name")]
    _base_model_name: Option<String>,
}

/// `NAME=PATH`, or the same as a JSON object.
pub(crate) fn parse(text: &str) -> Result<LoraModule, String> {
    let module = if text.trim_start().starts_with('{') {
        let Written { name, path, .. } = serde_json::from_str(text).map_err(|error| format!("{error}"))?;
        LoraModule { name, path }
    } else {
        let (name, path) = text.split_once('=').ok_or("it must be NAME=PATH, or {\"name\": …, \"path\": …}")?;
        LoraModule { name: name.to_owned(), path: path.into() }
    };
    if module.name.is_empty() || module.path.as_os_str().is_empty() {
        return Err("neither name nor path may be empty".to_owned());
    }
    Ok(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_vllm_are_read() {
        let right = LoraModule { name: "sql".to_owned(), path: "a/b=c".into() };
        assert_eq!(parse("sql=a/b=c"), Ok(right.clone()));
        assert_eq!(parse(r#"{"name": "sql", "path": "a/b=c", "base_model_name": "base"}"#), Ok(right));
        for wrong in [
            "sql",
            "=a",
            "sql=",
            r#"{"name": "sql"}"#,
            r#"{"name": "", "path": "a"}"#,
            r#"{"name": "s", "path": "a", "rank": 8}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
