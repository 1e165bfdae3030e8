//! What a client asks of `/v1/completions`.

use serde::Deserialize;
use serde_json::Value;

use crate::adapters::SpanField;
use crate::body::fields;
use crate::error::ApiError;
use crate::fields::check_completions;
use crate::parameters::{MostTokens, alternatives};

/// What is generated where a request doesn't say, as OpenAI has it.
const MAX_TOKENS: MostTokens = MostTokens::Count(16);

/// Texts to go on with.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Completions {
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    /// Parts of the prompt, which is one then.
    pub(crate) spans: Vec<SpanField>,
    pub(crate) length: Length,
    /// Alternatives of each token whose log-probability is told.
    pub(crate) logprobs: Option<u32>,
}

/// What is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// What is generated.
    Text(MostTokens),
    /// The prompt, and what is generated after it.
    EchoAndText(MostTokens),
    /// The prompt.
    Echo,
}

/// One text to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
struct Fields {
    prompt: Prompts,
    max_tokens: Option<i64>,
    echo: Option<bool>,
    logprobs: Option<Logprobs>,
}

/// A number; `false`, as chats have it, is none.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number of alternatives")]
enum Logprobs {
    Count(i64),
    Flag(bool),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string, or an array of strings, of tokens, or of arrays of tokens")]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenArrays(Vec<Vec<u32>>),
}

impl Completions {
    /// What `body` asks.
    pub(crate) fn parse(body: &Value) -> Result<Self, ApiError> {
        check_completions(body)?;
        let fields: Fields = fields(body)?;
        let prompts = match fields.prompt {
            Prompts::Text(text) => vec![Prompt::Text(text)],
            Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Prompts::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Prompts::TokenArrays(arrays) => arrays.into_iter().map(Prompt::Tokens).collect(),
        };
        if prompts.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt is an empty array"));
        }
        let spans = SpanField::parse(&body["adapter_spans"])?;
        if !spans.is_empty() && prompts.len() > 1 {
            let message = "adapter_spans needs a single prompt; ask for each prompt by itself";
            return Err(ApiError::invalid("adapter_spans", message));
        }
        let logprobs = match fields.logprobs {
            None | Some(Logprobs::Flag(false)) => None,
            Some(Logprobs::Flag(true)) => {
                return Err(ApiError::invalid("logprobs", "logprobs is a number of alternatives here, not true"));
            }
            Some(Logprobs::Count(count)) => Some(alternatives("logprobs", count)?),
        };
        let most = |value| Ok::<_, ApiError>(MostTokens::parse("max_tokens", value)?.unwrap_or(MAX_TOKENS));
        let length = match (fields.echo.unwrap_or(false), fields.max_tokens) {
            (true, Some(0)) => Length::Echo,
            (true, value) => Length::EchoAndText(most(value)?),
            (false, value) => Length::Text(most(value)?),
        };
        Ok(Self { prompts, spans, length, logprobs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_has_four_forms() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1, 2], [3]]), vec![Prompt::Tokens(vec![1, 2]), Prompt::Tokens(vec![3])]),
        ] {
            let parsed = Completions::parse(&json!({"prompt": prompt})).unwrap();
            let length = Length::Text(MostTokens::Count(16));
            assert_eq!(parsed, Completions { prompts: expected, spans: Vec::new(), length, logprobs: None });
        }
        for prompt in [json!(null), json!(1), json!([]), json!(["a", 1]), json!([-1]), json!([1.5]), json!({"a": 1})] {
            let error = Completions::parse(&json!({"prompt": prompt})).unwrap_err();
            assert!(matches!(&error, ApiError::Invalid { param: Some(param), .. } if param == "prompt"), "{error:?}");
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused() {
        for (field, harmless, matters) in [
            ("logprobs", json!(false), json!(true)),
            ("logprobs", json!(20), json!(21)),
            ("max_tokens", json!(-1), json!(-2)),
            ("best_of", json!(1), json!(2)),
            ("suffix", json!(""), json!("end")),
            ("max_tokens", json!(1), json!(0)),
        ] {
            assert!(Completions::parse(&json!({"prompt": "a", field: harmless})).is_ok(), "{field}");
            let error = Completions::parse(&json!({"prompt": "a", field: matters})).unwrap_err();
            assert!(matches!(&error, ApiError::Invalid { param: Some(param), .. } if param == field), "{error:?}");
        }
    }

    #[test]
    fn a_prompt_may_be_given_back() {
        let length = |fields: Value| {
            let mut body = json!({"prompt": "a"});
            body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            Completions::parse(&body).map(|completions| completions.length)
        };
        assert_eq!(length(json!({"echo": true, "max_tokens": 0})).unwrap(), Length::Echo);
        assert_eq!(length(json!({"echo": true})).unwrap(), Length::EchoAndText(MostTokens::Count(16)));
        assert_eq!(length(json!({"echo": false, "max_tokens": -1})).unwrap(), Length::Text(MostTokens::Context));
        assert!(length(json!({"max_tokens": 0})).is_err());
        assert!(length(json!({"echo": "yes"})).is_err());
    }
}
