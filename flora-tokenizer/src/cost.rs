//! What the parts of a `tokenizer.json` may cost, checked before the library makes them: its steps run over every text, its
//! patterns are compiled, and what it puts in the place of a character makes texts longer.

use serde_json::Value;

/// The most steps of a part; the longest known has 12.
const STEPS_LIMIT: usize = 64;
/// The longest pattern or text in a step, in bytes.
const STRING_LIMIT: usize = 4096;
/// The longest table of characters of a SentencePiece model, in bytes; the largest known has 320,000 in base64.
const TABLE_LIMIT: usize = 4 << 20;
/// How many times longer replacements may make a text.
const GROWTH_LIMIT: usize = 16;
/// The longest word that WordPiece takes apart, in characters; its work is the square of that.
const WORD_LIMIT: u64 = 1000;

/// What is wrong with `part`, one of a file's `normalizer`, `pre_tokenizer`, `post_processor` and `decoder`.
pub(crate) fn fault(part: &Value) -> Option<String> {
    let mut count = Count { steps: 0, growth: 1 };
    count.walk(None, part).err()
}

/// What is wrong with a model's word limit.
pub(crate) fn word_fault(characters: u64) -> Option<String> {
    (characters > WORD_LIMIT)
        .then(|| format!("takes words of {characters} characters apart; at most {WORD_LIMIT} are taken"))
}

struct Count {
    steps: usize,
    growth: usize,
}

impl Count {
    fn walk(&mut self, key: Option<&str>, value: &Value) -> Result<(), String> {
        match value {
            Value::String(text) => {
                let limit = if key == Some("precompiled_charsmap") { TABLE_LIMIT } else { STRING_LIMIT };
                if text.len() > limit {
                    return Err(format!("has a text of {} bytes; at most {limit} are taken", text.len()));
                }
                Ok(())
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.walk(None, item)),
            Value::Object(fields) => {
                if fields.contains_key("type") {
                    self.steps += 1;
                }
                if self.steps > STEPS_LIMIT {
                    return Err(format!("has more than {STEPS_LIMIT} steps"));
                }
                if let (Some(pattern), Some(Value::String(content))) = (fields.get("pattern"), fields.get("content")) {
                    self.grow(pattern, content)?;
                }
                fields.iter().try_for_each(|(key, item)| self.walk(Some(key), item))
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
        }
    }

    /// A replacement: a pattern finds one byte at least.
    fn grow(&mut self, pattern: &Value, content: &str) -> Result<(), String> {
        let found = pattern.get("String").and_then(Value::as_str).map_or(1, |text| text.len().max(1));
        self.growth = self.growth.saturating_mul(content.len().div_ceil(found).max(1));
        match self.growth > GROWTH_LIMIT {
            true => Err(format!("makes texts {} times longer; at most {GROWTH_LIMIT} times is taken", self.growth)),
            false => Ok(()),
        }
    }
}
