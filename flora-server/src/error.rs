//! What a client is told when it gets no answer: a status, and OpenAI's JSON of an error.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flora_engine::{AdapterFailure, RequestError};
use serde::Serialize;

use crate::updates::UpdateError;

/// The most characters of what a client sent that are said back to it.
const QUOTED: usize = 200;

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("a body must be `Content-Type: application/json`")]
    MediaType,
    #[error("the body is larger than the {limit} bytes that are taken")]
    TooLarge { limit: usize },
    #[error("the body did not come within {} seconds", .0.as_secs_f64())]
    Slow(Duration),
    #[error("the body can't be read to its end")]
    Cut,
    #[error("the body isn't JSON that is taken here: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{message}")]
    Invalid { param: Option<String>, message: String },
    #[error("the prompt has {tokens} tokens, more than the {limit} that are taken")]
    LongPrompt { tokens: usize, limit: usize },
    #[error("an API key is needed: send `Authorization: Bearer KEY`")]
    NoKey,
    #[error("the API key is wrong")]
    WrongKey,
    #[error("there is nothing at this path")]
    UnknownPath,
    #[error("this path doesn't take this method")]
    Method,
    #[error("the model `{0}` does not exist")]
    UnknownModel(String),
    #[error("{param}: there is no adapter `{name}`")]
    UnknownAdapter { param: String, name: String },
    #[error(transparent)]
    Engine(RequestError),
    #[error(transparent)]
    Update(#[from] UpdateError),
    #[error("the answer wasn't whole within the {} seconds that a request may take; ask for less", .0.as_secs_f64())]
    TimedOut(Duration),
    #[error("all connections that the server takes are in use; try again later")]
    NoPlace,
    #[error("too many grammars are compiled at the moment; try again later")]
    GrammarsBusy,
    #[error("the server failed at this request")]
    Broken,
}

