//! What a job learns from: files to examples, examples to tokens, tokens to sequences that fit a batch.
//!
//! ```text
//! JSON lines, source files ──read──▶ Example ──encode──▶ Document ──cut──▶ Sequence ──Order──▶ the batches of every epoch
//! ```

mod encode;
mod lines;
mod order;
mod read;
mod sequences;

pub use encode::{EncodeProblem, encode};
pub use lines::{LineProblem, parse_lines};
pub use order::{Order, Position};
pub use read::{DataError, Skipped, Sources, read};
pub use sequences::{Dataset, Document, Excess, Sequence, split};

use std::path::PathBuf;

/// One thing to learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Its file.
    pub file: PathBuf,
    /// Its line in that file, from 1; `None` for a file that is one example.
    pub line: Option<usize>,
    /// What it says.
    pub content: Content,
}

/// What an example says.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// All of it is learnt. Control tokens that are written out in it are the tokens.
    Text(String),
    /// All of it is learnt, and all of it is text.
    Source(String),
    /// An answer to a prompt; the answer is learnt.
    Completion {
        /// What comes before.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// A conversation; what the assistant says is learnt.
    Messages(Vec<Message>),
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the model's template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}
