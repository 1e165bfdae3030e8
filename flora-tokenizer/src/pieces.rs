//! How a text is cut into pieces before merges run within them. Files name the way (GGUF) or spell it out (`tokenizer.json`).

use serde::Deserialize;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizedString, PreTokenizer, SplitDelimiterBehavior};

/// Llama 3's pattern, from its `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's, which is also the one that [`ByteLevel`] brings along.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The longest pattern that is compiled, in bytes.
const PATTERN_LIMIT: usize = 4096;
/// The most steps.
const STEPS_LIMIT: usize = 16;

/// Steps that each cut the pieces of the step before; the last one turns bytes into the characters of the vocabulary.
#[derive(Clone, Debug)]
pub(crate) struct Pieces(Vec<PreTokenizerWrapper>);

/// One step, as `tokenizer.json` writes it.
#[derive(Deserialize)]
#[serde(tag = "type")]
pub(crate) enum Step {
    Sequence {
        pretokenizers: Vec<Step>,
    },
    Split {
        pattern: SplitPattern,
        behavior: SplitDelimiterBehavior,
        #[serde(default)]
        invert: bool,
    },
    Digits {
        #[serde(default)]
        individual_digits: bool,
    },
    ByteLevel {
        #[serde(default = "yes")]
        add_prefix_space: bool,
        #[serde(default = "yes")]
        use_regex: bool,
    },
}

fn yes() -> bool {
    true
}

impl Pieces {
    /// The way that GGUF's `tokenizer.ggml.pre` calls `name`, and whether it takes pieces that are tokens whole.
    pub(crate) fn named(name: &str) -> Result<(Self, bool), String> {
        let byte_level = |use_regex| Step::ByteLevel { add_prefix_space: false, use_regex };
        let split = |pattern: &str| Step::Split {
            pattern: SplitPattern::Regex(pattern.to_string()),
            behavior: SplitDelimiterBehavior::Isolated,
            invert: false,
        };
        let steps = match name {
            "gpt-2" => vec![byte_level(true)],
            "smollm" | "starcoder" | "refact" => vec![Step::Digits { individual_digits: true }, byte_level(true)],
            "llama-bpe" => vec![split(LLAMA3), byte_level(false)],
            // What llama.cpp does with a file whose converter did not know the model.
            "default" => vec![
                split(r"[\p{P}\$\+<=>\^~\|]+"),
                split(GPT2),
                split(r"\p{N}+"),
                split("[0-9][0-9][0-9]"),
                byte_level(false),
            ],
            _ => {
                return Err(format!(
                    "is `{name}`, a way to cut texts that is not known; known: default, gpt-2, llama-bpe, refact, smollm, starcoder. \
                     Use the model's folder with tokenizer.json instead"
                ));
            }
        };
        Ok((Self::of(steps)?, name == "llama-bpe"))
    }

    /// The way that `steps` spell out.
    pub(crate) fn of(steps: Vec<Step>) -> Result<Self, String> {
        let mut pieces = Vec::new();
        flatten(steps, &mut pieces)?;
        let is_byte_level = |step: &PreTokenizerWrapper| matches!(step, PreTokenizerWrapper::ByteLevel(_));
        match pieces.split_last() {
            Some((last, before)) if is_byte_level(last) && !before.iter().any(is_byte_level) => Ok(Self(pieces)),
            _ => Err("must end with one ByteLevel: only byte-level BPE is supported".to_string()),
        }
    }

    /// Cuts `text`.
    pub(crate) fn cut(&self, text: &mut PreTokenizedString) -> tokenizers::Result<()> {
        self.0.iter().try_for_each(|step| step.pre_tokenize(text))
    }
}

/// Puts `steps`, and those within them, behind `pieces`. The nesting is limited by who parsed them.
fn flatten(steps: Vec<Step>, pieces: &mut Vec<PreTokenizerWrapper>) -> Result<(), String> {
    for step in steps {
        if pieces.len() == STEPS_LIMIT {
            return Err(format!("has more than {STEPS_LIMIT} steps"));
        }
        match step {
            Step::Sequence { pretokenizers } => flatten(pretokenizers, pieces)?,
            Step::Split { pattern, behavior, invert } => {
                let (SplitPattern::String(text) | SplitPattern::Regex(text)) = &pattern;
                if text.is_empty() || text.len() > PATTERN_LIMIT {
                    return Err(format!("has a pattern of {} bytes; 1 to {PATTERN_LIMIT} are taken", text.len()));
                }
                let split = Split::new(pattern, behavior, invert);
                pieces.push(PreTokenizerWrapper::Split(split.map_err(|error| format!("has a bad pattern: {error}"))?));
            }
            Step::Digits { individual_digits } => {
                pieces.push(PreTokenizerWrapper::Digits(Digits::new(individual_digits)))
            }
            Step::ByteLevel { add_prefix_space: true, .. } => {
                return Err("has `add_prefix_space`, which would change texts and is not supported".to_string());
            }
            Step::ByteLevel { use_regex, .. } => {
                pieces.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, use_regex)));
            }
        }
    }
    Ok(())
}