impl ApiError {
    /// A field that is wrong, and what is wrong with it.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.to_owned()), message: message.into() }
    }

    /// The status of an answer that consists of this error.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Cut | Self::Json(_) | Self::Invalid { .. } | Self::LongPrompt { .. } => StatusCode::BAD_REQUEST,
            Self::NoKey | Self::WrongKey => StatusCode::UNAUTHORIZED,
            Self::UnknownPath | Self::UnknownModel(_) | Self::UnknownAdapter { .. } => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Engine(RequestError::Invalid(_)) => StatusCode::BAD_REQUEST,
            Self::Engine(RequestError::QueueFull { .. }) => StatusCode::TOO_MANY_REQUESTS,
            Self::Engine(RequestError::Adapter(AdapterFailure::Unknown(_))) => StatusCode::NOT_FOUND,
            Self::Engine(RequestError::Adapter(AdapterFailure::Unusable { .. })) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::NoPlace | Self::GrammarsBusy | Self::Engine(RequestError::ShuttingDown) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Engine(RequestError::Model(_)) | Self::Broken => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Update(UpdateError::Exists(_)) => StatusCode::BAD_REQUEST,
            Self::Update(UpdateError::Unknown(_)) => StatusCode::NOT_FOUND,
            Self::Update(UpdateError::Unusable { .. }) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::TimedOut(_) => StatusCode::GATEWAY_TIMEOUT,
        }
    }

    /// Whether it may be said before the body was read. The connection can't be used again then, because the next request would
    /// have to be told from the rest of this one, and a client that keeps connections has to know.
    fn is_before_body(&self) -> bool {
        match self {
            Self::MediaType
            | Self::TooLarge { .. }
            | Self::Slow(_)
            | Self::Cut
            | Self::NoKey
            | Self::WrongKey
            | Self::UnknownPath
            | Self::Method
            | Self::NoPlace => true,
            Self::Json(_)
            | Self::Invalid { .. }
            | Self::LongPrompt { .. }
            | Self::UnknownModel(_)
            | Self::UnknownAdapter { .. }
            | Self::Engine(_)
            | Self::Update(_)
            | Self::TimedOut(_)
            | Self::GrammarsBusy
            | Self::Broken => false,
        }
    }

    /// What programs tell errors apart by, where the status doesn't.
    fn code(&self) -> Option<&'static str> {
        match self {
            Self::LongPrompt { .. } => Some("context_length_exceeded"),
            Self::NoKey | Self::WrongKey => Some("invalid_api_key"),
            Self::UnknownModel(_)
            | Self::UnknownAdapter { .. }
            | Self::Engine(RequestError::Adapter(AdapterFailure::Unknown(_))) => Some("model_not_found"),
            Self::UnknownPath => Some("unknown_url"),
            Self::Engine(RequestError::Adapter(AdapterFailure::Unusable { .. })) => Some("adapter_unusable"),
            Self::Engine(RequestError::QueueFull { .. }) => Some("queue_full"),
            Self::Engine(RequestError::ShuttingDown) => Some("shutting_down"),
            Self::NoPlace => Some("too_many_connections"),
            Self::GrammarsBusy => Some("too_many_grammars"),
            Self::Update(UpdateError::Exists(_)) => Some("adapter_exists"),
            Self::Update(UpdateError::Unknown(_)) => Some("model_not_found"),
            Self::Update(UpdateError::Unusable { .. }) => Some("adapter_unusable"),
            Self::TimedOut(_) => Some("timeout"),
            _ => None,
        }
    }

    /// The field of the request that is at fault, where it is one.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } => param.as_deref(),
            Self::UnknownAdapter { param, .. } => Some(param),
            Self::LongPrompt { .. } => Some("prompt"),
            Self::UnknownModel(_) | Self::Engine(RequestError::Adapter(_)) => Some("model"),
            Self::Update(_) => Some("lora_name"),
            _ => None,
        }
    }

    /// The error in OpenAI's form.
    pub(crate) fn body(&self) -> ErrorBody {
        let kind = match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let message = match self {
            // A client could have the whole of a long name back otherwise.
            Self::Engine(RequestError::Adapter(AdapterFailure::Unknown(name))) => {
                Self::UnknownModel(name.clone()).to_string()
            }
            error => error.to_string(),
        };
        let error = ErrorFields {
            message: shorten(message),
            kind,
            param: self.param().map(|param| shorten(param.to_owned())),
            code: self.code(),
        };
        ErrorBody { error }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        Self::Engine(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.is_before_body() {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        match &self {
            Self::NoKey | Self::WrongKey => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::NoPlace
            | Self::GrammarsBusy
            | Self::Engine(RequestError::QueueFull { .. } | RequestError::ShuttingDown) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        response
    }
}

/// `{"error": …}`.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorBody {
    error: ErrorFields,
}

#[derive(Debug, Serialize)]
struct ErrorFields {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

/// `text` as far as it is said back.
fn shorten(text: String) -> String {
    match text.char_indices().nth(QUOTED * 2) {
        Some(_) => {
            // The words around what was sent stand at either end.
            let head: String = text.chars().take(QUOTED).collect();
            let skipped = text.chars().count() - QUOTED;
            let tail: String = text.chars().skip(skipped).collect();
            format!("{head} … {tail}")
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_client_sent_is_said_back_in_part() {
        let error = ApiError::UnknownModel("ä".repeat(10_000));
        let message = error.body().error.message;
        assert!(message.starts_with("the model `ä") && message.ends_with("` does not exist"), "{message}");
        assert!(message.chars().count() < 500);
    }

    #[test]
    fn what_the_engine_answers_has_its_status() {
        let unusable = AdapterFailure::Unusable { name: "a".to_owned(), reason: "it is empty".to_owned() };
        for (error, status, code) in [
            (RequestError::Invalid("no".to_owned()), 400, None),
            (RequestError::QueueFull { waiting: 3 }, 429, Some("queue_full")),
            (AdapterFailure::Unknown("a".to_owned()).into(), 404, Some("model_not_found")),
            (unusable.into(), 422, Some("adapter_unusable")),
            (RequestError::Model("NaN".to_owned()), 500, None),
            (RequestError::ShuttingDown, 503, Some("shutting_down")),
        ] {
            let error = ApiError::from(error);
            assert_eq!((error.status().as_u16(), error.code()), (status, code), "{error}");
            let retried = error.into_response().headers().contains_key(header::RETRY_AFTER);
            assert_eq!(retried, matches!(status, 429 | 503));
        }
    }
}
