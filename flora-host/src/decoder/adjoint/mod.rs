//! The backward pass of what a decoder computes beside its projections, in f32: each function takes the gradient of an operation's
//! result and gives that of what the operation read.
//!
//! A row's gradients depend on its own numbers alone, those of attention on its own segment's, and sums are in a fixed order. So
//! a segment has the same bits alone and beside others.

mod activation;
mod attention;
mod elements;
mod loss;
mod norm;

pub use attention::AttentionAdjoint;
