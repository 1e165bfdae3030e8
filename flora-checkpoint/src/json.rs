//! Strict JSON: keys keep the order of the file (PEFT's patterns match in that order) and may not repeat (of two values for
//! one key, readers disagree which holds).

use crate::error::FileError;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// A JSON value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(serde_json::Number),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Parses a whole document. The nesting is limited by serde_json (128), the size by the file's.
    pub(crate) fn parse(path: &Path, text: &[u8]) -> Result<Json, FileError> {
        serde_json::from_slice(text).map_err(|error| {
            let line = text.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
            let rest = line.get(error.column().saturating_sub(2)..).unwrap_or_default();
            let not_a_number = [&b"NaN"[..], b"Infinity", b"-Infinity"];
            let hint = if not_a_number.iter().any(|word| rest.windows(word.len()).take(2).any(|window| window == *word))
            {
                "; JSON has no NaN or Infinity, give a finite number"
            } else {
                ""
            };
            FileError::Json { path: path.to_owned(), problem: format!("{error}{hint}") }
        })
    }

    /// The value of `key`, if this is an object that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(members) => members.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The text, if this is a string.
    pub(crate) fn as_str(&self) -> Option<&str> {
        match self {
            Json::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether Python takes the value for false: null, false, 0, and anything empty.
    pub(crate) fn is_falsy(&self) -> bool {
        match self {
            Json::Null | Json::Bool(false) => true,
            Json::Bool(true) => false,
            Json::Number(number) => number.as_f64() == Some(0.0),
            Json::String(text) => text.is_empty(),
            Json::Array(items) => items.is_empty(),
            Json::Object(members) => members.is_empty(),
        }
    }
}

impl fmt::Display for Json {
    /// JSON again, cut after about 60 bytes so that a message stays readable.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Number(number) => write!(f, "{number}"),
            Json::String(text) => write!(f, "{:?}", text.chars().take(60).collect::<String>()),
            Json::Array(items) => match &items[..] {
                [] => f.write_str("[]"),
                [first, rest @ ..] => {
                    write!(f, "[{first}{}]", if rest.is_empty() { "" } else { ", …" })
                }
            },
            Json::Object(members) => match &members[..] {
                [] => f.write_str("{}"),
                [(key, _), rest @ ..] => {
                    let key: String = key.chars().take(60).collect();
                    write!(f, "{{{key:?}: …{}}}", if rest.is_empty() { "" } else { ", …" })
                }
            },
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        serde_json::Number::from_f64(value).map(Json::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Json, E> {
        Ok(Json::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = sequence.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut seen = HashSet::new();
        let mut members = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, Json>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("the key `{key}` is there twice; delete one")));
            }
            members.push((key, value));
        }
        Ok(Json::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Json, String> {
        Json::parse(Path::new("x.json"), text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_keep_their_order() {
        let Ok(Json::Object(members)) = parse(r#"{"b": 1, "a": [null, true, -2, 0.5], "c": {}}"#) else {
            panic!("valid JSON was refused")
        };
        assert_eq!(members.iter().map(|(key, _)| &key[..]).collect::<Vec<_>>(), ["b", "a", "c"]);
    }

    #[test]
    fn a_key_may_not_repeat_at_any_depth() {
        for text in [r#"{"r": 1, "r": 2}"#, r#"{"a": [{"r": 1, "r": 1}]}"#] {
            let message = parse(text).expect_err("a repeated key");
            assert!(message.contains("`r` is there twice"), "{message}");
        }
    }

    #[test]
    fn python_s_nan_is_explained() {
        for text in ["{\n  \"lora_alpha\": NaN\n}", r#"{"a": -Infinity}"#, r#"{"a": [Infinity]}"#] {
            let message = parse(text).expect_err("not JSON");
            assert!(message.contains("finite number"), "{message}");
        }
        assert!(!parse("{").expect_err("cut").contains("finite number"));
        assert!(parse(r#"{"a": 1e999}"#).is_err());
    }

    #[test]
    fn deep_nesting_is_an_error() {
        assert!(parse(&"[".repeat(100_000)).is_err());
    }
}
