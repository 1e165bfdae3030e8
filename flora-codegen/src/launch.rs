//! A layer's buffers and a schedule, queued on a cubecl device: what is asked for, and why it is refused; `run` has the steps.
//! Generic over the runtime, so that CUDA, wgpu and the offline targets go through the same code.

mod copy;
mod run;

pub use copy::copy;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::layer::{Element, Epilogue, LayerFormat, LayerShape};
use crate::routine::{Hardware, RoutineError};
use crate::schedule::{Materialised, Schedule, Step};
use run::Run;

/// A layer's operands on the device, row-major, in the types of `format`.
#[derive(Clone, Debug)]
pub struct LayerBuffers {
    /// Extents.
    pub shape: LayerShape,
    /// Types.
    pub format: LayerFormat,
    /// The values of a [`PackedWeight`](crate::weight::PackedWeight): `[d, k]` or its words.
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
    /// The schedule names vectors that the pools lack.
    #[error("the batch's adapters lie in {needed} slots of the {pool} pool, which has {slots}; load them again")]
    Slots {
        /// "in" or "out".
        pool: &'static str,
        /// Slots that the schedule names.
        needed: u32,
        /// Slots that there are.
        slots: u32,
    },
    /// The schedule was made for another layer.
    #[error("the batch was laid out for a weight of {schedule:?} and this one is {layer:?}; lay it out for each")]
    OtherLayer {
        /// What it was made for.
        schedule: LayerShape,
        /// What it was launched with.
        layer: LayerShape,
    },
    /// A result or an intermediate that the device can't hold in one buffer.
    #[error(
        "the batch needs a buffer of {bytes} bytes and the device takes {limit}; split the batch, or use another lowering"
    )]
    BufferTooLarge {
        /// What it needs.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },
    /// More adapters than kernels can index.
    #[error("the {pool} pool has {elements} elements and kernels index 2^31; load fewer adapters")]
    PoolTooLarge {
        /// "in" or "out".
        pool: &'static str,
        /// Its size.
        elements: u64,
    },
    /// No blueprint of this device serves the batch.
    #[error(transparent)]
    Routine(#[from] RoutineError),
    /// A plan that keeps to a weight that wasn't made.
    #[error("the batch is planned for the merged weight of adapter {wanted}, and {}; merge the adapter first", held(*.found))]
    NotMerged {
        /// What the batch wants.
        wanted: u32,
        /// What is resident.
        found: Option<u32>,
    },
    /// An epilogue that adds a residual, and none was passed.
    #[error("the layer adds a residual and none was passed; pass one of [tokens, k]")]
    NoResidual,
    /// A type that the device doesn't have.
    #[error("this device has no {0} buffers; keep the layer in f32")]
    NoElement(Element),
}

fn held(found: Option<u32>) -> String {
    found.map_or_else(|| "none is resident".to_owned(), |adapter| format!("that of adapter {adapter} is resident"))
}

/// Launches a schedule: reads x `[tokens, d]` and, where the epilogue adds one, residual `[tokens, k]`; returns y `[tokens, k]`.
/// The launches are queued; errors of the device itself surface when y is read.
///
/// # Errors
/// A schedule of another layer or of slots that the pools lack, a launch that the device can't hold, a type that it doesn't have.
///
/// # Safety
/// The buffers belong to `client` and hold what [`LayerBuffers`] says, `x` holds `[tokens, d]` and `residual` `[tokens, k]` in the
/// type of the activations: kernels read and write them without looking at their lengths.
pub unsafe fn launch<R: Runtime>(
    client: &ComputeClient<R>,
    hardware: &Hardware,
    layer: &LayerBuffers,
    schedule: &Schedule,
    x: &Handle,
    residual: Option<&Handle>,
) -> Result<Handle, LaunchError> {
    let merged = layer.merged.as_ref().map(|merged| merged.adapter);
    check(schedule, layer.shape, layer.in_pool.slots, layer.out_pool.slots, merged)?;
    if layer.epilogue.residual && residual.is_none() {
        return Err(LaunchError::NoResidual);
    }
    Run::new(client, hardware, layer, schedule.tokens(), x, residual)?.steps(schedule)
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
    check_slots(step, layer.in_pool.slots, layer.out_pool.slots)?;
    Run::new(client, hardware, layer, 0, &layer.base_weight, None)?.made(step)
}

/// Whether a schedule is one of a layer of this shape whose pools have so many slots, and that keeps the W_i of the adapter
/// `merged`.
///
/// # Errors
/// A schedule of another layer, of slots that the pools lack or of the merged weight of another adapter; pools that kernels can't
/// index.
pub fn check(
    schedule: &Schedule,
    shape: LayerShape,
    in_slots: u32,
    out_slots: u32,
    merged: Option<u32>,
) -> Result<(), LaunchError> {
    if shape != schedule.shape() {
        return Err(LaunchError::OtherLayer { schedule: schedule.shape(), layer: shape });
    }
    let pools = [("in", schedule.in_slots(), in_slots, shape.d), ("out", schedule.out_slots(), out_slots, shape.k)];
    for (pool, needed, slots, width) in pools {
        if needed > slots {
            return Err(LaunchError::Slots { pool, needed, slots });
        }
        let elements = u64::from(slots) * u64::from(width);
        if elements > i32::MAX as u64 {
            return Err(LaunchError::PoolTooLarge { pool, elements });
        }
    }
    for step in schedule.steps() {
        if let Step::Merged { adapter } = step
            && merged != Some(*adapter)
        {
            return Err(LaunchError::NotMerged { wanted: *adapter, found: merged });
        }
    }
    Ok(())
}

/// Whether the pools have the slots that `step` names.
///
/// # Errors
/// They don't.
pub fn check_slots(step: &Materialised, in_slots: u32, out_slots: u32) -> Result<(), LaunchError> {
    let ranks = || step.adapters.iter().filter(|adapter| adapter.rank > 0);
    let scales = || step.scales.iter();
    let needed_in = scales().map(|scale| scale.in_slot).chain(ranks().map(|own| own.shrink.saturating_add(own.rank)));
    let needed_out = scales().map(|scale| scale.out_slot).chain(ranks().map(|own| own.expand.saturating_add(own.rank)));
    let needed = [("in", needed_in.max().unwrap_or(0), in_slots), ("out", needed_out.max().unwrap_or(0), out_slots)];
    for (pool, needed, slots) in needed {
        if needed > slots {
            return Err(LaunchError::Slots { pool, needed, slots });
        }
    }
    Ok(())
}
