//! The backward pass of a projection: from the gradient of its outputs to that of its inputs and those of its adapters' vectors.

use std::sync::Arc;

use flora_ir::gradient::{FoldedGradient, RankOneGradient, VirtualRowGradient};
use flora_plan::batch::{LowRankSlots, VirtualRowSlots};
use flora_plan::gradient::GradientLowering;
use flora_plan::plan::Plan;
use flora_plan::schedule::BackwardSchedule;

use crate::backend::{Gradients, Wanted};
use crate::buffer::Buffer;
use crate::device::{Device, DeviceError};
use crate::operands::LayerOperands;
use crate::projection::{Projection, ProjectionError};
use crate::step::StepBatch;

/// What a backward pass of a projection gives.
#[derive(Clone, Debug)]
pub struct ProjectionGradient {
    /// dx `[tokens, d]`, in the type of the activations; `None` where it wasn't wanted.
    pub dx: Option<Buffer>,
    /// Those of the adapters' folded vectors, each the sum over the adapter's rows in the order of the batch: for each position of the
    /// table that has rows and an adapter, rising. Empty where they weren't wanted.
    pub adapters: Vec<(u32, FoldedGradient)>,
}

impl Projection {
    /// The gradients of a batch: x `[tokens, d]` as [`execute`](Self::execute) had it, and g `[tokens, k]`, the gradient of the sum
    /// before bias, activation and residual. A layer's activation is differentiated by whoever applies the next one, from its sums.
    ///
    /// An adapter's gradients depend on its own rows alone, and a row of dx on its own row and adapter, to the bit.
    ///
    /// # Errors
    /// Buffers of another size, type or device, a batch too large to index, a device that computes no gradients, an adapter that
    /// multiplies rows by sparse matrices.
    pub fn backward(
        &self,
        batch: &StepBatch,
        x: &Buffer,
        g: &Buffer,
        wanted: Wanted,
    ) -> Result<ProjectionGradient, ProjectionError> {
        BackwardPass::of(self, batch, GradientLowering::cheapest)?.run(self.device(), (x, g), wanted)
    }
}

/// A backward pass that is ready to run, with all that it needs of its projection.
#[derive(Clone, Debug)]
pub struct BackwardPass {
    /// The layer.
    pub operands: LayerOperands,
    /// Its steps.
    pub schedule: Arc<BackwardSchedule>,
    /// The adapters that have rows: position and vectors.
    adapters: Vec<(u32, Layout)>,
}

/// Which vectors an adapter has.
#[derive(Clone, Debug)]
struct Layout {
    virtual_rows: Vec<VirtualRowSlots>,
    low_rank: LowRankSlots,
    /// Whether the device computes the gradient of a scale that the adapter doesn't have.
    is_additive_alone: bool,
}

impl BackwardPass {
    /// `choose` says how gradients of scales are computed, by an adapter's rows and scales. The input's gradient is computed by a fixed
    /// plan, so that a row of it has the same bits in any company.
    pub(crate) fn of(
        projection: &Projection,
        batch: &StepBatch,
        choose: impl Fn(u64, u64) -> GradientLowering,
    ) -> Result<Self, ProjectionError> {
        if projection.passes_of(batch.segments()).iter().any(|pass| !pass.own.sparse.is_empty()) {
            return Err(ProjectionError::SparseBackward);
        }
        projection.refuse_gates(batch.segments())?;
        let schedule = batch.backward_schedule(projection, Plan::fixed_adjoint(), choose)?;
        let layout = |position: &u32| {
            let (virtual_rows, low_rank) = projection.own_slots_at(*position)?;
            let is_additive_alone = virtual_rows.is_empty();
            Some((*position, Layout { virtual_rows: virtual_rows.to_vec(), low_rank, is_additive_alone }))
        };
        let adapters = batch.positions().iter().filter_map(layout).collect();
        Ok(Self { operands: projection.operands().clone(), schedule, adapters })
    }

    pub(crate) fn run(
        &self,
        device: &Device,
        buffers: (&Buffer, &Buffer),
        wanted: Wanted,
    ) -> Result<ProjectionGradient, ProjectionError> {
        let Gradients { input, vectors } = device.backward(&self.operands, &self.schedule, buffers, wanted)?;
        let adapters = vectors.map(|vectors| self.folded(device, &vectors)).transpose()?.unwrap_or_default();
        Ok(ProjectionGradient { dx: input, adapters })
    }

    /// The gradients of vectors `[in_vectors, d]` and `[out_vectors, k]` as those of adapters.
    fn folded(
        &self,
        device: &Device,
        [in_vectors, out_vectors]: &[Buffer; 2],
    ) -> Result<Vec<(u32, FoldedGradient)>, DeviceError> {
        Ok(self.gradients(&device.read(in_vectors)?, &device.read(out_vectors)?))
    }

    /// The gradients of vectors `[in_vectors, d]` and `[out_vectors, k]`, as the schedule has them, as those of the adapters that have
    /// rows: position and gradients.
    pub fn gradients(&self, in_vectors: &[f32], out_vectors: &[f32]) -> Vec<(u32, FoldedGradient)> {
        let shape = self.operands.shape();
        let (d, k) = (shape.d as usize, shape.k as usize);
        let folded = |(position, layout): &(u32, Layout)| {
            let gradient = self.schedule.adapters().iter().find(|gradient| gradient.adapter == *position);
            let (first_in, first_out) = gradient.map_or((0, 0), |gradient| (gradient.first_in, gradient.first_out));
            let in_vectors = in_vectors.get(first_in as usize * d..).unwrap_or_default();
            let out_vectors = out_vectors.get(first_out as usize * k..).unwrap_or_default();
            (*position, layout.folded(in_vectors, out_vectors, (d, k)))
        };
        self.adapters.iter().map(folded).collect()
    }
}

impl Layout {
    /// An adapter's gradient of its vectors, which begin with the first of `in_vectors` and `out_vectors`.
    fn folded(&self, in_vectors: &[f32], out_vectors: &[f32], (d, k): (usize, usize)) -> FoldedGradient {
        let widened = |vector: &[f32]| vector.iter().map(|number| f64::from(*number)).collect::<Vec<_>>();
        let mut in_vectors = in_vectors.chunks_exact(d).map(widened);
        let mut out_vectors = out_vectors.chunks_exact(k).skip(usize::from(self.is_additive_alone)).map(widened);
        let scales = self.virtual_rows.iter().map(|row| VirtualRowGradient {
            in_scale: row.in_scale.and_then(|_| in_vectors.next()),
            out_scale: row.out_scale.and_then(|_| out_vectors.next()),
        });
        let virtual_rows = scales.collect();
        let pairs = in_vectors.zip(out_vectors).map(|(shrink, expand)| RankOneGradient { shrink, expand });
        FoldedGradient { virtual_rows, low_rank: pairs.take(self.low_rank.rank as usize).collect() }
    }
}
