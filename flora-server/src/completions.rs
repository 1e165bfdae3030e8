//! What a client asks of `/v1/completions`.

use serde::Deserialize;
use serde_json::Value;

use crate::body::fields;
use crate::error::ApiError;
use crate::fields::check_completions;
use crate::parameters::max_tokens;

/// What is generated where a request doesn't say, as OpenAI has it.
const MAX_TOKENS: u32 = 16;

/// Texts to go on with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Completions {
    /// At least one.
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) max_tokens: u32,
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
    max_tokens: Option<u32>,
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
        let max_tokens = max_tokens("max_tokens", fields.max_tokens)?.unwrap_or(MAX_TOKENS);
        Ok(Self { prompts, max_tokens })
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
            assert_eq!(parsed, Completions { prompts: expected, max_tokens: 16 });
        }
        for prompt in [json!(null), json!(1), json!([]), json!(["a", 1]), json!([-1]), json!([1.5]), json!({"a": 1})] {
            let error = Completions::parse(&json!({"prompt": prompt})).unwrap_err();
            assert!(matches!(&error, ApiError::Invalid { param: Some(param), .. } if param == "prompt"), "{error:?}");
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused() {
        for (field, harmless, matters) in [
            ("echo", json!(false), json!(true)),
            ("logprobs", json!(null), json!(0)),
            ("best_of", json!(1), json!(2)),
            ("suffix", json!(""), json!("end")),
            ("max_tokens", json!(1), json!(0)),
        ] {
            assert!(Completions::parse(&json!({"prompt": "a", field: harmless})).is_ok(), "{field}");
            let error = Completions::parse(&json!({"prompt": "a", field: matters})).unwrap_err();
            assert!(matches!(&error, ApiError::Invalid { param: Some(param), .. } if param == field), "{error:?}");
        }
    }
}
