//! How a text is cut into pieces before merges run within them: the ways that a GGUF file names.

use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

/// Llama 3's pattern, from its `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's, which takes digits one by one.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's of its byte-level vocabularies.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's, which is also the one that [`ByteLevel`] brings along.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// One step; the last one turns bytes into the characters of the vocabulary.
enum Step {
    Split(&'static str),
    Digits,
    Bytes,
    /// GPT-2's pattern, and bytes.
    Gpt2,
}

/// A way to cut texts.
struct Way {
    names: &'static [&'static str],
    steps: &'static [Step],
    /// Whether a piece that is a token is that token, whatever the merges say.
    whole_pieces_first: bool,
}

/// The ways by the names that llama.cpp's converter gives them.
const WAYS: &[Way] = &[
    Way { names: &["gpt-2"], steps: &[Step::Gpt2], whole_pieces_first: false },
    Way { names: &["smollm", "starcoder", "refact"], steps: &[Step::Digits, Step::Gpt2], whole_pieces_first: false },
    Way {
        names: &["llama-bpe", "llama3", "llama-v3"],
        steps: &[Step::Split(LLAMA3), Step::Bytes],
        whole_pieces_first: true,
    },
    Way { names: &["qwen2", "deepseek-r1-qwen"], steps: &[Step::Split(QWEN2), Step::Bytes], whole_pieces_first: false },
    Way { names: &["tekken"], steps: &[Step::Split(TEKKEN), Step::Bytes], whole_pieces_first: true },
    // What llama.cpp does with a file whose converter did not know the model.
    Way {
        names: &["default"],
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(GPT2),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
            Step::Bytes,
        ],
        whole_pieces_first: false,
    },
];

/// The way that GGUF's `tokenizer.ggml.pre` calls `name`, and whether it takes pieces that are tokens whole.
pub(crate) fn named(name: &str) -> Result<(PreTokenizerWrapper, bool), String> {
    let Some(way) = WAYS.iter().find(|way| way.names.contains(&name)) else {
        let mut known: Vec<&str> = WAYS.iter().flat_map(|way| way.names).copied().collect();
        known.sort_unstable();
        return Err(format!(
            "is `{name}`, a way to cut texts that is not known; known: {}. Use the model's folder with tokenizer.json instead",
            known.join(", ")
        ));
    };
    let steps = way.steps.iter().map(|step| match step {
        Step::Split(pattern) => {
            let pattern = SplitPattern::Regex((*pattern).to_string());
            Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map(PreTokenizerWrapper::Split)
                .map_err(|error| format!("has a bad pattern: {error}"))
        }
        Step::Digits => Ok(PreTokenizerWrapper::Digits(Digits::new(true))),
        Step::Bytes => Ok(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, false))),
        Step::Gpt2 => Ok(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, true))),
    });
    let steps = steps.collect::<Result<Vec<_>, String>>()?;
    Ok((PreTokenizerWrapper::Sequence(Sequence::new(steps)), way.whole_pieces_first))
}
