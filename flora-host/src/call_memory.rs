//! What one call keeps between its steps, apart from the scratch of its threads.

use flora_plan::schedule::{LowRankRows, ScheduledRow};

use crate::buffer::Buffer;
use crate::shrink::Shrink;

/// What one call needs beside its threads' scratch.
#[derive(Default)]
pub(crate) struct CallMemory {
    /// Outputs that later steps add to, where y itself is too narrow for sums.
    pub(crate) stage: Buffer,
    pub(crate) lent: Lent,
}

/// What the steps of a call use one after the other.
#[derive(Default)]
pub(crate) struct Lent {
    /// The shrunk rows of every low-rank sum.
    pub(crate) hidden: Buffer,
    /// A materialised W_i.
    pub(crate) weight: Buffer,
    /// Row tiles to shrink.
    pub(crate) shrinks: Vec<Shrink>,
    /// Rows of a pass that the schedule doesn't list.
    pub(crate) rows: Vec<ScheduledRow>,
    /// Low-rank sums that the schedule lists in another form.
    pub(crate) runs: Vec<LowRankRows>,
    /// What a backward pass needs beside these.
    pub(crate) gradient: GradientMemory,
}

/// What the gradients of adapters' vectors are computed with.
#[derive(Default)]
pub(crate) struct GradientMemory {
    /// Products of stacked rows that are to be reduced.
    pub(crate) products: Buffer,
    /// The rows of the batch that they are products of.
    pub(crate) sources: Vec<u32>,
    /// Rows of g in strips.
    pub(crate) strips: Buffer,
    /// Out-vectors in slices.
    pub(crate) vectors: Buffer,
    /// Sums over a part of the inputs.
    pub(crate) partial: Buffer,
    /// Adapters whose tiles are made at the same time.
    pub(crate) group: Vec<OuterAdapter>,
    /// Shrunk rows, rank by rank.
    pub(crate) turned: Buffer,
    /// Low-rank gradients.
    pub(crate) runs: Vec<LowRankRows>,
}

/// An adapter of those whose tiles are made at the same time: where its parts lie in their memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OuterAdapter {
    /// Among the adapters of the lowering.
    pub(crate) at: usize,
    pub(crate) rows: usize,
    /// Its rows of g in strips: `[strips, rows, STRIP]`.
    pub(crate) strips: usize,
    /// The partners of its in-scales: `[slices, in_scales, X_PITCH]`.
    pub(crate) vectors: usize,
    /// Its sums: `[tasks, out_scales, pitch]`.
    pub(crate) partial: usize,
}
