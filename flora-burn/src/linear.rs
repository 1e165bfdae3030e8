//! The module: a frozen base weight, the adapters that are resident for it, and a forward pass in which every segment of rows
//! names its adapter.

use std::fmt;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use burn::module::Module;
use burn::tensor::backend::Backend;
use burn::tensor::{Shape, Tensor, TensorPrimitive};
use flora_codegen::batch::{BatchShape, Segment};
use flora_codegen::cost::LayerPrices;
use flora_codegen::layer::{Element, LayerShape};
use flora_codegen::plan::{Plan, plan};
use flora_codegen::schedule::{ScheduleError, schedule};
use flora_codegen::weight::PackedWeight;
use flora_runtime::{Projection, ProjectionError, ProjectionOptions};

use crate::backend::{FloraBackend, Target, TensorError};

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

/// What clones share.
#[derive(Clone)]
struct Layer {
    shape: LayerShape,
    shared: Arc<RwLock<Shared>>,
}

struct Shared {
    projection: Projection,
    planning: Planning,
}

/// How a batch's lowerings are chosen.
#[derive(Clone, Debug)]
pub enum Planning {
    /// Always these: a row's output is then the same to the bit whatever else is in its batch.
    Fixed(Plan),
    /// The cheapest of each batch by the device's coefficients.
    Priced(Box<LayerPrices>),
}

/// The rows of one step: consecutive segments, each with the position of its adapter in the layers' tables. The base model is at 0,
/// and wherever a layer has no adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepBatch {
    segments: Vec<Segment>,
    rows: usize,
}

impl StepBatch {
    /// Segments as (position, rows).
    pub fn new(segments: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let segments: Vec<_> = segments.into_iter().map(|(adapter, rows)| Segment { rows, adapter }).collect();
        let rows = segments.iter().map(|segment| segment.rows as usize).sum();
        Self { segments, rows }
    }

    /// Rows of all segments.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// Why a layer can't run.
#[derive(Debug, thiserror::Error)]
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
    /// A segment that the layer can't serve.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The projection can't be made or run.
    #[error(transparent)]
    Projection(#[from] ProjectionError),
}

impl fmt::Debug for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "[{}, {}]", self.shape.d, self.shape.k)
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

impl Layer {
    // A panic of another holder leaves a projection as whole as any error does.
    fn read(&self) -> RwLockReadGuard<'_, Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Shared> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: FloraBackend> AdaptedLinear<B> {
    /// Puts a base weight on the device, in the form that it has.
    ///
    /// # Errors
    /// See [`Projection::from_packed`].
    pub fn new(
        target: &Target<B>,
        weight: &PackedWeight,
        options: ProjectionOptions<'_>,
        planning: Planning,
    ) -> Result<Self, LinearError> {
        let projection = Projection::from_packed(&target.flora, weight, options)?;
        Ok(Self::from_projection(projection, planning))
    }

    /// A projection that is on the device already.
    pub fn from_projection(projection: Projection, planning: Planning) -> Self {
        let layer = Layer { shape: projection.shape(), shared: Arc::new(RwLock::new(Shared { projection, planning })) };
        Self { layer, backend: PhantomData }
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.layer.shape
    }

    /// Changes the projection: places and removes adapters, reserves room for them.
    ///
    /// # Errors
    /// Whatever `change` answers.
    pub fn change<T>(&self, change: impl FnOnce(&mut Projection) -> T) -> T {
        change(&mut self.layer.write().projection)
    }

    /// Plans batches in another way from now on.
    pub fn set_planning(&self, planning: Planning) {
        self.layer.write().planning = planning;
    }

    /// The type of x, y and the residual.
    pub fn activations(&self) -> Element {
        self.layer.read().projection.operands().format.activations
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
        let shared = self.layer.read();
        let Shared { projection, planning } = &*shared;
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
        let adapters = projection.adapters();
        // An adapter that leaves this layer alone has no place here.
        let known = |segment: &Segment| if (segment.adapter as usize) < adapters.len() { segment.adapter } else { 0 };
        let segments = batch.segments().iter().map(|segment| Segment { adapter: known(segment), ..*segment });
        let segments: Vec<_> = segments.collect();
        let finishes = !projection.operands().epilogue.is_identity();
        let chosen = match planning {
            Planning::Fixed(plan) => *plan,
            Planning::Priced(prices) => plan(prices, &BatchShape::of(&segments, adapters), finishes),
        };
        let schedule = schedule(&chosen, projection.shape(), &segments, adapters, finishes)?;
        let buffer = |tensor: Tensor<B, D>| B::buffer(projection.device(), tensor.into_primitive().tensor());
        let residual = residual.map(buffer).transpose()?;
        let y = projection.execute(&schedule, &buffer(x)?, residual.as_ref())?;
        dims[D - 1] = k as usize;
        let y = B::tensor(&device, &y, Shape::from(dims))?;
        Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
    }
}
