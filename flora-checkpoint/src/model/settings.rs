//! The entries that describe a model, read the same way from GGUF metadata and from `config.json`.

use super::ModelError;
use crate::gguf::{Gguf, MetadataValue};
use crate::json::Json;
use std::path::{Path, PathBuf};

/// The description of a model.
#[derive(Clone, Debug)]
pub(super) enum Settings {
    /// A GGUF file.
    Gguf {
        /// The file.
        gguf: Gguf,
        /// Its architecture, with which most of its keys begin.
        architecture: &'static str,
    },
    /// A `config.json`, or `null` for a safetensors file that has none beside it.
    Config {
        /// The file.
        path: PathBuf,
        /// Its content.
        json: Json,
    },
}

/// What an entry is called in either format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    /// Without the architecture that it begins with.
    gguf: &'static str,
    config: &'static str,
}

/// The entry `gguf` of a GGUF file, after its architecture, and `config` of a `config.json`.
pub(super) const fn key(gguf: &'static str, config: &'static str) -> Key {
    Key { gguf, config }
}

/// An entry that GGUF alone has.
pub(super) const fn in_gguf(gguf: &'static str) -> Key {
    Key { gguf, config: gguf }
}

/// One entry of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member {
    /// A group itself.
    Group,
    /// `null`
    Null,
    /// Anything else.
    Plain,
}

/// One entry, whichever format it was written in.
enum Value<'a> {
    Integer(u64),
    Real(f64),
    Flag(bool),
    Text(&'a str),
    Group(&'a [(String, Json)]),
    List(&'a [Json]),
    /// `null`, an array or a negative integer of GGUF's; no entry that is asked for is one.
    Other,
}

impl Settings {
    /// The file that the entries are in.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Settings::Gguf { gguf, .. } => gguf.path(),
            Settings::Config { path, .. } => path.clone(),
        }
    }

    /// What the entry `key` is called in this file.
    pub(super) fn name(&self, key: Key) -> String {
        match self {
            Settings::Gguf { architecture, .. } => format!("{architecture}.{}", key.gguf),
            Settings::Config { .. } => key.config.to_owned(),
        }
    }

    /// The error that the entry `key` has `problem`.
    pub(super) fn error(&self, key: &str, problem: impl Into<String>) -> ModelError {
        configuration(&self.path(), key, problem)
    }

    /// A whole number of at least 1.
    pub(super) fn count(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_count(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A whole number of at least 1, if the entry is there.
    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.optional_whole(key)? {
            Some(0) => Err(self.error(key, "is 0; it must be at least 1")),
            number => Ok(number),
        }
    }

    /// A whole number, 0 among them, if the entry is there.
    pub(super) fn optional_whole(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => match u32::try_from(number) {
                Ok(number) => Ok(Some(number as usize)),
                Err(_) => Err(self.error(key, "is too large")),
            },
            // A list would give every layer its own number, which no supported model has.
            Some(_) => Err(self.error(key, "is not a whole number")),
        }
    }

    /// A finite number, if the entry is there.
    pub(super) fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let number = match self.value(key) {
            None => return Ok(None),
            Some(Value::Integer(number)) => number as f64,
            Some(Value::Real(number)) => number,
            Some(_) => return Err(self.error(key, "is not a number")),
        };
        if number.is_finite() {
            Ok(Some(number))
        } else {
            Err(self.error(key, format!("is {number}; it must be finite")))
        }
    }

    /// A positive, finite number, if the entry is there.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f64>, ModelError> {
        match self.optional_number(key)? {
            Some(number) if number <= 0.0 => Err(self.error(key, format!("is {number}; it must be positive"))),
            number => Ok(number),
        }
    }

    /// A positive number that is finite and positive as f32 too.
    pub(super) fn positive_f32(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let Some(number) = self.optional_positive(key)? else { return Ok(None) };
        let rounded = number as f32;
        if rounded.is_finite() && rounded > 0.0 {
            return Ok(Some(rounded));
        }
        Err(self.error(key, format!("is {number}; it must be positive and finite in 32 bits")))
    }

    /// A truth value, if the entry is there.
    pub(super) fn optional_flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Flag(flag)) => Ok(Some(flag)),
            Some(_) => Err(self.error(key, "is neither true nor false")),
        }
    }

    /// A text, if the entry is there.
    pub(super) fn optional_text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(key, "is not a text")),
        }
    }

    /// The entries of a group, if it is there.
    pub(super) fn optional_group(&self, key: &str) -> Result<Option<Vec<(&str, Member)>>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Group(members)) => {
                let kind = |value: &Json| match value {
                    Json::Object(_) => Member::Group,
                    Json::Null => Member::Null,
                    _ => Member::Plain,
                };
                Ok(Some(members.iter().map(|(name, value)| (&name[..], kind(value))).collect()))
            }
            Some(_) => Err(self.error(key, "is not an object")),
        }
    }

    /// A list of texts, if the entry is there.
    pub(super) fn optional_texts(&self, key: &str) -> Result<Option<Vec<&str>>, ModelError> {
        let wrong = || self.error(key, "is not a list of texts");
        match self.value(key) {
            None => Ok(None),
            Some(Value::List(items)) => {
                items.iter().map(|item| item.as_str().ok_or_else(wrong)).collect::<Result<_, _>>().map(Some)
            }
            Some(_) => Err(wrong()),
        }
    }

    /// Whether a config has the entry, be it `null`: some defaults are for what isn't written at all.
    pub(super) fn is_written(&self, key: &str) -> bool {
        match self {
            Settings::Gguf { gguf, .. } => gguf.metadata().contains_key(key),
            Settings::Config { json, .. } => json.get(key).is_some(),
        }
    }

    /// The entry `key`, where `a.b` is the entry `b` of the object `a` of a config; `null` is no entry.
    fn value(&self, key: &str) -> Option<Value<'_>> {
        match self {
            Settings::Gguf { gguf, .. } => gguf.metadata().get(key).map(Value::of_metadata),
            Settings::Config { json, .. } => match key.split('.').try_fold(json, Json::get)? {
                Json::Null => None,
                value => Some(Value::of_json(value)),
            },
        }
    }
}

/// The error that the entry `key` of the file at `path` has `problem`.
pub(super) fn configuration(path: &Path, key: &str, problem: impl Into<String>) -> ModelError {
    ModelError::Configuration { path: path.to_owned(), key: key.to_string(), problem: problem.into() }
}

impl<'a> Value<'a> {
    fn of_metadata(value: &'a MetadataValue) -> Self {
        match value {
            MetadataValue::Bool(flag) => Value::Flag(*flag),
            MetadataValue::String(text) => Value::Text(text),
            MetadataValue::F32(number) => Value::Real((*number).into()),
            MetadataValue::F64(number) => Value::Real(*number),
            other => other.as_u64().map_or(Value::Other, Value::Integer),
        }
    }

    fn of_json(value: &'a Json) -> Self {
        match value {
            Json::Bool(flag) => Value::Flag(*flag),
            Json::String(text) => Value::Text(text),
            Json::Number(number) => match (number.as_u64(), number.as_f64()) {
                (Some(number), _) => Value::Integer(number),
                (None, Some(number)) => Value::Real(number),
                (None, None) => Value::Other,
            },
            Json::Object(members) => Value::Group(members),
            Json::Array(items) => Value::List(items),
            Json::Null => Value::Other,
        }
    }
}
