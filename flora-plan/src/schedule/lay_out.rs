//! Laying out a plan's steps for a batch: which rows each of them takes, and where their vectors are.

use super::error::ScheduleError;
use super::kept::Kept;
use super::limits::{batch_fits, check};
use super::steps::{
    Gemm, LowRankBmm, LowRankRows, Materialised, MaterialisedAdapter, Merged, NO_ROW, OnChipSegment, Packing,
    SEGMENT_ITEM_ROWS, Scale, ScheduledRow, SegmentItem, Step, WeightRun,
};
use crate::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use crate::layer::LayerShape;
use crate::lowering::{AdditiveLowering, MultiplicativeLowering};
use crate::plan::{Plan, SeparateParts};

/// The steps of one batch. Only this module makes one: its indices are within the batch and the slots that it names. Nothing in
/// it is of a layer's shape, so that layers whose adapters lie alike share one; [`Schedule::fits`] says which it fits.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// What its buffers follow from, with a shape.
    plan: Plan,
    batch: BatchShape,
    tokens: u32,
    in_slots: u32,
    out_slots: u32,
    steps: Vec<Step>,
    kept: Kept,
}

/// Schedules are equal that do the same, whatever plan they were laid out for and whatever devices keep with them.
impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        let whole = |one: &Self| (one.tokens, one.in_slots, one.out_slots, one.splits());
        whole(self) == whole(other) && self.steps == other.steps
    }
}

impl Eq for Schedule {}

impl Schedule {
    /// y = x @ w0 for `tokens` rows, whatever the adapters: what others are measured against. For layers of `shape`, and all others
    /// that it fits.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn base_gemm(shape: LayerShape, tokens: u32) -> Result<Self, ScheduleError> {
        let batch = BatchShape { adapters: 1, plain_rows: tokens.into(), ..BatchShape::default() };
        Self::of_base(shape, tokens, batch, || {
            let rows = (0..tokens).map(|row| ScheduledRow { row, in_slot: 0, out_slot: 0, last: 1 }).collect();
            vec![Step::Gemm(Gemm { rows, finishes: true, ..Gemm::default() })]
        })
    }

    /// The epilogue of `tokens` rows, `times` times: what a launch costs.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn finish(shape: LayerShape, tokens: u32, times: usize) -> Result<Self, ScheduleError> {
        Self::of_base(shape, tokens, BatchShape::default(), || vec![Step::Finish; times])
    }

    fn of_base(
        shape: LayerShape,
        tokens: u32,
        batch: BatchShape,
        steps: impl FnOnce() -> Vec<Step>,
    ) -> Result<Self, ScheduleError> {
        let (plan, batch) = (Plan::default(), BatchShape { tokens: tokens.into(), ..batch });
        check(&plan, shape, &batch)?;
        let steps = if tokens == 0 { Vec::new() } else { steps() };
        Ok(Self { plan, batch, tokens, in_slots: 0, out_slots: 0, steps, kept: Kept::default() })
    }

    /// The schedule without its passes over the base weight: what else it does, for measuring.
    #[must_use]
    pub fn without_gemm(mut self) -> Self {
        self.steps.retain(|step| match step {
            Step::Gemm(_) => false,
            Step::Materialised(_) | Step::Merged(_) | Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => {
                true
            }
        });
        self
    }

    /// Whether kernels can index x, y and what the steps put in memory, for a layer of this shape. Whoever runs a schedule asks.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn fits(&self, shape: LayerShape) -> Result<(), ScheduleError> {
        check(&self.plan, shape, &self.batch)
    }

    /// Rows of the batch.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// One past the largest in-vector slot in use.
    pub fn in_slots(&self) -> u32 {
        self.in_slots
    }

    /// One past the largest out-vector slot in use.
    pub fn out_slots(&self) -> u32 {
        self.out_slots
    }

    /// Whether cubes may share the depth.
    pub fn splits(&self) -> bool {
        self.plan.splits()
    }

    /// The adapter whose resident W_i the batch runs on, where it has rows that do.
    pub fn merged_adapter(&self) -> Option<u32> {
        self.steps.iter().find_map(|step| match step {
            Step::Merged(merged) => Some(merged.adapter),
            Step::Gemm(_) | Step::Materialised(_) | Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => None,
        })
    }

    /// What devices keep with it.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// In order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

