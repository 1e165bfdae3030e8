//! From a plan and a batch to the steps that run it: which rows, which vectors, in which order. Index tables, no tensor data;
//! the host backend and every kernel read the same ones.

use bytemuck::{Pod, Zeroable};

use crate::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use crate::layer::LayerShape;
use crate::lowering::Lowering;
use crate::plan::Plan;

/// An entry of a packing that stands for no row.
pub const NO_ROW: u32 = u32::MAX;
/// The most rows of a [`SegmentItem`].
pub const SEGMENT_ITEM_ROWS: u32 = 16;

/// A virtual row of the batch; slots count from 1, 0 is "not scaled".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VirtualRow {
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

/// Consecutive rows that are multiplied by one materialised weight.
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
    pub rows: Vec<VirtualRow>,
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
    /// y = φ(x @ W_i + bias) for all rows, with the resident W_i of this entry of the adapter table.
    Merged {
        /// Position in the table.
        adapter: u32,
    },
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
            Step::Gemm(_) | Step::Merged { .. } | Step::Finish => 1,
            Step::Materialised(_) | Step::Segmented { .. } => 2,
            Step::LowRankBmm(_) => 6,
        }
    }
}

/// The steps of one batch. Only this module makes one: its indices are within the batch and the slots that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    shape: LayerShape,
    tokens: u32,
    in_slots: u32,
    out_slots: u32,
    splits: bool,
    steps: Vec<Step>,
}

impl Schedule {
    /// y = x @ w0 for `tokens` rows, whatever the adapters: what others are measured against.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn base_gemm(shape: LayerShape, tokens: u32) -> Result<Self, ScheduleError> {
        batch_fits(shape, u64::from(tokens))?;
        let rows = (0..tokens).map(|row| VirtualRow { row, in_slot: 0, out_slot: 0, last: 1 }).collect();
        let gemm = Gemm { rows, finishes: true, ..Gemm::default() };
        Self::of_base(shape, tokens, if tokens == 0 { Vec::new() } else { vec![Step::Gemm(gemm)] })
    }

    /// The epilogue of `tokens` rows, `times` times: what a launch costs.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn finish(shape: LayerShape, tokens: u32, times: usize) -> Result<Self, ScheduleError> {
        Self::of_base(shape, tokens, if tokens == 0 { Vec::new() } else { vec![Step::Finish; times] })
    }

    fn of_base(shape: LayerShape, tokens: u32, steps: Vec<Step>) -> Result<Self, ScheduleError> {
        batch_fits(shape, u64::from(tokens))?;
        Ok(Self { shape, tokens, in_slots: 0, out_slots: 0, splits: false, steps })
    }

    /// The schedule without its passes over the base weight: what else it does, for measuring.
    #[must_use]
    pub fn without_gemm(mut self) -> Self {
        self.steps.retain(|step| !matches!(step, Step::Gemm(_)));
        self
    }

    /// Extents of the layer that it was made for.
    pub fn shape(&self) -> LayerShape {
        self.shape
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
        self.splits
    }

    /// In order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }
}

/// Why a batch can't be scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A segment names an adapter that the table lacks.
    #[error(
        "segment {segment} names adapter {adapter}, but the batch has {adapters}; load it or send the segment to the base"
    )]
    UnknownAdapter {
        /// Position of the segment.
        segment: usize,
        /// What it names.
        adapter: u32,
        /// Length of the table.
        adapters: usize,
    },
    /// An adapter that leaves its rows unwritten.
    #[error(
        "adapter {adapter} has no virtual row, so that nothing would write its rows; give it one with a zero out-scale"
    )]
    NoVirtualRow {
        /// Position in the table.
        adapter: usize,
    },
    /// A merged weight serves its own adapter alone.
    #[error(
        "`merged` serves one adapter and the batch names {adapters}; use another lowering, or send the others apart"
    )]
    NotOneAdapter {
        /// Distinct adapters of the batch.
        adapters: u64,
    },
    /// An index would not fit.
    #[error("{what} would have {elements} elements, and kernels index 2^31; split the batch")]
    TooLarge {
        /// Which buffer.
        what: &'static str,
        /// Its size.
        elements: u64,
    },
}

