//! What can be wrong with a projection, its adapters and its batches.

use flora_ir::algebra::FoldError;
use flora_plan::schedule::ScheduleError;
use flora_plan::weight::WeightError;

use crate::batch::BatchError;
use crate::device::DeviceError;
use crate::operands::OperandError;

/// Why a projection can't be made or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProjectionError {
    /// A tensor of the wrong size.
    #[error("{what} has {found} numbers where [{d}, {k}] wants {expected}")]
    WrongSize {
        /// Which tensor.
        what: String,
        /// Inputs.
        d: u32,
        /// Outputs.
        k: u32,
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// A weight that can't be packed.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// A name that is taken.
    #[error("an adapter `{0}` is loaded already; give this one another name")]
    DuplicateAdapter(String),
    /// A position in the table of adapters that is taken, or the base's.
    #[error("the position {0} in the table of adapters is taken; remove the adapter there first")]
    TakenPosition(u32),
    /// No room for an adapter's vectors.
    #[error(
        "an adapter of {in_vectors} and {out_vectors} vectors doesn't fit into what is free of the pools; remove others or reserve more"
    )]
    PoolFull {
        /// In-vectors that it has.
        in_vectors: u32,
        /// Out-vectors that it has.
        out_vectors: u32,
    },
    /// An adapter's own bias in front of an activation, which is applied where the outputs are written.
    #[error("an adapter changes the bias of a layer that an activation follows, which is not supported")]
    OffsetBeforeActivation,
    /// An adapter whose sparse matrices don't fit the weight.
    #[error(transparent)]
    Sparse(FoldError),
    /// A schedule of rows whose adapters do more than schedules say.
    #[error(
        "an adapter of the batch multiplies rows by sparse matrices, which no schedule does: use `forward`, or a `PlannedProjection`"
    )]
    SparseSchedule,
    /// Gradients of an adapter that multiplies rows by sparse matrices.
    #[error("an adapter of the batch multiplies rows by sparse matrices, through which no gradients are computed")]
    SparseBackward,
    /// Gates for an adapter of another rank.
    #[error("the adapter at position {position} has rank {rank}, and {found} ranks have gates; give each its part")]
    WrongGates {
        /// Where the adapter is in the table.
        position: u32,
        /// Its rank.
        rank: u32,
        /// Ranks that were given.
        found: usize,
    },
    /// A row of an adapter whose parts are weighed for each row, without weights.
    #[error(
        "the batch has no gates for its row {row}, or too few, and the adapter at position {position} has them: `StepBatch::with_gates`"
    )]
    NoGates {
        /// Where the adapter is in the table.
        position: u32,
        /// The row.
        row: usize,
    },
    /// A schedule or gradients of an adapter whose parts are weighed for each row.
    #[error(
        "an adapter of the batch has gates, which no schedule or backward pass has: use `PlannedProjection::forward`"
    )]
    GatedSchedule,
    /// A weight of an adapter that has no vectors here.
    #[error(
        "there is no adapter at the position {0}, or one that leaves this projection alone: its rows are multiplied by the base weight, and there is none to merge"
    )]
    NothingToMerge(u32),
    /// A weight of an adapter whose parts are weighed for each row.
    #[error(
        "the adapter at the position {0} has gates, which multiply between its factors, and a merged weight has none; serve it unmerged"
    )]
    GatedMerge(u32),
    /// Gates of an adapter whose weight is resident.
    #[error("the weight of the adapter at the position {0} is merged, where no gates can be applied; unmerge it first")]
    MergedGates(u32),
    /// The batch doesn't fit the adapters or the input.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The batch can't be scheduled.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Parts that make no layer.
    #[error(transparent)]
    Operands(#[from] OperandError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
