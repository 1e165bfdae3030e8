//! What a request is answered with: the JSON of both endpoints, whole or in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use flora_engine::{FinishReason, Usage};
use serde_json::{Value, json};

use crate::logprobs::{Scored, of_chat, of_completion};

/// Which endpoint was asked; answers differ in form only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Completions,
    Chat,
}

/// The answer to one request: what all its chunks have in common.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    endpoint: Endpoint,
    id: String,
    created: u64,
    /// As the request named it.
    model: String,
}

/// One finished choice.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) reason: FinishReason,
    /// Where log-probabilities are told.
    pub(crate) tokens: Option<Vec<Scored>>,
}

impl Answer {
    pub(crate) fn new(endpoint: Endpoint, model: String) -> Self {
        let prefix = match endpoint {
            Endpoint::Completions => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        Self { endpoint, id: format!("{prefix}-{:032x}", fastrand::u128(..)), created: unix_seconds(), model }
    }

    /// All of it at once.
    pub(crate) fn whole(&self, choices: &[Choice], usage: Usage) -> Value {
        let choices = choices.iter().enumerate().map(|(index, Choice { text, reason, tokens })| {
            let (reason, logprobs) = (reason_name(*reason), self.logprobs(tokens.as_deref(), 0));
            match self.endpoint {
                Endpoint::Completions => {
                    json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
                }
                Endpoint::Chat => json!({
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": null},
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }),
            }
        });
        let object = match self.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion",
        };
        let mut answer = self.envelope(object, choices.collect());
        answer["usage"] = usage_json(usage);
        answer
    }

    /// The chunk that opens a choice, where the endpoint has one.
    pub(crate) fn opening(&self, index: usize) -> Option<Value> {
        match self.endpoint {
            Endpoint::Completions => None,
            Endpoint::Chat => {
                Some(self.delta(index, json!({"role": "assistant", "content": ""}), Value::Null, Value::Null))
            }
        }
    }

    /// A chunk with more text of a choice, whose tokens follow on `offset` characters where they are told.
    pub(crate) fn text(&self, index: usize, text: &str, tokens: Option<&[Scored]>, offset: usize) -> Value {
        let logprobs = self.logprobs(tokens, offset);
        match self.endpoint {
            Endpoint::Completions => self.piece(index, text, logprobs, Value::Null),
            Endpoint::Chat => self.delta(index, json!({"content": text}), logprobs, Value::Null),
        }
    }

    /// The chunk that closes a choice.
    pub(crate) fn closing(&self, index: usize, reason: FinishReason) -> Value {
        let reason = json!(reason_name(reason));
        match self.endpoint {
            Endpoint::Completions => self.piece(index, "", Value::Null, reason),
            Endpoint::Chat => self.delta(index, json!({}), Value::Null, reason),
        }
    }

    /// The chunk after those of all choices, for a client that asked for it.
    pub(crate) fn usage(&self, usage: Usage) -> Value {
        let mut chunk = self.chunk(Vec::new());
        chunk["usage"] = usage_json(usage);
        chunk
    }

    fn logprobs(&self, tokens: Option<&[Scored]>, offset: usize) -> Value {
        match (self.endpoint, tokens) {
            (_, None) => Value::Null,
            (Endpoint::Completions, Some(tokens)) => of_completion(tokens, offset),
            (Endpoint::Chat, Some(tokens)) => of_chat(tokens),
        }
    }

    fn piece(&self, index: usize, text: &str, logprobs: Value, reason: Value) -> Value {
        self.chunk(vec![json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})])
    }

    fn delta(&self, index: usize, delta: Value, logprobs: Value, reason: Value) -> Value {
        self.chunk(vec![json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})])
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let object = match self.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion.chunk",
        };
        self.envelope(object, choices)
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
        })
    }
}

/// The list of models: the base model, and every adapter as one whose parent it is.
pub(crate) fn models(base: &str, adapters: &[String], created: u64) -> Value {
    let mut data = vec![model(base, None, created)];
    data.extend(adapters.iter().map(|adapter| model(adapter, Some(base), created)));
    json!({"object": "list", "data": data})
}

/// One model; an adapter where it has a `base`.
pub(crate) fn model(id: &str, base: Option<&str>, created: u64) -> Value {
    json!({
        "id": id, "object": "model", "created": created, "owned_by": "flora",
        "root": base.unwrap_or(id), "parent": base,
    })
}

/// Now, as OpenAI writes times.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn usage_json(usage: Usage) -> Value {
    let Usage { prompt_tokens, completion_tokens } = usage;
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": u64::from(prompt_tokens) + u64::from(completion_tokens),
    })
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
