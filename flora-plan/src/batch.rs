//! The batch as the planner and the scheduler see it: contiguous segments of rows, and where each adapter's vectors lie in the
//! device's pools. No tensor data.

use flora_ir::algebra::{FoldedLayout, RowScales};
use serde::Serialize;

use crate::lowering::MultiplicativeLowering;

/// Classes of segments by their rows: 1, 2 and 3, 4 to 7, 8 to 15, 16 and more.
pub const ROW_CLASSES: usize = 5;

/// The class of a segment of so many rows.
fn row_class(rows: u32) -> usize {
    (rows.max(1).ilog2() as usize).min(ROW_CLASSES - 1)
}

/// A run of rows that share one adapter; segments follow one another in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Segment {
    /// How many rows.
    pub rows: u32,
    /// Index into the batch's table of [`AdapterSlots`].
    pub adapter: u32,
}

/// One virtual row of an adapter: positions in the pool of in-vectors `[slots, d]` and out-vectors `[slots, k]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct VirtualRowSlots {
    /// `None`: not scaled.
    pub in_scale: Option<u32>,
    /// `None`: not scaled.
    pub out_scale: Option<u32>,
}

/// The additive part of an adapter: `rank` consecutive vectors in both pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct LowRankSlots {
    /// The first shrink vector, in the pool of in-vectors.
    pub shrink: u32,
    /// The first expand vector, in the pool of out-vectors.
    pub expand: u32,
    /// How many; 0 for none.
    pub rank: u32,
}

impl LowRankSlots {
    fn end(self, first: u32) -> u32 {
        if self.rank == 0 { 0 } else { first.saturating_add(self.rank) }
    }
}

/// Where a folded adapter lies in the pools.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct AdapterSlots {
    /// At least one for every adapter that has a multiplicative or base part.
    pub virtual_rows: Vec<VirtualRowSlots>,
    /// The additive part.
    pub low_rank: LowRankSlots,
    /// Whether its W_i is resident beside the pools, for plans that [merge](crate::plan::Plan::merges). At most one adapter's of a
    /// layer is.
    pub is_merged: bool,
}

impl AdapterSlots {
    /// The base weight alone.
    pub fn base() -> Self {
        Self { virtual_rows: vec![VirtualRowSlots::default()], low_rank: LowRankSlots::default(), is_merged: false }
    }

    /// The same adapter with its W_i resident.
    #[must_use]
    pub fn merged(self) -> Self {
        Self { is_merged: true, ..self }
    }

    /// Slots for an adapter of this layout, counted from `first` in both pools. Of an adapter without virtual rows the product
    /// with the base weight counts for nothing, but the rows have to be written: it takes one that is scaled by zeros.
    pub fn of(layout: &FoldedLayout, first: u32) -> Self {
        let mut next = first;
        let mut take = |count: u32| {
            let slot = next;
            next = next.saturating_add(count);
            slot
        };
        let mut row = |scales: &RowScales| {
            let slot = (scales.in_scale || scales.out_scale).then(|| take(1));
            VirtualRowSlots { in_scale: slot.filter(|_| scales.in_scale), out_scale: slot.filter(|_| scales.out_scale) }
        };
        let virtual_rows = match &layout.virtual_rows[..] {
            [] => vec![row(&RowScales { in_scale: false, out_scale: true })],
            rows => rows.iter().map(row).collect(),
        };
        let rank = u32::try_from(layout.low_rank).unwrap_or(u32::MAX);
        let slot = take(rank);
        Self { virtual_rows, low_rank: LowRankSlots { shrink: slot, expand: slot, rank }, is_merged: false }
    }

    /// Where the adjoint's vectors lie, over w0ᵀ and with the two pools exchanged: what reads the same numbers for the gradient of
    /// the input.
    #[must_use]
    pub fn adjoint(&self) -> Self {
        let exchanged = |row: &VirtualRowSlots| VirtualRowSlots { in_scale: row.out_scale, out_scale: row.in_scale };
        let LowRankSlots { shrink, expand, rank } = self.low_rank;
        Self {
            virtual_rows: self.virtual_rows.iter().map(exchanged).collect(),
            low_rank: LowRankSlots { shrink: expand, expand: shrink, rank },
            is_merged: self.is_merged,
        }
    }