/// Lays out the steps of `plan` for a batch. Rows of one adapter are packed together wherever they stand in the batch.
///
/// # Errors
/// A segment of an unknown adapter; a buffer too large to index.
pub fn schedule(
    plan: &Plan,
    shape: LayerShape,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    finishes: bool,
) -> Result<Schedule, ScheduleError> {
    let tokens = segments.iter().map(|segment| u64::from(segment.rows)).sum::<u64>();
    batch_fits(shape, tokens)?;
    let rows_of = rows_by_adapter(segments, adapters)?;
    let batch = BatchShape::of(segments, adapters);
    for (what, elements) in buffers(plan, shape, &batch) {
        fits(what, elements)?;
    }
    if plan.multiplicative() == Lowering::Merged && batch.adapters > 1 {
        return Err(ScheduleError::NotOneAdapter { adapters: batch.adapters });
    }
    let (tokens, mut steps) = (tokens as u32, Vec::new());
    if tokens == 0 {
        return Ok(Schedule { shape, tokens, in_slots: 0, out_slots: 0, splits: plan.splits(), steps });
    }

    let has_rows = |adapter: usize| !rows_of[adapter].is_empty();
    let lowering = plan.multiplicative();
    if lowering == Lowering::Merged {
        let own = (0..adapters.len()).find(|adapter| has_rows(*adapter));
        steps.extend(own.map(|adapter| Step::Merged { adapter: adapter as u32 }));
    } else {
        let materialises = |adapter: &AdapterSlots| lowering == Lowering::Bmm && !adapter.is_plain();
        // A materialised weight holds the additive part of its adapter already.
        let adds = |adapter: &AdapterSlots| adapter.low_rank.rank > 0 && !materialises(adapter);
        let adds_later = plan.additive() != Lowering::Fused
            && adapters.iter().enumerate().any(|(position, adapter)| has_rows(position) && adds(adapter));
        let gemm = Gemm { finishes: finishes && !adds_later, ..gemm(plan, segments, adapters, materialises, adds) };
        if !(gemm.rows.is_empty() && gemm.segments.is_empty()) {
            steps.push(Step::Gemm(gemm));
        }
        if let Some(step) = materialised(plan, segments, adapters, materialises, finishes && !adds_later) {
            steps.push(Step::Materialised(step));
        }
        if adds_later {
            steps.push(match plan.additive() {
                Lowering::Bmm => Step::LowRankBmm(low_rank_bmm(adapters, &rows_of, adds)),
                _ => segmented(segments, adapters, adds),
            });
            if finishes {
                steps.push(Step::Finish);
            }
        }
    }
    let used = || adapters.iter().zip(&rows_of).filter(|(_, rows)| !rows.is_empty()).map(|(adapter, _)| adapter);
    Ok(Schedule {
        shape,
        tokens,
        in_slots: used().map(AdapterSlots::in_slots).max().unwrap_or(0),
        out_slots: used().map(AdapterSlots::out_slots).max().unwrap_or(0),
        splits: plan.splits(),
        steps,
    })
}

/// Kernels index with 32 bits; half of them leave room for the last cube's units past the end, and for "no row".
const INDEX_LIMIT: u64 = i32::MAX as u64;

fn fits(what: &'static str, elements: u64) -> Result<(), ScheduleError> {
    if elements <= INDEX_LIMIT { Ok(()) } else { Err(ScheduleError::TooLarge { what, elements }) }
}

fn batch_fits(shape: LayerShape, tokens: u64) -> Result<(), ScheduleError> {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    fits("the batch", tokens)?;
    fits("x", tokens * d)?;
    fits("y", tokens * k)?;
    fits("the base weight", d * k)
}

