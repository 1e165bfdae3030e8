//! The module: a frozen base weight, the adapters that are resident for it, and a forward pass in which every segment of rows
//! names its adapter.

use std::fmt;
use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
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
#[derive(Clone)]
struct Layer {
    projection: PlannedProjection,
    #[cfg(feature = "autodiff")]
    placed: crate::trained::Placed,
}

impl fmt::Debug for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.projection, formatter)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
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
    /// An epilogue has no gradient here.
    #[cfg(feature = "autodiff")]
    #[error(
        "a layer with an activation or a residual can't be trained; make it without, and apply them by Burn's operations"
    )]
    Finishes,
    /// Parameters that make no adapter.
    #[cfg(feature = "autodiff")]
    #[error(transparent)]
    Parameters(#[from] crate::trained::ParametersError),
}

impl<B: Backend> AdaptedLinear<B> {
    /// A projection that is on the device already.
    pub fn from_projection(projection: Projection, planning: Planning) -> Self {
        Self::from_planned(PlannedProjection::of(projection, planning))
    }

    /// A projection that others may hold too: they share its weight and adapters.
    pub fn from_planned(projection: PlannedProjection) -> Self {
        let layer = Layer {
            projection,
            #[cfg(feature = "autodiff")]
            placed: crate::trained::Placed::default(),
        };
        Self { layer, backend: PhantomData }
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.layer.projection.shape()
    }

    /// Changes the projection: places and removes adapters, reserves room for them.
    ///
    /// # Errors
    /// Whatever `change` answers.
    pub fn change<T>(&self, change: impl FnOnce(&mut Projection) -> T) -> T {
        #[cfg(feature = "autodiff")]
        self.layer.placed.forget();
        self.layer.projection.change(change)
    }

    /// Plans batches in another way from now on.
    pub fn set_planning(&self, planning: Planning) {
        self.layer.projection.set_planning(planning);
    }

    /// The type of x, y and the residual.
    pub fn activations(&self) -> Element {
        self.layer.projection.activations()
    }

    #[cfg(feature = "autodiff")]
    pub(crate) fn projection(&self) -> &PlannedProjection {
        &self.layer.projection
    }

    #[cfg(feature = "autodiff")]
    pub(crate) fn placed(&self) -> &crate::trained::Placed {
        &self.layer.placed
    }

    /// The shape of y for an input of these extents.
    pub(crate) fn checked<const D: usize>(&self, dims: [usize; D], batch: &StepBatch) -> Result<Shape, LinearError> {
        let LayerShape { d, k } = self.shape();
        let found = dims[D - 1];
        let rows: usize = dims[..D - 1].iter().product();
        if found != d as usize || rows != batch.rows() {
            return Err(LinearError::Input { rows: batch.rows(), d, found: dims.to_vec() });
        }
        let mut dims = dims;
        dims[D - 1] = k as usize;
        Ok(Shape::from(dims))
    }
}

/// Runs a batch on primitives.
pub(crate) fn execute<B: FloraBackend>(
    projection: &PlannedProjection,
    device: &B::Device,
    x: FloatTensor<B>,
    batch: &StepBatch,
    residual: Option<FloatTensor<B>>,
    shape: Shape,
) -> Result<FloatTensor<B>, LinearError> {
    if B::device(projection.device()).is_none_or(|own| own != *device) {
        return Err(TensorError::OtherDevice.into());
    }
    let buffer = |tensor| B::buffer(projection.device(), tensor);
    let residual = residual.map(buffer).transpose()?;
    let y = projection.forward(&buffer(x)?, batch, residual.as_ref())?;
    Ok(B::tensor(device, y, shape)?)
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
        let shape = self.checked(x.dims(), batch)?;
        let device = x.device();
        let primitive = |tensor: Tensor<B, D>| tensor.into_primitive().tensor();
        let residual = residual.map(primitive);
        let y = execute::<B>(&self.layer.projection, &device, primitive(x), batch, residual, shape)?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
    }
}
