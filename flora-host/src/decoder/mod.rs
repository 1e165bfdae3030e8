//! What a decoder computes beside its projections, on the processor: attention over a cache of keys and values, rotary positions,
//! norms, products. Every operation is a method of [`HostEngine`](crate::HostEngine) that reads and writes plain slices.
//!
//! Sums are f32 in a fixed order whatever the types are, and results are rounded once. A row's bits depend on its own numbers
//! alone, and in attention on its own sequence's tokens up to its own.

mod adjoint;
mod attention;
mod cache;
mod error;
mod matrix;
mod norm;
mod product;
mod rotary;
mod softmax;

pub use adjoint::AttentionAdjoint;
pub use attention::{Attention, AttentionSegment};
pub use cache::{KeyValueBlock, KeyValueCache};
pub use error::OperationError;
pub use flora_runtime::decoding::Heads;
pub use matrix::Matrix;
pub use rotary::{RotaryFrequencies, RotaryRows};
