//! Trains adapters: jobs of mixed kinds and ranks come and go, and every step runs one batch of
//! their segments over one base. Nothing here knows of devices or kernels; what a model computes is behind [`Trainee`].
//!
//! ```text
//! parameters (f32) ──NormalForm::fold──▶ FoldedAdapter ──Trainee::place──▶ the model
//! segments of many jobs ──Trainee::gradients──▶ FoldedGradient ──Unfolding──▶ gradients ──AdamW──▶ parameters
//! ```

pub mod trainee;

pub use trainee::{BatchGradients, JobGradients, JobId, SegmentLoss, TargetLayer, TrainSegment, Trainee};