    /// One past the largest in-vector slot.
    pub fn in_slots(&self) -> u32 {
        let scales = self.virtual_rows.iter().filter_map(|scales| scales.in_scale);
        scales.map(|slot| slot.saturating_add(1)).max().unwrap_or(0).max(self.low_rank.end(self.low_rank.shrink))
    }

    /// One past the largest out-vector slot.
    pub fn out_slots(&self) -> u32 {
        let scales = self.virtual_rows.iter().filter_map(|scales| scales.out_scale);
        scales.map(|slot| slot.saturating_add(1)).max().unwrap_or(0).max(self.low_rank.end(self.low_rank.expand))
    }

    /// Whether its virtual part is exactly x @ w0.
    pub fn is_plain(&self) -> bool {
        matches!(self.virtual_rows[..], [VirtualRowSlots { in_scale: None, out_scale: None }])
    }
}

/// What pricing needs to know of a batch: a few sums, taken in one pass. Rows of an adapter whose W_i is resident are counted apart,
/// so that whoever doesn't multiply them by it [joins](BatchShape::joined) them to the others first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BatchShape {
    /// All rows, but those of `merged`, as everywhere below.
    pub tokens: u64,
    /// Distinct adapters with rows, the base among them.
    pub adapters: u64,
    /// Rows whose virtual part is x @ w0: base rows and LoRA rows.
    pub plain_rows: u64,
    /// Rows with scales or several virtual rows.
    pub multiplicative: GroupShape,
    /// Of those, the rows of adapters with several virtual rows, by the class of their segment's rows. An adapter with segments of
    /// two classes counts in both.
    pub wide: [GroupShape; ROW_CLASSES],
    /// Rows with an additive part beside x @ w0 (LoRA); counted above too.
    pub additive: GroupShape,
    /// Rows with an additive part beside a scaled one (DoRA); counted above too.
    pub scaled_additive: GroupShape,
    /// The rows of the adapter whose W_i is resident, where it has any.
    pub merged: Option<AdapterRows>,
}

/// The rows of one adapter in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AdapterRows {
    /// By the class of their segment's rows.
    rows_by_class: [u64; ROW_CLASSES],
    /// Virtual rows of each.
    width: u64,
    /// Whether these are the base weight's alone.
    is_plain: bool,
    rank: u64,
}

impl AdapterRows {
    fn new(adapter: &AdapterSlots, rows_by_class: [u64; ROW_CLASSES]) -> Self {
        let (width, rank) = (adapter.virtual_rows.len() as u64, u64::from(adapter.low_rank.rank));
        Self { rows_by_class, width, is_plain: adapter.is_plain(), rank }
    }

    /// How many.
    pub fn rows(&self) -> u64 {
        self.rows_by_class.iter().sum()
    }
}

/// One kind of rows in a batch. "Width" is the number of virtual rows, or the rank of the additive part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GroupShape {
    /// Rows.
    pub tokens: u64,
    /// Σ over rows of the width.
    pub tokens_times_width: u64,
    /// Distinct adapters.
    pub adapters: u64,
    /// Σ over distinct adapters of the width.
    pub widths: u64,
    /// The largest width.
    pub largest_width: u64,
    /// The rows of the adapter with the most rows.
    pub longest: u64,
}

impl GroupShape {
    /// Both groups as one.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.saturating_add(other.tokens),
            tokens_times_width: self.tokens_times_width.saturating_add(other.tokens_times_width),
            adapters: self.adapters + other.adapters,
            widths: self.widths.saturating_add(other.widths),
            largest_width: self.largest_width.max(other.largest_width),
            longest: self.longest.max(other.longest),
        }
    }

    fn add(&mut self, rows: u64, width: u64) {
        if rows > 0 {
            *self = self.and(Self {
                tokens: rows,
                tokens_times_width: rows.saturating_mul(width),
                adapters: 1,
                widths: width,
                largest_width: width,
                longest: rows,
            });
        }
    }
}

