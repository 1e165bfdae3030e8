//! The OpenAI API over HTTP, in front of a continuous-batching engine.
//!
//! [`App`] is one model with its adapters, [`router`] its API as a service, [`serve`] that service on a socket.

mod answer;
mod app;
mod body;
mod chat;
mod completions;
mod error;
mod generation;
mod metrics;
mod options;
mod parameters;
mod router;
mod serve;
mod sse;

pub use app::{App, Text};
pub use chat::{Message, Role};
pub use options::{ApiKey, InvalidApiKey, Limits, ServerOptions};
pub use router::router;
pub use serve::{ServerError, serve};
