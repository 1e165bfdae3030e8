//! Trains adapters: jobs of mixed kinds and ranks come and go, and every step runs one batch of their segments over one base.
//! Nothing here knows of devices or kernels; what a model computes is behind [`Trainee`].
//!
//! ```text
//! parameters (f32) ──NormalForm::fold──▶ FoldedAdapter ──Trainee::place──▶ the model
//! segments of many jobs ──Trainee::gradients──▶ FoldedGradient ──Unfolding──▶ gradients ──AdamW──▶ parameters
//! ```
//!
//! [`data`] makes of files what jobs learn from, and [`adapter`] has the way from parameters to the model and back.

pub mod adamw;
pub mod adapter;
pub mod data;
pub mod initial;
mod random;
pub mod schedule;
pub mod trainee;

pub use adamw::AdamW;
pub use adapter::{Adapter, MakeError};
pub use data::{DataError, Dataset, Sources};
pub use initial::Start;
pub use schedule::{Decay, Schedule};
pub use trainee::{BatchGradients, JobGradients, JobId, SegmentLoss, TargetLayer, TrainSegment, Trainee};
