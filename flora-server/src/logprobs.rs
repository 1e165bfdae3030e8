//! Log-probabilities as both endpoints write them.

use flora_engine::ScoredToken;
use serde_json::{Map, Value, json};

use crate::text::Text;

/// What stands for minus infinity, which JSON can't hold; vLLM has the same.
const LEAST: f32 = -9999.0;

/// A token of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Scored {
    token: Spelled,
    /// Of the token itself and of the likeliest in its place; none for the first of a prompt, which nothing comes before.
    score: Option<(f32, Vec<(Spelled, f32)>)>,
}

/// What one token says by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Spelled(Vec<u8>);

impl Spelled {
    /// As text; bytes that are none are written as OpenAI writes them, so that no two of them look the same.
    fn text(&self) -> String {
        match std::str::from_utf8(&self.0) {
            Ok(text) => text.to_owned(),
            Err(_) => {
                let bytes = self.0.iter().map(|byte| format!("\\x{byte:02x}"));
                bytes.fold("bytes:".to_owned(), |text, byte| text + &byte)
            }
        }
    }
}

impl Scored {
    /// The first token of a prompt.
    pub(crate) fn first(token: u32, text: &Text) -> Self {
        Self { token: Spelled(text.spelled(token)), score: None }
    }

    pub(crate) fn new(scored: ScoredToken, text: &Text) -> Self {
        let ScoredToken { token, log_probability, likeliest } = scored;
        let spelled = |token| Spelled(text.spelled(token));
        let likeliest = likeliest.into_iter().map(|(token, probability)| (spelled(token), told(probability))).collect();
        Self { token: spelled(token), score: Some((told(log_probability), likeliest)) }
    }

    /// Characters of its text.
    pub(crate) fn characters(&self) -> usize {
        self.token.text().chars().count()
    }
}

fn told(log_probability: f32) -> f32 {
    log_probability.max(LEAST)
}

/// `logprobs` of a completion whose text has `offset` characters before these tokens.
pub(crate) fn of_completion(tokens: &[Scored], mut offset: usize) -> Value {
    let (mut texts, mut own, mut likeliest, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for scored in tokens {
        texts.push(scored.token.text());
        offsets.push(offset);
        offset += scored.characters();
        own.push(scored.score.as_ref().map(|(own, _)| *own));
        likeliest.push(scored.score.as_ref().map(|(own, others)| {
            let entries = others.iter().map(|(token, probability)| (token.text(), json!(probability)));
            // The token itself is always there.
            let mut all: Map<String, Value> = entries.collect();
            all.entry(scored.token.text()).or_insert_with(|| json!(own));
            all
        }));
    }
    json!({"tokens": texts, "token_logprobs": own, "top_logprobs": likeliest, "text_offset": offsets})
}

/// `logprobs` of a chat's answer.
pub(crate) fn of_chat(tokens: &[Scored]) -> Value {
    let entry = |token: &Spelled, probability: f32| {
        let text = String::from_utf8_lossy(&token.0);
        json!({"token": text, "logprob": probability, "bytes": token.0})
    };
    let content = tokens.iter().filter_map(|scored| {
        let (own, likeliest) = scored.score.as_ref()?;
        let mut written = entry(&scored.token, *own);
        written["top_logprobs"] = likeliest.iter().map(|(token, probability)| entry(token, *probability)).collect();
        Some(written)
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes() -> Text {
        Text::new(
            |_| Ok(Vec::new()),
            |_| Ok(Vec::new()),
            Vec::new(),
            |token| match token {
                256 => "<end>".into(),
                byte => vec![byte as u8],
            },
        )
    }

    #[test]
    fn both_endpoints_tell_the_same() {
        let text = bytes();
        let scored = ScoredToken {
            token: 0xc3,
            log_probability: f32::NEG_INFINITY,
            likeliest: vec![(256, -0.25), (97, f32::NEG_INFINITY)],
        };
        let tokens = [Scored::first(104, &text), Scored::new(scored, &text)];
        let expected = json!({
            "tokens": ["h", "bytes:\\xc3"], "token_logprobs": [null, -9999.0], "text_offset": [7, 8],
            "top_logprobs": [null, {"<end>": -0.25, "a": -9999.0, "bytes:\\xc3": -9999.0}],
        });
        assert_eq!(of_completion(&tokens, 7), expected);
        let likeliest = json!([
            {"token": "<end>", "logprob": -0.25, "bytes": [60, 101, 110, 100, 62]},
            {"token": "a", "logprob": -9999.0, "bytes": [97]},
        ]);
        let own = json!({"token": "\u{fffd}", "logprob": -9999.0, "bytes": [0xc3], "top_logprobs": likeliest});
        assert_eq!(of_chat(&tokens), json!({"content": [own], "refusal": null}));
    }
}
