//! What a tokenizer is made of, whichever file said it.

use crate::pieces::Pieces;
use std::path::PathBuf;

/// One token of a vocabulary; its id is its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Token {
    /// As the file writes it: byte-level characters for text, plain text for the others.
    pub(crate) text: String,
    pub(crate) kind: Kind,
}

/// What a token is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bytes of text, made by merges.
    Text,
    /// Text that is one token wherever it stands.
    Whole(Edges),
    /// A sign to the model, such as the end of a text; never text.
    Control(Edges),
    /// An id that nothing stands for.
    Unused,
}

/// How a token that is looked for in texts meets what is around it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Edges {
    /// Takes the white space before it.
    pub(crate) strip_left: bool,
    /// Takes the white space after it.
    pub(crate) strip_right: bool,
    /// Is one only between characters that are no letters.
    pub(crate) single_word: bool,
}

/// A tokenizer as its files describe it; references between the parts are not checked yet.
pub(crate) struct Description {
    /// The file that the vocabulary is in, for errors.
    pub(crate) path: PathBuf,
    pub(crate) tokens: Vec<Token>,
    pub(crate) merges: Vec<(String, String)>,
    /// Whether a piece that is a token is that token, whatever the merges say.
    pub(crate) whole_pieces_first: bool,
    /// Whether texts are normalised to NFC first.
    pub(crate) compose: bool,
    pub(crate) pieces: Pieces,
    pub(crate) special: SpecialIds,
    /// The Jinja template of a conversation.
    pub(crate) chat_template: Option<String>,
}

/// The ids with a meaning to whoever drives the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpecialIds {
    pub(crate) beginning: Option<u32>,
    /// Whether every prompt starts with `beginning`.
    pub(crate) prompts_begin: bool,
    /// The end of a text; what templates call `eos_token`.
    pub(crate) end: Option<u32>,
    /// What ends generation beside `end`.
    pub(crate) more_ends: Vec<u32>,
}
