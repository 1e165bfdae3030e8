//! `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: how the model reads a text or a chat, what tokens say, and
//! what a client has to know that counts tokens without files of the model's.

use std::sync::Arc;

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::{App, blocking};
use crate::body::{self, fields};
use crate::chat::Chat;
use crate::error::ApiError;
use crate::fields::{check_detokenize, check_tokenize};

#[derive(Deserialize)]
struct Tokenize {
    model: Option<String>,
    prompt: Option<String>,
    add_special_tokens: Option<bool>,
    return_token_strs: Option<bool>,
}

#[derive(Deserialize)]
struct Detokenize {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The tokens of a prompt, or of a chat as its template writes it.
pub(crate) async fn tokenize(app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    let body = body::object(request, &app.options().limits).await?;
    blocking(move || {
        check_tokenize(&body)?;
        let asked: Tokenize = fields(&body)?;
        let reader = app.text().reader(known(&app, asked.model.as_deref())?)?;
        let tokens = match asked.prompt {
            Some(text) => {
                let text = match asked.add_special_tokens.unwrap_or(true) {
                    true => reader.prompt(&text),
                    false => reader.plain(&text),
                };
                text.map_err(|error| ApiError::invalid("prompt", error))?
            }
            None if body["messages"].is_null() => {
                return Err(ApiError::invalid("prompt", "prompt is missing, and so is messages"));
            }
            None => {
                let conversation = Chat::conversation(&body)?;
                reader.chat(&conversation).map_err(|error| ApiError::invalid("messages", error))?
            }
        };
        let spelled = |token: &u32| String::from_utf8_lossy(&app.text().spelled(*token)).into_owned();
        let texts = asked.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(spelled).collect::<Vec<_>>());
        let most = app.engine().limits().most_tokens();
        Ok(Json(json!({"count": tokens.len(), "max_model_len": most, "tokens": tokens, "token_strs": texts})))
    })
    .await
    .map(IntoResponse::into_response)
}

/// The text of tokens, control tokens by their names.
pub(crate) async fn detokenize(app: Arc<App>, request: Request) -> Result<Response, ApiError> {
    let body = body::object(request, &app.options().limits).await?;
    blocking(move || {
        check_detokenize(&body)?;
        let asked: Detokenize = fields(&body)?;
        known(&app, asked.model.as_deref())?;
        Ok(Json(json!({"prompt": app.text().written(&asked.tokens)})))
    })
    .await
    .map(IntoResponse::into_response)
}

/// The model's control tokens by their names in the files of tokenizers, and its chat template.
pub(crate) fn information(app: &App) -> Json<Value> {
    let mut told = json!({
        "bos_token": null, "eos_token": null, "chat_template": app.text().template(),
        "model_max_length": app.engine().limits().most_tokens(),
    });
    for (name, text) in app.text().special_texts() {
        told[name] = json!(text);
    }
    Json(told)
}

/// The adapter that `model` names, which has to be there; none for the base model, and where none is named.
fn known<'a>(app: &App, model: Option<&'a str>) -> Result<Option<&'a str>, ApiError> {
    let Some(adapter) = model.map(|model| app.adapter(model)).transpose()?.flatten() else { return Ok(None) };
    match app.engine().adapters().iter().any(|name| name == adapter) {
        true => Ok(Some(adapter)),
        false => Err(ApiError::UnknownModel(adapter.to_owned())),
    }
}

/// Bodies of both are small objects; what they may hold is in the tables of fields.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_known_or_refused() {
        let param = |result: Result<(), ApiError>| match result {
            Ok(()) => None,
            Err(ApiError::Invalid { param, .. }) => param,
            Err(error) => panic!("{error}"),
        };
        let body: Value = json!({"model": "m", "prompt": "a", "add_special_tokens": false, "return_token_strs": true});
        assert_eq!(param(check_tokenize(&body)), None);
        assert_eq!(param(check_tokenize(&json!({"prompt": "a", "max_tokens": 3}))).as_deref(), Some("max_tokens"));
        assert_eq!(param(check_tokenize(&json!({"messages": [{"weight": 1}]}))).as_deref(), Some("messages[0].weight"));
        assert_eq!(param(check_detokenize(&json!({"tokens": [1], "skip": true}))).as_deref(), Some("skip"));
    }
}
