//! The module: a frozen base weight, the adapters that are resident for it, and a forward pass in which every segment of rows
//! names its adapter.

use std::fmt;
use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Shape, Tensor, TensorPrimitive};
use flora_plan::layer::{Element, LayerShape};
use flora_plan::weight::PackedWeight;
use flora_runtime::{PlannedProjection, Planning, Projection, ProjectionError, ProjectionOptions, StepBatch};

use crate::backend::{BurnDevice, FloraBackend, TensorError};

/// A linear layer whose every row has its own request's adapter: y `[.., k]` = x `[.., d]` @ W_i + bias, with the activation and
/// the residual of the layer's equation.
///
/// Clones share the weight and the adapters. The weight is frozen and lives in the checkpoint that it came from: it is no parameter,
/// and no part of a Burn record.
#[derive(Module, Debug)]
pub struct AdaptedLinear<B: Backend> {
    #[module(skip)]
    layer: Layer,
    backend: PhantomData<B>,
}

/// What Burn's derived code asks of a field.
#[derive(Clone, Debug)]
struct Layer(PlannedProjection);

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, formatter)
    }
}

/// Why a layer can't run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinearError {
    /// The input has another shape.
    #[error("the layer takes [.., {d}] with {rows} rows in all and was passed {found:?}")]
    Input {
        /// Rows of the batch.
        rows: usize,
        /// Inputs of the layer.
        d: u32,
        /// The tensor's shape.
        found: Vec<usize>,
    },
    /// A tensor that can't be a buffer of the layer's device.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The projection can't be made or run.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
}

impl<B: FloraBackend> AdaptedLinear<B> {
    /// Puts a base weight on the device, in the form that it has.
    ///
    /// # Errors
    /// See [`Projection::from_packed`].
    pub fn new(
        device: &BurnDevice<B>,
        weight: &PackedWeight,
        options: ProjectionOptions<'_>,
        planning: Planning,
    ) -> Result<Self, LinearError> {
        Ok(Self::from_planned(PlannedProjection::new(&device.flora, weight, options, planning)?))
    }

    /// A projection that is on the device already.
    pub fn from_projection(projection: Projection, planning: Planning) -> Self {
        Self::from_planned(PlannedProjection::of(projection, planning))
    }

    /// A projection that others may hold too: they share its weight and adapters.
    pub fn from_planned(projection: PlannedProjection) -> Self {
        Self { layer: Layer(projection), backend: PhantomData }
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.layer.0.shape()
    }

    /// Changes the projection: places and removes adapters, reserves room for them.
    ///
    /// # Errors
    /// Whatever `change` answers.
    pub fn change<T>(&self, change: impl FnOnce(&mut Projection) -> T) -> T {
        self.layer.0.change(change)
    }

    /// Plans batches in another way from now on.
    pub fn set_planning(&self, planning: Planning) {
        self.layer.0.set_planning(planning);
    }

    /// The type of x, y and the residual.
    pub fn activations(&self) -> Element {
        self.layer.0.activations()
    }

    /// Runs a batch: x `[.., d]`, the last extent that of a row, the others as many rows as the batch has; y `[.., k]`. A layer
    /// whose equation adds a residual takes that as `[.., k]`.
    ///
    /// # Errors
    /// An input of another shape or device, a launch that the device can't make.
    pub fn forward<const D: usize>(
        &self,
        x: Tensor<B, D>,
        batch: &StepBatch,
        residual: Option<Tensor<B, D>>,
    ) -> Result<Tensor<B, D>, LinearError> {
        let projection = &self.layer.0;
        let LayerShape { d, k } = projection.shape();
        let mut dims = x.dims();
        let found = dims[D - 1];
        let rows: usize = dims[..D - 1].iter().product();
        if found != d as usize || rows != batch.rows() {
            return Err(LinearError::Input { rows: batch.rows(), d, found: dims.to_vec() });
        }
        let device = x.device();
        if B::device(projection.device()).is_none_or(|own| own != device) {
            return Err(TensorError::OtherDevice.into());
        }
        let buffer = |tensor: Tensor<B, D>| B::buffer(projection.device(), tensor.into_primitive().tensor());
        let residual = residual.map(buffer).transpose()?;
        let y = projection.forward(&buffer(x)?, batch, residual.as_ref())?;
        dims[D - 1] = k as usize;
        let y = B::tensor(&device, y, Shape::from(dims))?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
    }
}
