//! Continuous batching: requests come and go, each naming its adapters or none, and every step runs one batch of all their tokens
//! through a [`Decoder`]. Nothing here knows of devices, kernels or files; what a model computes is behind the trait.
//!
//! [`Core`] is all of it without threads; [`Engine`] runs one on a thread, with others that read adapters.

mod cache;
pub mod composition;
pub mod core;
pub mod decoder;
pub mod engine;
pub mod grammar;
mod limits;
mod loader;
pub mod metrics;
pub mod options;
pub mod phases;
mod prefix;
pub mod request;
pub mod residency;
mod rules;
mod sample;
mod schedule;
mod score;
mod sequence;
pub mod spans;
mod stop;
mod text;

pub use crate::core::{Core, RequestId};
pub use composition::{AdapterChoice, Composition, CompositionError};
pub use decoder::{
    AdapterContent, AdapterFacts, AdapterFailure, AdapterId, AdapterSource, BlockId, BlockSharing, Decoder,
    DecoderLimits, LogitRows, PlaceError, Read, SequenceId, StepSegment, Unread,
};
pub use engine::{Engine, EngineHandle, Stream};
pub use grammar::{CompiledGrammar, Grammar, GrammarState};
pub use limits::{Accepted, RequestLimits};
pub use metrics::{AdapterMetrics, AdapterRequests, Metrics};
pub use options::{AdapterOptions, Options, OptionsError, StopLimits};
pub use request::{
    Event, FinishReason, LogProbabilities, LogitRules, Request, RequestError, Sampling, ScoredToken, StopAt, Usage,
};
pub use residency::{LoadOrder, LoadOutcome, Loaded};
pub use spans::{AdapterSpans, Span, SpanError, Spans};
pub use text::Vocabulary;
