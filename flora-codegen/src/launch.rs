//! A layer's buffers and a schedule, queued on a cubecl device: what is asked for, and why it is refused; `run` has the steps.
//! Generic over the runtime, so that CUDA, wgpu and the offline targets go through the same code.

mod backward;
mod copy;
pub mod decoder;
mod low_rank_sums;
mod prepare;
mod prepare_backward;
mod run;

pub use backward::backward;
pub use copy::copy;
use cubecl::prelude::*;
use cubecl::server::Handle;
use flora_runtime::operands::{OperandError, check_recipe, check_slots};
pub use low_rank_sums::LowRankSums;

use crate::routine::{Hardware, RoutineError};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape};
use flora_plan::schedule::{Kept, Materialised, Schedule};
use prepare::{PreparedBatch, Site};
use run::{Run, allocate};

/// A layer's operands on the device, row-major, in the types of `format`.
#[derive(Clone, Debug)]
pub struct LayerBuffers {
    /// Extents.
    pub shape: LayerShape,
    /// Types.
    pub format: LayerFormat,
    /// The values of a [`PackedWeight`](flora_plan::weight::PackedWeight): `[d, k]` or its words.
    pub base_weight: Handle,
    /// Its scales, of a quantised one.
    pub weight_scales: Option<Handle>,
    /// `[k]`, f32
    pub bias: Option<Handle>,
    /// `[slots, d]`, at least one slot.
    pub in_pool: Pool,
    /// `[slots, k]`, at least one slot.
    pub out_pool: Pool,
    /// Bias, activation, residual.
    pub epilogue: Epilogue,
    /// The adapter whose W_i is resident, in the type of the activations.
    pub merged: Option<Merged>,
}

/// A resident W_i.
#[derive(Clone, Debug)]
pub struct Merged {
    /// Position in the batch's table of adapters.
    pub adapter: u32,
    /// `[d, k]`
    pub weight: Handle,
}

/// Vectors of the adapters that are on the device.
#[derive(Clone, Debug)]
pub struct Pool {
    /// `[slots, width]`
    pub handle: Handle,
    /// How many vectors.
    pub slots: u32,
}

/// Why a schedule can't be launched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// More cubes in one direction than the device counts.
    #[error("{what} needs {cubes} work items in one launch and the device takes {limit}; split the batch")]
    TooManyCubes {
        /// Which kernel.
        what: &'static str,
        /// How many.
        cubes: u64,
        /// The device's limit.
        limit: u32,
    },
    /// Operands that make no layer, or a schedule that isn't one of theirs.
    #[error(transparent)]
    Operands(#[from] OperandError),
    /// A result or an intermediate that the device can't hold in one buffer.
    #[error(
        "the batch needs a buffer of {bytes} bytes and the device takes {limit}; split the batch, or use another lowering"
    )]
    BufferTooLarge {
        /// What the buffer holds.
        what: &'static str,
        /// What it needs.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// No blueprint of this device serves the batch.
    #[error(transparent)]
    Routine(#[from] RoutineError),
    /// A type that the device doesn't have.
    #[error("this device has no {0} buffers; keep the layer in f32")]
    NoElement(Element),
}

/// Launches a schedule: reads x `[tokens, d]` and, where the epilogue adds one, residual `[tokens, k]`; returns y `[tokens, k]`.
/// The launches are queued; errors of the device itself surface when y is read. `sums` are the client's, for all its launches.
///
/// # Errors
/// A schedule that is too large for the layer or of slots that the pools lack, a launch that the device can't hold, a type that it doesn't have.
///
/// # Safety
/// The buffers belong to `client` and hold what [`LayerBuffers`] says, `x` holds `[tokens, d]` and `residual` `[tokens, k]` in the
/// type of the activations: kernels read and write them without looking at their lengths.
pub unsafe fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    layer: &LayerBuffers,
    sums: &LowRankSums,
    schedule: &Schedule,
    x: &Handle,
    residual: Option<&Handle>,
) -> Result<Handle, LaunchError> {
    check_slots(schedule, layer.shape, (layer.in_pool.slots, layer.out_pool.slots))?;
    if layer.epilogue.residual && residual.is_none() {
        return Err(OperandError::NoResidual.into());
    }
    let PreparedBatch { y, steps } = Site::of(hardware, layer).prepare(schedule)?;
    Run::new((client, sums), hardware, layer, (schedule.tokens(), schedule.kept()), x, residual, allocate(client, y))
        .steps(&steps)
}

/// Makes W_i of one adapter, in the type of the activations: what [`Merged`] holds.
///
/// # Errors
/// A weight that the device can't hold in one buffer.
///
/// # Safety
/// As [`launch`]; `step` names slots of the pools.
pub unsafe fn merge<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    layer: &LayerBuffers,
    step: &Materialised,
) -> Result<Handle, LaunchError> {
    check_recipe(step, (layer.in_pool.slots, layer.out_pool.slots))?;
    let made = Site::of(hardware, layer).merge(step)?;
    let (nothing, kept, sums) = (&layer.base_weight, Kept::default(), LowRankSums::default());
    Ok(Run::new((client, &sums), hardware, layer, (0, &kept), nothing, None, nothing.clone()).made(&made))
}