impl BatchShape {
    /// Sums up a batch. Segments that name the same adapter count as one adapter.
    ///
    /// Segments that name no entry of `adapters` are ignored; [`schedule`](crate::schedule::schedule) reports them.
    pub fn of(segments: &[Segment], adapters: &[AdapterSlots]) -> Self {
        BatchSummary::default().shape(segments, adapters)
    }
}

/// Sums up one batch after the other in the same memory: no call allocates that has no more adapters than one before it.
#[derive(Clone, Debug, Default)]
pub struct BatchSummary {
    /// Rows of every adapter by the class of their segment; all zero between calls.
    rows_of: Vec<[u64; ROW_CLASSES]>,
    /// The adapters with rows, in the order of their first segment.
    present: Vec<u32>,
}

impl BatchSummary {
    /// [`BatchShape::of`].
    pub fn shape(&mut self, segments: &[Segment], adapters: &[AdapterSlots]) -> BatchShape {
        if self.rows_of.len() < adapters.len() {
            self.rows_of.resize(adapters.len(), [0; ROW_CLASSES]);
        }
        self.present.clear();
        self.present.reserve(adapters.len());
        for segment in segments.iter().filter(|segment| (segment.adapter as usize) < adapters.len()) {
            let rows = &mut self.rows_of[segment.adapter as usize];
            if segment.rows > 0 {
                if *rows == [0; ROW_CLASSES] {
                    self.present.push(segment.adapter);
                }
                rows[row_class(segment.rows)] += u64::from(segment.rows);
            }
        }
        let mut shape = BatchShape::default();
        for position in &self.present {
            let adapter = &adapters[*position as usize];
            let by_class = std::mem::take(&mut self.rows_of[*position as usize]);
            let rows = AdapterRows::new(adapter, by_class);
            match shape.merged {
                None if adapter.is_merged => shape.merged = Some(rows),
                _ => shape.add(&rows),
            }
        }
        shape
    }
}

impl BatchShape {
    fn add(&mut self, own: &AdapterRows) {
        let AdapterRows { rows_by_class, width, is_plain, rank } = *own;
        let rows = own.rows();
        self.tokens += rows;
        self.adapters += 1;
        if is_plain {
            self.plain_rows += rows;
        } else {
            self.multiplicative.add(rows, width);
        }
        if width > 1 {
            self.wide.iter_mut().zip(rows_by_class).for_each(|(group, rows)| group.add(rows, width));
        }
        match (rank > 0, is_plain) {
            (false, _) => {}
            (true, true) => self.additive.add(rows, rank),
            (true, false) => self.scaled_additive.add(rows, rank),
        }
    }

    /// The same batch with no weight resident: all rows are counted alike.
    #[must_use]
    pub fn joined(mut self) -> Self {
        if let Some(own) = self.merged.take() {
            self.add(&own);
        }
        self
    }

    /// Rows that are multiplied by the resident W_i, where the plan merges.
    pub fn merged_rows(&self) -> u64 {
        self.merged.map_or(0, |own| own.rows())
    }

    /// All rows of the batch.
    pub fn all_rows(&self) -> u64 {
        self.tokens.saturating_add(self.merged_rows())
    }

    /// The rows whose low-rank sum is computed by itself: a W_i that is made in memory holds the one of its adapter.
    pub(crate) fn summed_beside(&self, multiplicative: MultiplicativeLowering) -> GroupShape {
        match multiplicative {
            MultiplicativeLowering::Stacked | MultiplicativeLowering::OnChip => self.additive.and(self.scaled_additive),
            MultiplicativeLowering::Bmm => self.additive,
        }
    }

    /// The rows of adapters with several virtual rows whose segments have at least `rows` rows, and those of the others; `rows`
    /// is rounded up to the first of a class.
    pub(crate) fn wide_from(&self, rows: u32) -> (GroupShape, GroupShape) {
        let sum = |groups: &[GroupShape]| groups.iter().copied().fold(GroupShape::default(), GroupShape::and);
        let (below, from) = self.wide.split_at(row_class(rows.next_power_of_two()));
        (sum(from), sum(below))
    }
}
