//! What goes wrong in training.

use flora_adapters::BaseError;
use flora_checkpoint::ModelError;
use flora_host::decoder::OperationError;
use flora_runtime::{DeviceError, ProjectionError};
use flora_train::JobId;

use crate::embedding::EmbeddingError;
use crate::error::ServeError;

/// Why a batch has no gradients, or an adapter can't be placed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The model can't be had or run.
    #[error(transparent)]
    Model(#[from] ServeError),
    /// A job that has no adapters.
    #[error("segment {segment} is of job {}, which has no adapters; place them first", job.0)]
    UnknownJob {
        /// Position of the segment in the batch.
        segment: usize,
        /// What it names.
        job: JobId,
    },
    /// A segment that isn't one.
    #[error("segment {segment} {reason}")]
    Segment {
        /// Position of the segment in the batch.
        segment: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A layer that adapters can't be trained for. The embedding and the output matrix are none of a trainee's layers.
    #[error("job {} adapts layer {index}, and there are {layers}", job.0)]
    UnknownLayer {
        /// Whose.
        job: JobId,
        /// What was named.
        index: usize,
        /// How many there are.
        layers: usize,
    },
    /// A layer that there isn't.
    #[error("there is no layer {index} to train; there are {layers}")]
    NoLayer {
        /// What was named.
        index: usize,
        /// How many there are.
        layers: usize,
    },
    /// Two adapters of one layer in one job.
    #[error("job {} has two adapters of `{path}`; give it one", job.0)]
    Twice {
        /// Whose.
        job: JobId,
        /// The layer.
        path: String,
    },
    /// An adapter that doesn't fit its layer, or memory.
    #[error("job {}: the adapter of `{path}`: {source}", job.0)]
    Place {
        /// Whose.
        job: JobId,
        /// The layer.
        path: String,
        /// Why.
        source: Box<ProjectionError>,
    },
    /// An adapter without a gradient.
    #[error("the adapter of `{0}` has no gradient; this is a defect of flora")]
    NoGradient(String),
}

macro_rules! of_the_model {
    ($($error:ty),*) => {
        $(impl From<$error> for TrainError {
            fn from(error: $error) -> Self {
                Self::Model(error.into())
            }
        })*
    };
}

of_the_model!(BaseError, DeviceError, EmbeddingError, ModelError, OperationError, ProjectionError);
