//! One pass over a base weight: what is multiplied, and where its outputs go.

use flora_plan::schedule::{LowRankRows, OnChipSegment, Scale, ScheduledRow};

use crate::finish::Finish;
use crate::kernel::Form;
use crate::pack::Vectors;
use crate::values::RowSink;
use crate::weight::Strips;

/// The rows of a pass; the fields are those of [`Gemm`](flora_plan::schedule::Gemm).
#[derive(Clone, Copy, Default)]
pub(crate) struct Rows<'a> {
    pub(crate) rows: &'a [ScheduledRow],
    pub(crate) segments: &'a [OnChipSegment],
    pub(crate) scales: &'a [Scale],
    pub(crate) low_rank: &'a [LowRankRows],
    /// The row of x that each of `rows` reads, by its own row; none: they read their own.
    pub(crate) sources: &'a [u32],
}

impl<'a> Rows<'a> {
    /// Virtual rows alone.
    pub(crate) fn plain(rows: &'a [ScheduledRow]) -> Self {
        Self { rows, ..Self::default() }
    }
}

/// What a pass reads and writes.
#[derive(Clone, Copy)]
pub(crate) struct Pass<'a> {
    /// What is multiplied: pairs where the weight has some and the processor multiplies them.
    pub(crate) form: Form,
    pub(crate) weight: Strips<'a>,
    /// `[tokens, d]`
    pub(crate) x: Vectors<'a>,
    /// `[slots, d]`
    pub(crate) in_pool: Vectors<'a>,
    /// `[slots, k]`
    pub(crate) out_pool: Vectors<'a>,
    pub(crate) rows: Rows<'a>,
    /// x @ b of every row of `rows.low_rank`, one run after the other.
    pub(crate) hidden: &'a [f32],
    /// `None`: the sums are written as they are.
    pub(crate) finish: Option<Finish<'a>>,
    /// `[tokens, k]`
    pub(crate) sink: RowSink,
}
