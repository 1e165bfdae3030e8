//! Reads the body of a request: within its limits of size, time and depth, or not at all.

use axum::body::HttpBody;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::options::Limits;

/// The JSON object that `request` brings.
///
/// As a value first, and not as a type at once: serde_json then holds every part of it to its depth of 128, fields that are
/// not known here included.
pub(crate) async fn object(request: Request, limits: &Limits) -> Result<Value, ApiError> {
    // A web page may send anything else to another site without asking it first.
    if !is_json(request.headers()) {
        return Err(ApiError::MediaType);
    }
    let limit = limits.body_bytes;
    let body = request.into_body();
    // One that says so beforehand isn't read at all.
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::TooLarge { limit });
    }
    let body = Limited::new(body, limit);
    let bytes = match tokio::time::timeout(limits.body_timeout, body.collect()).await {
        Ok(Ok(collected)) => collected.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(ApiError::TooLarge { limit }),
        Ok(Err(_)) => return Err(ApiError::Cut),
        Err(_) => return Err(ApiError::Slow(limits.body_timeout)),
    };
    match serde_json::from_slice(&bytes)? {
        value @ Value::Object(_) => Ok(value),
        _ => Err(ApiError::Invalid { param: None, message: "the body must be a JSON object".to_owned() }),
    }
}

/// What is wanted of a body; the error names the field that is wrong.
pub(crate) fn fields<'a, T: Deserialize<'a>>(body: &'a Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(body).map_err(|error| {
        let (path, inner) = (error.path().to_string(), error.inner());
        // What serde calls the whole.
        if path == "." {
            ApiError::Invalid { param: None, message: inner.to_string() }
        } else {
            ApiError::Invalid { message: format!("{path}: {inner}"), param: Some(path) }
        }
    })
}

/// A `T` that is written as a JSON object. A struct alone would be taken from an array of its fields too.
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = Map::deserialize(deserializer)?;
        T::deserialize(Value::Object(map)).map(Self).map_err(serde::de::Error::custom)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split_once(';').map_or(value, |(essence, _parameters)| essence);
    essence.trim().eq_ignore_ascii_case("application/json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn read(body: impl Into<Body>) -> Result<Value, ApiError> {
        let request = Request::builder().header("content-type", "application/json; charset=utf-8");
        let limits = Limits { body_bytes: 1 << 20, ..Limits::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(object(request.body(body.into()).unwrap(), &limits))
    }

    #[test]
    fn a_body_is_an_object_of_bounded_size_and_depth() {
        assert!(read(r#"{"a": 1}"#).is_ok());
        let deep = |depth: usize| format!(r#"{{"unknown": {}1{}}}"#, "[".repeat(depth), "]".repeat(depth));
        assert!(read(deep(100)).is_ok());
        for body in [deep(100_000), "[".repeat(100_000), "{\"a\":".repeat(100_000), String::new(), "1".to_owned()] {
            let error = read(body).unwrap_err();
            assert_eq!(error.status(), 400, "{error}");
        }
        assert!(matches!(read(vec![b' '; (1 << 20) + 1]), Err(ApiError::TooLarge { .. })));
        assert!(matches!(read(&b"{\"a\": \"\xff\"}"[..]), Err(ApiError::Json(_))));
    }

    #[test]
    fn a_wrong_field_is_named() {
        #[derive(Debug, Deserialize)]
        struct Fields {
            #[allow(dead_code, reason = "only parsed")]
            a: Vec<u32>,
        }
        let body = serde_json::json!({"a": [1, "x"]});
        let Err(ApiError::Invalid { param, message }) = fields::<Fields>(&body) else { panic!("it was taken") };
        assert_eq!(param.as_deref(), Some("a[1]"));
        assert!(message.contains("invalid type"), "{message}");
    }

    #[test]
    fn only_json_is_read() {
        let mut headers = HeaderMap::new();
        assert!(!is_json(&headers));
        for (value, expected) in [
            ("application/json", true),
            ("Application/JSON ; charset=utf-8", true),
            ("text/plain", false),
            ("application/jsonp", false),
            ("application/x-www-form-urlencoded", false),
        ] {
            headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
            assert_eq!(is_json(&headers), expected, "{value}");
        }
    }
}