/// What a plan puts in memory beside x, y and the layer's operands, in elements.
fn buffers(plan: &Plan, shape: LayerShape, batch: &BatchShape) -> [(&'static str, u64); 5] {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let group = batch.multiplicative;
    let materialises = plan.multiplicative() == Lowering::Bmm;
    let scaled = match plan.multiplicative() {
        Lowering::Stacked => group.tokens_times_width,
        Lowering::OnChip => group.tokens_times_width - batch.wide_from(plan.on_chip_from()).0.tokens_times_width,
        _ => 0,
    };
    let additive = if materialises { batch.additive } else { batch.additive.and(batch.scaled_additive) };
    let packs = plan.additive() == Lowering::Bmm;
    let of = |used: bool, elements: u64| if used { elements } else { 0 };
    [
        ("the table of virtual rows", 4 * (batch.plain_rows + scaled)),
        ("the table of materialised weights", of(materialises, group.adapters * d * k)),
        ("the packed rows of additive adapters", of(packs, additive.adapters * additive.longest * d.max(k))),
        ("the packed vectors of additive adapters", of(packs, additive.adapters * additive.largest_width * d.max(k))),
        ("the shrunk rows", additive.adapters * additive.longest * additive.largest_width),
    ]
}

/// Whether a plan's buffers can be indexed and are no longer than the device's longest.
pub fn can_hold(plan: &Plan, shape: LayerShape, batch: &BatchShape, largest_buffer_bytes: Option<u64>) -> bool {
    let longest = largest_buffer_bytes.map_or(u64::MAX, |bytes| bytes / size_of::<f32>() as u64).min(INDEX_LIMIT);
    buffers(plan, shape, batch).into_iter().all(|(_, elements)| elements <= longest)
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
    /// Whether each of them is long enough for [`Plan::on_chip_from`].
    is_long: bool,
}

/// The segments, those of one adapter that follow one another joined, but none to one of another kind: what a row is computed by
/// must not depend on its neighbours.
fn runs(plan: &Plan, segments: &[Segment]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::with_capacity(segments.len());
    let mut first_row = 0;
    for segment in segments.iter().filter(|segment| segment.rows > 0) {
        let is_long = segment.rows >= plan.on_chip_from();
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

/// The rows that aren't materialised. An adapter of one virtual row is scaled as it is loaded whatever the lowering: a tile of
/// W_i would spare nothing.
fn gemm(
    plan: &Plan,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    materialises: impl Fn(&AdapterSlots) -> bool,
    adds: impl Fn(&AdapterSlots) -> bool,
) -> Gemm {
    let mut gemm = Gemm::default();
    let mut scales_of = vec![None; adapters.len()];
    for Run { first_row, segment, is_long } in runs(plan, segments) {
        let position = segment.adapter as usize;
        let adapter = &adapters[position];
        if materialises(adapter) {
            continue;
        }
        if plan.multiplicative() == Lowering::OnChip && is_long && adapter.virtual_rows.len() > 1 {
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
                    VirtualRow { row, in_slot, out_slot, last: u32::from(position == last) }
                }));
            }
        }
        if adds(adapter) && plan.additive() == Lowering::Fused {
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
    plan: &Plan,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    materialises: impl Fn(&AdapterSlots) -> bool,
    finishes: bool,
) -> Option<Materialised> {
    let mut step = Materialised { adapters: Vec::new(), scales: Vec::new(), runs: Vec::new(), finishes };
    let mut weight_of = vec![None; adapters.len()];
    for Run { first_row, segment, .. } in runs(plan, segments) {
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
    for (adapter, own) in adapters.iter().zip(rows_of).filter(|(adapter, own)| !own.is_empty() && adds(adapter)) {
        let low_rank = adapter.low_rank;
        rows.push(own.clone());
        shrink.push((low_rank.shrink..).take(low_rank.rank as usize).collect());
        expand.push((low_rank.expand..).take(low_rank.rank as usize).collect());
    }
    LowRankBmm { rows: pack(&rows), shrink: pack(&shrink), expand: pack(&expand) }
}
