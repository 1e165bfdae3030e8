//! The entries that describe a model, read the same way from GGUF metadata and from `config.json`.

use super::ModelError;
use crate::gguf::{Gguf, MetadataValue};
use crate::json::Json;
use std::path::{Path, PathBuf};

/// The description of a model.
#[derive(Clone, Debug)]
pub(super) enum Settings {
    /// A GGUF file.
    Gguf(Gguf),
    /// A `config.json`, or `null` for a safetensors file that has none beside it.
    Config {
        /// The file.
        path: PathBuf,
        /// Its content.
        json: Json,
    },
}

/// One entry, whichever format it was written in.
enum Value<'a> {
    Integer(u64),
    Real(f64),
    Flag(bool),
    Text(&'a str),
    Group,
    /// A list or a negative integer; no entry that is asked for is one.
    Other,
}

impl Settings {
    /// The file that the entries are in.
    pub(super) fn path(&self) -> PathBuf {
        match self {
            Settings::Gguf(gguf) => gguf.path(),
            Settings::Config { path, .. } => path.clone(),
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

    /// A positive, finite number, if the entry is there.
    pub(super) fn optional_positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let number = match self.value(key) {
            None => return Ok(None),
            Some(Value::Integer(number)) => number as f32,
            Some(Value::Real(number)) => number as f32,
            Some(_) => return Err(self.error(key, "is not a number")),
        };
        if number.is_finite() && number > 0.0 {
            Ok(Some(number))
        } else {
            Err(self.error(key, format!("is {number}; it must be positive and finite")))
        }
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

    /// Refuses an entry that is there and is no group of entries.
    pub(super) fn optional_group(&self, key: &str) -> Result<(), ModelError> {
        match self.value(key) {
            None | Some(Value::Group) => Ok(()),
            Some(_) => Err(self.error(key, "is not an object")),
        }
    }

    /// The entry `key`, where `a.b` is the entry `b` of the object `a` of a config; `null` is no entry.
    fn value(&self, key: &str) -> Option<Value<'_>> {
        match self {
            Settings::Gguf(gguf) => gguf.metadata().get(key).map(Value::of_metadata),
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
            Json::Object(_) => Value::Group,
            Json::Null | Json::Array(_) => Value::Other,
        }
    }
}
