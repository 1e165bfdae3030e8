//! Continuous batching: requests come and go, each naming its adapter or none, and every step runs one batch of all their tokens
//! through a [`Decoder`]. Nothing here knows of devices, kernels or files; what a model computes is behind the trait.

pub mod decoder;
pub mod request;

pub use decoder::{AdapterFailure, AdapterId, AdapterSource, Decoder, DecoderLimits, PlaceError, Segment, SequenceId};
pub use request::{Event, FinishReason, Request, RequestError, Sampling, StopAt, Usage};
