//! The OpenAI API over HTTP, in front of a continuous-batching engine.
//!
//! [`App`] is one model with its adapters, [`router`] its API as a service, [`serve`] that service on a socket.

mod adapters;
mod answer;
mod app;
mod asked;
mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod generation;
mod grammar;
mod logprobs;
mod metrics;
mod options;
mod page;
mod parameters;
mod router;
mod serve;
mod sse;
mod text;
mod tokenize;
mod updates;

pub use app::App;
pub use chat::{Content, Conversation, Message, Next, Role};
pub use options::{AllowedOrigins, ApiKey, InvalidApiKey, InvalidOrigin, Limits, ServerOptions};
pub use router::router;
pub use serve::{ServerError, serve};
pub use text::Text;
pub use updates::{AdapterUpdates, UpdateError};
