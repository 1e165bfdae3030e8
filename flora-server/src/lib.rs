//! The OpenAI API over HTTP, in front of a continuous-batching engine.

mod answer;
mod body;
mod chat;
mod completions;
mod error;
mod options;
mod parameters;

pub use options::{ApiKey, InvalidApiKey, Limits, ServerOptions};
