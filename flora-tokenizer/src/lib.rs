//! Text to tokens and back, from the files of a model: GGUF metadata, a folder's `tokenizer.json`, or its `tokenizer.model`.
//!
//! What runs is Hugging Face's `tokenizers`. What is here makes one of each kind of file, checks what it may cost, keeps
//! special tokens apart from text, and renders chat templates.

mod adapter;
mod chat;
mod cost;
mod description;
mod error;
mod folder;
mod gguf;
mod pieces;
mod sentencepiece;
mod tokenizer;
mod vocabulary;

pub use adapter::{AdapterText, AdapterTexts};
pub use chat::{ChatError, ChatTemplate, Content, Conversation, Message, Next};
pub use error::{EncodeError, TokenizerError, VocabularyProblem};
pub use tokenizer::{Specials, Tokenizer};