/// Lays out the steps of `plan` for a batch. Rows of one adapter are packed together wherever they stand in the batch. `shape` is
/// that of the layer that runs it first: what is too large for it isn't laid out. The steps don't depend on it.
///
/// # Errors
/// A segment of an unknown adapter; several adapters whose weights are said to be resident; a buffer too large to index.
pub fn schedule(
    plan: &Plan,
    shape: LayerShape,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    finishes: bool,
) -> Result<Schedule, ScheduleError> {
    let tokens = segments.iter().map(|segment| u64::from(segment.rows)).sum::<u64>();
    batch_fits(shape, tokens)?;
    let batch = BatchShape::of(segments, adapters);
    check(plan, shape, &batch)?;
    let rows_of = rows_by_adapter(segments, adapters)?;
    one_is_merged(adapters)?;
    let steps = steps(plan, segments, adapters, &rows_of, finishes);
    let used = || adapters.iter().zip(&rows_of).filter(|(_, rows)| !rows.is_empty()).map(|(adapter, _)| adapter);
    Ok(Schedule {
        plan: *plan,
        batch,
        tokens: tokens as u32,
        in_slots: used().map(AdapterSlots::in_slots).max().unwrap_or(0),
        out_slots: used().map(AdapterSlots::out_slots).max().unwrap_or(0),
        steps,
        kept: Kept::default(),
    })
}

/// Whether the table says of one adapter at most that its W_i is resident.
fn one_is_merged(adapters: &[AdapterSlots]) -> Result<(), ScheduleError> {
    let mut merged = (0..).zip(adapters).filter_map(|(position, adapter)| adapter.is_merged.then_some(position));
    match (merged.next(), merged.next()) {
        (Some(first), Some(second)) => Err(ScheduleError::NotOneAdapter { first, second }),
        _ => Ok(()),
    }
}

/// The steps of a plan: those that write rows, each of which is written once, and those that add to them.
fn steps(
    plan: &Plan,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    rows_of: &[Vec<u32>],
    finishes: bool,
) -> Vec<Step> {
    let parts = plan.parts();
    let merges = |adapter: &AdapterSlots| plan.merges() && adapter.is_merged;
    let materialises =
        |adapter: &AdapterSlots| parts.multiplicative.materialises() && !adapter.is_plain() && !merges(adapter);
    // A weight of an adapter's own holds its additive part already.
    let adds = |adapter: &AdapterSlots| adapter.low_rank.rank > 0 && !materialises(adapter) && !merges(adapter);
    let has_own_weight = |adapter: &AdapterSlots| materialises(adapter) || merges(adapter);
    let adds_later = parts.additive.adds_later()
        && adapters.iter().zip(rows_of).any(|(adapter, rows)| !rows.is_empty() && adds(adapter));
    let mut steps = Vec::new();
    let gemm = Gemm { finishes: finishes && !adds_later, ..gemm(parts, segments, adapters, has_own_weight, adds) };
    if !(gemm.rows.is_empty() && gemm.segments.is_empty()) {
        steps.push(Step::Gemm(gemm));
    }
    if let Some(step) = materialised(parts, segments, adapters, materialises, finishes && !adds_later) {
        steps.push(Step::Materialised(step));
    }
    if let Some(step) = merged(parts, segments, adapters, merges, finishes && !adds_later) {
        steps.push(Step::Merged(step));
    }
    if adds_later {
        match parts.additive {
            // In the launch of the base GEMM.
            AdditiveLowering::Fused => {}
            AdditiveLowering::Segmented => steps.push(segmented(segments, adapters, adds)),
            AdditiveLowering::Bmm => steps.push(Step::LowRankBmm(low_rank_bmm(adapters, rows_of, adds))),
        }
        if finishes {
            steps.push(Step::Finish);
        }
    }
    steps
}

