//! What a tokenizer is made of, whichever file said it.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// One token of a vocabulary; its id is its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    /// As the file writes it: for text in the characters of its kind of vocabulary, plain text for the others.
    pub(crate) text: String,
    pub(crate) kind: Kind,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Text, as the model of the vocabulary cuts it.
    Text,
    /// Text that is one token wherever it stands.
    Whole,
    /// A sign to the model, such as the end of a text; never text.
    Control,
    /// An id that nothing stands for.
    Unused,
}

/// How the vocabulary writes bytes, which says what a token's bytes are whatever is around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// A character for each byte, as GPT-2 numbered them.
    ByteLevel,
    /// Text, in which this character is a space, and `<0x41>` a byte.
    Escaped(char),
    /// In another way: tokens are read together.
    Other,
}

/// What stands around a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// What the tokenizer's own post-processor puts there.
    Processor,
    /// These tokens.
    Tokens { before: Option<u32>, after: Option<u32> },
}

/// A tokenizer that was built of its files, and what they say beside it.
pub(crate) struct Parts {
    /// The file that the vocabulary is in, for errors.
    pub(crate) path: PathBuf,
    pub(crate) inner: tokenizers::Tokenizer,
    /// By id.
    pub(crate) tokens: Vec<Token>,
    pub(crate) spelling: Spelling,
    pub(crate) frame: Frame,
    pub(crate) special: SpecialIds,
    /// What templates may ask for, by names like `bos_token`.
    pub(crate) special_texts: BTreeMap<String, String>,
    /// The Jinja template of a conversation.
    pub(crate) chat_template: Option<String>,
}

/// The ids with a meaning to whoever drives the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecialIds {
    /// The end of a text; what templates call `eos_token`.
    pub(crate) end: Option<u32>,
    /// What ends generation beside `end`.
    pub(crate) more_ends: Vec<u32>,
    /// What the model writes for text that it has no token for.
    pub(crate) unknown: Option<u32>,
}
