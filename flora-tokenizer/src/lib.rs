//! Text to tokens and back, from the files of a model: GGUF metadata, or a folder's `tokenizer.json`.
//!
//! Byte-level BPE only, which is what Llama 3, SmolLM2 and StarCoder use. The BPE itself is Hugging Face's `tokenizers`; what
//! is here reads and checks the files, keeps special tokens apart from text, and renders chat templates.

mod chat;
mod description;
mod error;
mod folder;
mod gguf;
mod pieces;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatError, Message};
pub use error::{EncodeError, TokenizerError, VocabularyProblem};
pub use tokenizer::{Specials, Tokenizer};