/// The rows of every adapter that isn't plain; of a plain one without an additive part, whether it has any.
fn rows_by_adapter(segments: &[Segment], adapters: &[AdapterSlots]) -> Result<Vec<Vec<u32>>, ScheduleError> {
    let mut rows_of = vec![Vec::new(); adapters.len()];
    let mut row = 0u32;
    for (position, segment) in segments.iter().enumerate() {
        let unknown =
            ScheduleError::UnknownAdapter { segment: position, adapter: segment.adapter, adapters: adapters.len() };
        let adapter = adapters.get(segment.adapter as usize).ok_or(unknown)?;
        if adapter.virtual_rows.is_empty() {
            return Err(ScheduleError::NoVirtualRow { adapter: segment.adapter as usize });
        }
        let end = row + segment.rows;
        let packed = !adapter.is_plain() || adapter.low_rank.rank > 0;
        rows_of[segment.adapter as usize].extend((row..end).take(if packed { usize::MAX } else { 1 }));
        row = end;
    }
    Ok(rows_of)
}

fn slot(slot: Option<u32>) -> u32 {
    slot.map_or(0, |slot| slot.saturating_add(1))
}

/// Segments of one adapter that follow one another.
struct Run {
    /// The row that it starts at.
    first_row: u32,
    /// All of them as one.
    segment: Segment,
    /// Whether each of them is long enough for [`SeparateParts::on_chip_from`].
    is_long: bool,
}

/// The segments, those of one adapter that follow one another joined, but none to one of another kind: what a row is computed by
/// must not depend on its neighbours.
fn runs(parts: SeparateParts, segments: &[Segment]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(segments.len());
    let mut first_row = 0;
    for segment in segments.iter().filter(|segment| segment.rows > 0) {
        let is_long = segment.rows >= parts.on_chip_from();
        match runs.last_mut() {
            Some(last) if last.segment.adapter == segment.adapter && last.is_long == is_long => {
                last.segment.rows += segment.rows;
            }
            _ => runs.push(Run { first_row, segment: *segment, is_long }),
        }
        first_row += segment.rows;
    }
    runs
}

fn scale(scales: &VirtualRowSlots) -> Scale {
    Scale { in_slot: slot(scales.in_scale), out_slot: slot(scales.out_scale) }
}

/// The rows that no weight of their adapter's own multiplies. An adapter of one virtual row is scaled as it is loaded whatever the
/// lowering: a tile of W_i would spare nothing.
fn gemm(
    parts: SeparateParts,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    has_own_weight: impl Fn(&AdapterSlots) -> bool,
    adds: impl Fn(&AdapterSlots) -> bool,
) -> Gemm {
    let makes_on_chip = match parts.multiplicative {
        MultiplicativeLowering::OnChip => true,
        MultiplicativeLowering::Stacked | MultiplicativeLowering::Bmm => false,
    };
    let mut gemm = Gemm::default();
    let mut scales_of = vec![None; adapters.len()];
    for Run { first_row, segment, is_long } in runs(parts, segments) {
        let position = segment.adapter as usize;
        let adapter = &adapters[position];
        if has_own_weight(adapter) {
            continue;
        }
        if makes_on_chip && is_long && adapter.virtual_rows.len() > 1 {
            let (first_scale, end_scale) = *scales_of[position].get_or_insert_with(|| {
                let first = gemm.scales.len() as u32;
                gemm.scales.extend(adapter.virtual_rows.iter().map(scale));
                (first, gemm.scales.len() as u32)
            });
            gemm.segments.push(OnChipSegment { first_row, rows: segment.rows, first_scale, end_scale });
        } else {
            let last = adapter.virtual_rows.len().saturating_sub(1);
            for row in first_row..first_row + segment.rows {
                gemm.rows.extend(adapter.virtual_rows.iter().enumerate().map(|(position, scales)| {
                    let Scale { in_slot, out_slot } = scale(scales);
                    ScheduledRow { row, in_slot, out_slot, last: u32::from(position == last) }
                }));
            }
        }
        if adds(adapter) && !parts.additive.adds_later() {
            let LowRankSlots { shrink, expand, rank } = adapter.low_rank;
            gemm.low_rank.push(LowRankRows { first_row, rows: segment.rows, shrink, expand, rank });
        }
    }
    gemm
}

/// One block an adapter, every block as long as the longest.
fn pack(blocks: &[Vec<u32>]) -> Packing {
    let block = blocks.iter().map(Vec::len).max().unwrap_or(0);
    let padded =
        |rows: &Vec<u32>| rows.iter().copied().chain(std::iter::repeat(NO_ROW)).take(block).collect::<Vec<_>>();
    Packing { block: block as u32, index: blocks.iter().flat_map(padded).collect() }
}

