//! Why a model's files give no tokenizer, and why a text gives no tokens.

use flora_checkpoint::FileError;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why no tokenizer could be made of a model's files.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// One of the files is unusable.
    #[error(transparent)]
    File(#[from] FileError),
    /// Neither a GGUF file nor anything with a `tokenizer.json`.
    #[error("{} has no tokenizer: {reason}; give a .gguf file, or a folder with tokenizer.json or tokenizer.model", path.display())]
    NoTokenizer {
        /// What was opened.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// Not the JSON that such a file holds.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The mistake, with line and column.
        problem: String,
    },
    /// An entry that is missing, of the wrong type, or not supported.
    #[error("{}: `{key}` {problem}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The entry.
        key: String,
        /// What is wrong with it, and the mend where there is one.
        problem: String,
    },
    /// An adapter's tokenizer whose tokens aren't the model's.
    #[error("{}: token {id} is {adapters:?}, and the model's is {models:?}; an adapter reads the tokens of its model: \
             serve it with the model that it was trained on, or leave its tokenizer out", path.display())]
    OtherTokens {
        /// The adapter's file.
        path: PathBuf,
        /// The first token that differs.
        id: u32,
        /// What it is to the adapter.
        adapters: String,
        /// What it is to the model; nothing where there is no such token.
        models: String,
    },
    /// Tokens and merges that don't make a vocabulary.
    #[error("{}: {problem}", path.display())]
    Vocabulary {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: VocabularyProblem,
    },
}

impl TokenizerError {
    /// The error that the entry `key` of the file at `path` has `problem`.
    pub(crate) fn entry(path: &Path, key: &str, problem: impl Into<String>) -> Self {
        TokenizerError::Entry { path: path.to_owned(), key: key.to_string(), problem: problem.into() }
    }
}

/// What is wrong with tokens and merges.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VocabularyProblem {
    /// No tokens.
    #[error("the vocabulary is empty")]
    Empty,
    /// More tokens than any model has.
    #[error("the vocabulary has an id of {found}; at most {limit} tokens are accepted")]
    TooLarge {
        /// An id that is too large, or the number of tokens.
        found: u64,
        /// The limit.
        limit: usize,
    },
    /// One text, two ids.
    #[error("the token {text:?} is there twice, as {first} and as {second}")]
    Repeated {
        /// The token.
        text: String,
        /// One id.
        first: u32,
        /// The other id.
        second: u32,
    },
    /// One id, two texts.
    #[error("the id {id} stands for {first:?} and for {second:?}")]
    Ambiguous {
        /// The id.
        id: u32,
        /// One token.
        first: String,
        /// The other token.
        second: String,
    },
    /// A token for text that holds a character which stands for no byte.
    #[error("the token {id}, {text:?}, holds characters that stand for no byte, so it isn't byte-level BPE")]
    NotByteLevel {
        /// The id.
        id: u32,
        /// The token.
        text: String,
    },
    /// A merge that isn't two tokens.
    #[error("merge {index} is {text:?}; it must be two tokens with a space between them")]
    BadMerge {
        /// Its place in the list, from 0.
        index: usize,
        /// The merge.
        text: String,
    },
    /// A merge of tokens, or into a token, that isn't there.
    #[error("merge {index} needs the token {text:?}, which is not in the vocabulary")]
    UnknownMerge {
        /// Its place in the list, from 0.
        index: usize,
        /// The token that is missing.
        text: String,
    },
    /// Special tokens of an absurd length.
    #[error("the tokens that are looked for in texts have {found} bytes together; at most {limit} are accepted")]
    LongSpecials {
        /// Their length in bytes.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Pieces whose parts would take too long to look for.
    #[error("the pieces are too long to be SentencePiece's")]
    LongPieces,
    /// An added token whose id isn't that of its text.
    #[error("the added token {text:?} has the id {listed}, and in the vocabulary it has {found}")]
    WrongId {
        /// The token.
        text: String,
        /// Its id among the added tokens.
        listed: u32,
        /// Its id in the vocabulary, or the next one that is free.
        found: u32,
    },
    /// The library refused what passed the checks here.
    #[error("{0}")]
    Refused(String),
}

/// Why a text gives no tokens.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A text longer than any context.
    #[error("the text has {found} bytes; at most {limit} are taken")]
    TooLong {
        /// Its length in bytes.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The model's own pattern can't split it.
    #[error("the model's pattern does not split the text: {0}")]
    Pattern(String),
}
