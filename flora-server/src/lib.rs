//! The OpenAI API over HTTP, in front of a continuous-batching engine.
