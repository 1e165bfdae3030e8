//! A projection that plans its own batches: what a decoder and a module of another framework run a step through. It is shared
//! by everyone who holds a clone, and changed (adapters come and go) between two steps.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use flora_plan::batch::BatchShape;
use flora_plan::cost::LayerPrices;
use flora_plan::gradient::GradientLowering;
use flora_plan::layer::{Element, LayerShape};
use flora_plan::plan::{Plan, plan};
use flora_plan::schedule::Schedule;
use flora_plan::weight::PackedWeight;

use crate::backend::Wanted;
use crate::backward::{BackwardPass, ProjectionGradient};
use crate::buffer::Buffer;
use crate::device::Device;
use crate::operands::LayerOperands;
use crate::passes::{RowPasses, Work};
use crate::projection::{Projection, ProjectionError, ProjectionOptions};
use crate::step::StepBatch;

/// A [`Projection`] with its way of planning. Clones share the weight and the adapters.
#[derive(Clone)]
pub struct PlannedProjection {
    device: Device,
    shape: LayerShape,
    activations: Element,
    shared: Arc<RwLock<Shared>>,
}

/// What clones share.
struct Shared {
    projection: Projection,
    planning: Planning,
}

/// A batch that is ready to run.
#[derive(Clone, Debug)]
pub struct Scheduled {
    /// Its steps.
    pub schedule: Arc<Schedule>,
    /// The layer.
    pub operands: LayerOperands,
    /// What is added to the outputs of some rows afterwards: first row, rows, `[k]`.
    pub offsets: Vec<(usize, usize, Arc<[f32]>)>,
}

/// How a batch's lowerings are chosen.
#[derive(Clone, Debug)]
pub enum Planning {
    /// Always these: a row's output is then the same to the bit whatever else is in its batch.
    Fixed(Plan),
    /// The cheapest of each batch by the device's coefficients.
    Priced(Box<LayerPrices>),
}

impl Planning {
    /// The lowerings of a batch, by whether its launch `finishes` with an epilogue.
    fn choose(&self, shape: &BatchShape, finishes: bool) -> Plan {
        match self {
            Self::Fixed(plan) => *plan,
            Self::Priced(prices) => plan(prices, shape, finishes),
        }
    }
}

impl fmt::Debug for PlannedProjection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LayerShape { d, k } = self.shape;
        write!(formatter, "[{d}, {k}]")
    }
}

impl PlannedProjection {
    /// Puts a base weight on a device, in the form that it has.
    ///
    /// # Errors
    /// See [`Projection::from_packed`].
    pub fn new(
        device: &Device,
        weight: &PackedWeight,
        options: ProjectionOptions<'_>,
        planning: Planning,
    ) -> Result<Self, ProjectionError> {
        Ok(Self::of(Projection::from_packed(device, weight, options)?, planning))
    }

    /// A projection that is on its device already.
    pub fn of(projection: Projection, planning: Planning) -> Self {
        Self {
            device: projection.device().clone(),
            shape: projection.shape(),
            activations: projection.operands().format().activations,
            shared: Arc::new(RwLock::new(Shared { projection, planning })),
        }
    }

    /// The device that it is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// The type of x, y and the residual.
    pub fn activations(&self) -> Element {
        self.activations
    }

    /// Changes the projection: places and removes adapters, reserves room for them. Waits for the batches that are being queued.
    pub fn change<T>(&self, change: impl FnOnce(&mut Projection) -> T) -> T {
        change(&mut self.write().projection)
    }

    /// Plans batches in another way from now on.
    pub fn set_planning(&self, planning: Planning) {
        self.write().planning = planning;
    }

    /// What [`forward`](Self::forward) runs for a batch, for whoever runs it where x and y lie. It stays as it is while adapters come and
    /// go.
    ///
    /// # Errors
    /// A batch too large to index, an adapter that multiplies rows by sparse matrices, which no schedule does.
    pub fn scheduled(&self, batch: &StepBatch) -> Result<Scheduled, ProjectionError> {
        let shared = self.read();
        let Shared { projection, planning } = &*shared;
        let finishes = !projection.operands().epilogue().is_identity();
        let passes = projection.passes_of(batch.segments());
        if passes.iter().any(|pass| !pass.own.sparse.is_empty()) {
            return Err(ProjectionError::SparseSchedule);
        }
        projection.refuse_gates(batch.segments())?;
        let schedule = batch.schedule(projection, finishes, |shape| planning.choose(shape, finishes))?;
        let offset = |pass: &RowPasses| Some((pass.rows.start, pass.rows.len(), pass.own.offset.clone()?.into()));
        let (operands, offsets) = (projection.operands().clone(), passes.iter().filter_map(offset).collect());
        Ok(Scheduled { schedule, operands, offsets })
    }

    /// Queues a batch: x `[rows, d]`, the result `[rows, k]`. Projections that get the same `batch` share its schedules. A
    /// projection whose equation adds a residual takes that as `[rows, k]`.
    ///
    /// # Errors
    /// An input of another shape, type or device, a launch that the device can't make.
    pub fn forward(&self, x: &Buffer, batch: &StepBatch, residual: Option<&Buffer>) -> Result<Buffer, ProjectionError> {
        let work = {
            let shared = self.read();
            let Shared { projection, planning } = &*shared;
            Work::of(projection, batch, |shape, finishes| planning.choose(shape, finishes))?
        };
        // Without the lock: a thread of a pool that waits for a part of this batch may start another batch of the same projection.
        work.run(&self.device, x, residual)
    }

    /// [`Projection::backward`] of a batch, its gradients of scales planned as the forward pass is, without keeping the projection from changing meanwhile.
    ///
    /// # Errors
    /// As there.
    pub fn backward(
        &self,
        batch: &StepBatch,
        x: &Buffer,
        g: &Buffer,
        wanted: Wanted,
    ) -> Result<ProjectionGradient, ProjectionError> {
        self.scheduled_backward(batch)?.run(&self.device, (x, g), wanted)
    }

    /// What [`backward`](Self::backward) runs for a batch, for whoever runs it where x and g lie.
    ///
    /// # Errors
    /// A batch too large to index.
    pub fn scheduled_backward(&self, batch: &StepBatch) -> Result<BackwardPass, ProjectionError> {
        let shared = self.read();
        let Shared { projection, planning } = &*shared;
        BackwardPass::of(projection, batch, |rows, scales| match planning {
            Planning::Fixed(_) => GradientLowering::cheapest(rows, scales),
            Planning::Priced(prices) => prices.gradient_lowering(rows, scales),
        })
    }

    // A panic of another holder leaves a projection as whole as any error does.
    fn read(&self) -> RwLockReadGuard<'_, Shared> {
        self.shared.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Shared> {
        self.shared.write().unwrap_or_else(PoisonError::into_inner)
    }
}
