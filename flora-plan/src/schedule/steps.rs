//! What a schedule is made of: the steps, and the entries of their tables in the layout that kernels read.

use bytemuck::{Pod, Zeroable};

/// An entry of a packing that stands for no row.
pub const NO_ROW: u32 = u32::MAX;
/// The most rows of a [`SegmentItem`].
pub const SEGMENT_ITEM_ROWS: u32 = 16;

/// A virtual row of the batch; slots count from 1, 0 is "not scaled".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct ScheduledRow {
    /// The row of x that it reads and of y that it adds to.
    pub row: u32,
    /// In-vector slot + 1, or 0.
    pub in_slot: u32,
    /// Out-vector slot + 1, or 0.
    pub out_slot: u32,
    /// 1 on the last virtual row of its row.
    pub last: u32,
}

/// Consecutive rows of one segment that a cube of `shrink` and of `expand` computes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SegmentItem {
    /// The first row.
    pub first_row: u32,
    /// How many, at most [`SEGMENT_ITEM_ROWS`].
    pub rows: u32,
    /// The first shrink slot.
    pub shrink: u32,
    /// The first expand slot.
    pub expand: u32,
    /// The rank.
    pub rank: u32,
    /// Where the rows' h starts.
    pub offset: u32,
}

/// An adapter whose W_i is materialised.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct MaterialisedAdapter {
    /// Its first entry in [`Materialised::scales`].
    pub first_scale: u32,
    /// One past its last.
    pub end_scale: u32,
    /// The first shrink slot of its additive part.
    pub shrink: u32,
    /// The first expand slot.
    pub expand: u32,
    /// The rank of the additive part.
    pub rank: u32,
}

/// The scales of one virtual row of a materialised adapter; slots count from 1, 0 is "not scaled".
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Scale {
    /// In-vector slot + 1, or 0.
    pub in_slot: u32,
    /// Out-vector slot + 1, or 0.
    pub out_slot: u32,
}

/// Consecutive rows whose W_i is made tile by tile.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct OnChipSegment {
    /// The first row.
    pub first_row: u32,
    /// How many.
    pub rows: u32,
    /// Its adapter's first entry in [`Gemm::scales`].
    pub first_scale: u32,
    /// One past its last.
    pub end_scale: u32,
}

/// Consecutive rows that share a low-rank sum.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct LowRankRows {
    /// The first row.
    pub first_row: u32,
    /// How many.
    pub rows: u32,
    /// The first shrink slot.
    pub shrink: u32,
    /// The first expand slot.
    pub expand: u32,
    /// The rank.
    pub rank: u32,
}

/// Consecutive rows that are multiplied by one weight of an adapter's own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct WeightRun {
    /// The first row.
    pub first_row: u32,
    /// How many.
    pub rows: u32,
    /// Which weight.
    pub weight: u32,
}

/// One pass over the base weight for rows of every kind. A row is in `rows` or in `segments`, never in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gemm {
    /// `stacked` and base rows: the virtual rows of an output row follow one another, output rows rise.
    pub rows: Vec<ScheduledRow>,
    /// `on_chip` rows, rising.
    pub segments: Vec<OnChipSegment>,
    /// The virtual rows of the adapters of `segments`.
    pub scales: Vec<Scale>,
    /// `fused` low-rank sums, added to rows of either kind; rising.
    pub low_rank: Vec<LowRankRows>,
    /// Whether nothing is added to these rows afterwards, so that they are finished here.
    pub finishes: bool,
}

impl Gemm {
    /// Whether every row is exactly x @ w0.
    pub fn is_plain(&self) -> bool {
        self.segments.is_empty()
            && self.low_rank.is_empty()
            && self.rows.iter().all(|row| row.in_slot == 0 && row.out_slot == 0 && row.last == 1)
    }
}

/// Rows packed into equal blocks, one block an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// Rows of a block.
    pub block: u32,
    /// The row in every place, [`NO_ROW`] for padding; its length is blocks × `block`.
    pub index: Vec<u32>,
}

/// The `bmm` lowering of multiplicative adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Materialised {
    /// The adapters whose W_i are made.
    pub adapters: Vec<MaterialisedAdapter>,
    /// Their virtual rows.
    pub scales: Vec<Scale>,
    /// Their rows, rising.
    pub runs: Vec<WeightRun>,
    /// Whether nothing is added to these rows afterwards.
    pub finishes: bool,
}

/// The rows of the adapter whose W_i is resident: a [`Materialised`] whose one weight is there already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merged {
    /// Its position in the layer's table.
    pub adapter: u32,
    /// Its rows, rising, all by the weight 0.
    pub runs: Vec<WeightRun>,
    /// Whether nothing is added to these rows afterwards.
    pub finishes: bool,
}

/// The `bmm` lowering of additive adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LowRankBmm {
    /// The rows, a block an adapter.
    pub rows: Packing,
    /// The shrink slots, a block an adapter, padded to the largest rank.
    pub shrink: Packing,
    /// The expand slots, likewise.
    pub expand: Packing,
}

/// One step of the batch's execution; each may use the ones before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// y\[row\] = Σ of the row's virtual rows, or x\[row\] @ W_i, and its low-rank sum.
    Gemm(Gemm),
    /// y\[row\] = x\[row\] @ W_i, made whole.
    Materialised(Materialised),
    /// y\[row\] = x\[row\] @ W_i, resident.
    Merged(Merged),
    /// y\[row\] += (x\[row\] @ b_i) @ a_i, by segment. `h_len` is the length of the intermediate.
    Segmented {
        /// The work items.
        items: Vec<SegmentItem>,
        /// Σ rows × rank.
        h_len: u32,
    },
    /// The same by padded batched matmuls.
    LowRankBmm(LowRankBmm),
    /// The epilogue of all rows. Left out where the layer has none, or where the steps before it apply it.
    Finish,
}

impl Step {
    /// Kernel launches on a device.
    pub fn launches(&self) -> u64 {
        match self {
            Step::Gemm(_) | Step::Merged(_) | Step::Finish => 1,
            Step::Materialised(_) | Step::Segmented { .. } => 2,
            Step::LowRankBmm(_) => 6,
        }
    }
}
