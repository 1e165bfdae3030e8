//! What goes wrong between a model's files and a step.

use flora_adapters::BaseError;
use flora_checkpoint::ModelError;
use flora_host::decoder::OperationError;
use flora_plan::layer::Element;
use flora_runtime::{DeviceError, ProjectionError};

use crate::embedding::EmbeddingError;

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
    /// A device that has no kernels for what is between projections.
    #[error("flora has no decoders for the device `{0}`; use the host")]
    NoDecoder(String),
    /// Activations in 8 bits for a model that has no weight to multiply by them.
    #[error(
        "no base weight of the model is quantised, so that `--activations int8` rounds nothing; give a quantised model or `--base int8`, or leave it out"
    )]
    NothingRounded,
    /// A projection can't be made or run, or has no room for adapters.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    /// An operation of the host was passed what doesn't belong together.
    #[error(transparent)]
    Operation(#[from] OperationError),
    /// A name of `adapted` that no projection of the model has.
    #[error("no projection of the model is called `{name}`; there are: {known}")]
    UnknownModule {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A token whose first numbers can't be looked up.
    #[error(transparent)]
    Embedding(#[from] EmbeddingError),
    /// Numbers of a type that no gradients are computed of.
    #[error("activations in {0}, of which no gradients are computed; train in f32")]
    NotFloats(Element),
    /// A segment that names what isn't there: a defect of the engine.
    #[error("a step names {0}")]
    Step(String),
}
