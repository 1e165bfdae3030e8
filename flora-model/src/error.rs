//! What goes wrong between a model's files and a step.

use flora_adapters::BaseError;
use flora_burn::{LinearError, TensorError};
use flora_checkpoint::ModelError;
use flora_runtime::{DeviceError, ProjectionError};

/// Why a model can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Its files can't be read, or aren't a decoder's.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight can't be had in the form that the device keeps.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The device doesn't start, or refuses a buffer.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A device that isn't the backend's.
    #[error("the device `{0}` isn't one of this Burn backend's")]
    OtherBackend(String),
    /// A layer can't be made or run.
    #[error(transparent)]
    Layer(#[from] LinearError),
    /// A tensor that is no buffer of the device.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Room for adapters that the device refuses.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    /// A name of `adapted` that no projection of the model has.
    #[error("no projection of the model is called `{name}`; there are: {known}")]
    UnknownModule {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A segment that names what isn't there: a defect of the engine.
    #[error("a step names {0}")]
    Step(String),
    /// The tensor's numbers can't be copied back.
    #[error("the logits can't be read from the device: {0}")]
    Read(String),
}