/// What makes the W_i of one adapter, its virtual rows appended to `scales`.
fn materialised_adapter(adapter: &AdapterSlots, scales: &mut Vec<Scale>) -> MaterialisedAdapter {
    let first_scale = scales.len() as u32;
    scales.extend(adapter.virtual_rows.iter().map(scale));
    let LowRankSlots { shrink, expand, rank } = adapter.low_rank;
    MaterialisedAdapter { first_scale, end_scale: scales.len() as u32, shrink, expand, rank }
}

impl Materialised {
    /// W_i of one adapter and nothing multiplied by it: what `merged` keeps.
    pub fn weight_of(adapter: &AdapterSlots) -> Self {
        let mut scales = Vec::new();
        let adapters = vec![materialised_adapter(adapter, &mut scales)];
        Self { adapters, scales, runs: Vec::new(), finishes: false }
    }
}

fn materialised(
    parts: SeparateParts,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    materialises: impl Fn(&AdapterSlots) -> bool,
    finishes: bool,
) -> Option<Materialised> {
    let mut step = Materialised { adapters: Vec::new(), scales: Vec::new(), runs: Vec::new(), finishes };
    let mut weight_of = vec![None; adapters.len()];
    for Run { first_row, segment, .. } in runs(parts, segments) {
        let position = segment.adapter as usize;
        if materialises(&adapters[position]) {
            let weight = *weight_of[position].get_or_insert_with(|| {
                step.adapters.push(materialised_adapter(&adapters[position], &mut step.scales));
                step.adapters.len() as u32 - 1
            });
            step.runs.push(WeightRun { first_row, rows: segment.rows, weight });
        }
    }
    (!step.runs.is_empty()).then_some(step)
}

/// The rows of the adapter whose W_i is resident.
fn merged(
    parts: SeparateParts,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    merges: impl Fn(&AdapterSlots) -> bool,
    finishes: bool,
) -> Option<Merged> {
    let own = |run: &Run| merges(&adapters[run.segment.adapter as usize]);
    let mut runs = runs(parts, segments).into_iter().filter(own).peekable();
    let adapter = runs.peek()?.segment.adapter;
    let run = |run: Run| WeightRun { first_row: run.first_row, rows: run.segment.rows, weight: 0 };
    Some(Merged { adapter, runs: runs.map(run).collect(), finishes })
}

fn segmented(segments: &[Segment], adapters: &[AdapterSlots], adds: impl Fn(&AdapterSlots) -> bool) -> Step {
    let mut items = Vec::new();
    let (mut row, mut offset) = (0, 0);
    for segment in segments {
        let adapter = &adapters[segment.adapter as usize];
        if adds(adapter) {
            let low_rank = adapter.low_rank;
            for first in (0..segment.rows).step_by(SEGMENT_ITEM_ROWS as usize) {
                let rows = SEGMENT_ITEM_ROWS.min(segment.rows - first);
                items.push(SegmentItem {
                    first_row: row + first,
                    rows,
                    shrink: low_rank.shrink,
                    expand: low_rank.expand,
                    rank: low_rank.rank,
                    offset,
                });
                offset += rows * low_rank.rank;
            }
        }
        row += segment.rows;
    }
    Step::Segmented { items, h_len: offset }
}

fn low_rank_bmm(adapters: &[AdapterSlots], rows_of: &[Vec<u32>], adds: impl Fn(&AdapterSlots) -> bool) -> LowRankBmm {
    let (mut rows, mut shrink, mut expand) = (Vec::new(), Vec::new(), Vec::new());
    for (adapter, adapter_rows) in
        adapters.iter().zip(rows_of).filter(|(adapter, rows)| !rows.is_empty() && adds(adapter))
    {
        let low_rank = adapter.low_rank;
        rows.push(adapter_rows.clone());
        shrink.push((low_rank.shrink..).take(low_rank.rank as usize).collect());
        expand.push((low_rank.expand..).take(low_rank.rank as usize).collect());
    }
    LowRankBmm { rows: pack(&rows), shrink: pack(&shrink), expand: pack(&expand) }
}
