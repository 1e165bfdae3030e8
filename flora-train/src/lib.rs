//! Trains adapters: jobs of mixed kinds and ranks come and go, and every step runs one batch of their segments over one base.
//! Nothing here knows of devices or kernels; what a model computes is behind [`Trainee`].
//!
//! ```text
//! parameters (f32) ──NormalForm::fold──▶ FoldedAdapter ──Trainee::place──▶ the model
//! segments of many jobs ──Trainee::gradients──▶ FoldedGradient ──Unfolding──▶ gradients ──AdamW──▶ parameters
//! ```
//!
//! [`Trainer`] runs jobs, [`data`] makes of files what they learn from, and [`adapter`] has the way from parameters to the model and
//! back. A job's numbers are the same alone and in company, and after it was interrupted, bit for bit.

pub mod adamw;
pub mod adapter;
pub mod data;
pub mod event;
pub mod initial;
mod job;
pub mod jobs_file;
pub mod options;
mod random;
pub mod schedule;
mod state;
pub mod trainee;
pub mod trainer;

pub use adamw::AdamW;
pub use adapter::{Adapter, MakeError};
pub use data::{DataError, Dataset, Sources};
pub use event::{Ending, Event, Happened};
pub use initial::Start;
pub use job::Places;
pub use jobs_file::{DescribedJob, HeldOut, JobsFileError, read_jobs};
pub use options::{Evaluation, JobOptions, Length, OptionError, Warmup};
pub use schedule::{Decay, Schedule};
pub use state::StateError;
pub use trainee::{BatchGradients, JobGradients, JobId, SegmentLoss, TargetLayer, TrainSegment, Trainee};
pub use trainer::{AddError, EndedJob, NewJob, Trainer};
