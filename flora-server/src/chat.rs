//! What a client asks of `/v1/chat/completions`.

use serde::Deserialize;
use serde_json::Value;

use crate::body::{Object, fields};
use crate::error::ApiError;
use crate::parameters::{max_tokens, unsupported};

/// A conversation to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chat {
    /// At least one.
    pub(crate) messages: Vec<Message>,
    /// Where the request says so.
    pub(crate) max_tokens: Option<u32>,
}

/// What someone said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// The words.
    pub content: String,
}

/// Who said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever set the conversation up; OpenAI's newer models call it the developer.
    #[serde(alias = "developer")]
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

#[derive(Deserialize)]
struct Fields {
    messages: Vec<Object<MessageFields>>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
    tools: Option<Vec<Value>>,
    functions: Option<Vec<Value>>,
    response_format: Option<Object<ResponseFormat>>,
    modalities: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct MessageFields {
    role: Role,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a message's content as a string, or as parts of type `text`")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Part {
    Text { text: String },
}

#[derive(Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
}

impl Chat {
    /// What `body` asks.
    pub(crate) fn parse(body: &Value) -> Result<Self, ApiError> {
        let fields: Fields = fields(body)?;
        unsupported("logprobs", fields.logprobs.unwrap_or(false))?;
        unsupported("top_logprobs", fields.top_logprobs.is_some_and(|count| count != 0))?;
        unsupported("tools", fields.tools.is_some_and(|tools| !tools.is_empty()))?;
        unsupported("functions", fields.functions.is_some_and(|functions| !functions.is_empty()))?;
        unsupported("response_format", fields.response_format.is_some_and(|Object(format)| format.kind != "text"))?;
        unsupported("modalities", fields.modalities.is_some_and(|kinds| kinds.iter().any(|kind| kind != "text")))?;
        if fields.messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages is an empty array"));
        }
        let messages = fields.messages.into_iter().map(|Object(MessageFields { role, content })| {
            let content = match content {
                Content::Text(text) => text,
                Content::Parts(parts) => parts.into_iter().map(|Part::Text { text }| text).collect(),
            };
            Message { role, content }
        });
        // The older name, where both are there, yields.
        let max_tokens = match max_tokens("max_completion_tokens", fields.max_completion_tokens)? {
            None => max_tokens("max_tokens", fields.max_tokens)?,
            newer => newer,
        };
        Ok(Self { messages: messages.collect(), max_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn contents_are_strings_or_parts_of_text() {
        let body = json!({"messages": [
            {"role": "system", "content": "be kind"},
            {"role": "developer", "content": "be brief", "name": "d"},
            {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
            {"role": "assistant", "content": ""},
        ]});
        let messages = Chat::parse(&body).unwrap().messages;
        let said: Vec<_> = messages.iter().map(|message| (message.role, message.content.as_str())).collect();
        let expected =
            [(Role::System, "be kind"), (Role::System, "be brief"), (Role::User, "hello"), (Role::Assistant, "")];
        assert_eq!(said, expected);
    }

    #[test]
    fn other_messages_are_refused() {
        for messages in [
            json!(null),
            json!([]),
            json!("hello"),
            json!([["user", "hello"]]),
            json!([{"role": "user"}]),
            json!([{"content": "hello"}]),
            json!([{"role": "user", "content": null}]),
            json!([{"role": "tool", "content": "42"}]),
            json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ] {
            let error = Chat::parse(&json!({"messages": messages})).unwrap_err();
            let named = matches!(&error, ApiError::Invalid { param: Some(param), .. } if param.starts_with("messages"));
            assert!(named, "{error:?}");
        }
    }

    #[test]
    fn the_newer_name_of_max_tokens_goes_first() {
        let chat = |limits: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": "hello"}]});
            body.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
            Chat::parse(&body).map(|chat| chat.max_tokens)
        };
        assert_eq!(chat(json!({})).unwrap(), None);
        assert_eq!(chat(json!({"max_tokens": 5})).unwrap(), Some(5));
        assert_eq!(chat(json!({"max_tokens": 5, "max_completion_tokens": 3})).unwrap(), Some(3));
        assert!(chat(json!({"max_completion_tokens": 0})).is_err());
        for (field, value) in [
            ("logprobs", json!(true)),
            ("top_logprobs", json!(1)),
            ("tools", json!([{"type": "function"}])),
            ("response_format", json!({"type": "json_object"})),
            ("modalities", json!(["text", "audio"])),
        ] {
            assert!(chat(json!({field: value})).is_err(), "{field}");
        }
    }
}
