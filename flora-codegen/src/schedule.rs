//! From a plan and a batch to the steps that run it: which rows, which vectors, in which order. Index tables, no tensor data;
//! the host backend and every kernel read the same ones.

use bytemuck::{Pod, Zeroable};

use crate::batch::{AdapterSlots, BatchShape, LayerShape, Segment, VirtualRowSlots};
use crate::kernels::rows::NO_ROW;
use crate::kernels::segmented::SEGMENT_TILE_ROWS;
use crate::lowering::Lowering;
use crate::plan::Plan;

/// A virtual row of the batch; slots count from 1, 0 is "not scaled".
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
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
    /// How many, at most 16.
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

/// Rows of the batch packed into equal blocks, one block an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// Rows of a block.
    pub block: u32,
    /// The row in every place, `u32::MAX` for padding; its length is blocks × `block`.
    pub index: Vec<u32>,
}

/// The `bmm` lowering of multiplicative adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Materialised {
    /// The adapters, a block of `rows` each.
    pub adapters: Vec<MaterialisedAdapter>,
    /// Their virtual rows.
    pub scales: Vec<Scale>,
    /// Their rows.
    pub rows: Packing,
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
    /// y = x @ w0 for all rows.
    BaseGemm,
    /// y\[row\] = Σ of the row's virtual rows.
    Stacked(Vec<VirtualRow>),
    /// y\[row\] = x\[row\] @ W_i.
    Materialised(Materialised),
    /// y\[row\] += (x\[row\] @ b_i) @ a_i, by segment. `h_len` is the length of the intermediate.
    Segmented {
        /// The work items.
        items: Vec<SegmentItem>,
        /// Σ rows × rank.
        h_len: u32,
    },
    /// The same by padded batched matmuls.
    LowRankBmm(LowRankBmm),
    /// y = φ(y + bias) for all rows. Left out where the layer has neither, or where a lone `Stacked` step does it.
    Finish,
}

/// The steps of one batch. Only this module makes one: its indices are within the batch and the slots that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    shape: LayerShape,
    tokens: u32,
    in_slots: u32,
    out_slots: u32,
    steps: Vec<Step>,
}

impl Schedule {
    /// y = x @ w0 for `tokens` rows, whatever the adapters: what others are measured against.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn base_gemm(shape: LayerShape, tokens: u32) -> Result<Self, ScheduleError> {
        Self::of_base(shape, tokens, if tokens == 0 { Vec::new() } else { vec![Step::BaseGemm] })
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
        Ok(Self { shape, tokens, in_slots: 0, out_slots: 0, steps })
    }

    /// The schedule without the GEMM of its base rows: its adapters' part alone, for measuring.
    #[must_use]
    pub fn without_base_gemm(mut self) -> Self {
        self.steps.retain(|step| !matches!(step, Step::BaseGemm));
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
    let (tokens, mut steps) = (tokens as u32, Vec::new());
    if tokens == 0 {
        return Ok(Schedule { shape, tokens, in_slots: 0, out_slots: 0, steps });
    }

    let materialises = |adapter: &AdapterSlots| plan.multiplicative() == Lowering::Bmm && !adapter.is_plain();
    if adapters.iter().zip(&rows_of).all(|(adapter, rows)| rows.is_empty() || adapter.is_plain()) {
        steps.push(Step::BaseGemm);
    } else {
        let virtual_rows = virtual_rows(segments, adapters, materialises);
        if !virtual_rows.is_empty() {
            steps.push(Step::Stacked(virtual_rows));
        }
        if let Some(step) = materialised(adapters, &rows_of, materialises) {
            steps.push(Step::Materialised(step));
        }
    }
    // A materialised weight holds the additive part of its adapter already.
    let adds = |adapter: &AdapterSlots| adapter.low_rank.rank > 0 && !materialises(adapter);
    if adapters.iter().zip(&rows_of).any(|(adapter, rows)| !rows.is_empty() && adds(adapter)) {
        steps.push(match plan.additive() {
            Lowering::Bmm => Step::LowRankBmm(low_rank_bmm(adapters, &rows_of, adds)),
            Lowering::Segmented | Lowering::Stacked => segmented(segments, adapters, adds),
        });
    }
    if finishes && !matches!(steps[..], [Step::Stacked(_)]) {
        steps.push(Step::Finish);
    }
    let used = || adapters.iter().zip(&rows_of).filter(|(_, rows)| !rows.is_empty()).map(|(adapter, _)| adapter);
    Ok(Schedule {
        shape,
        tokens,
        in_slots: used().map(AdapterSlots::in_slots).max().unwrap_or(0),
        out_slots: used().map(AdapterSlots::out_slots).max().unwrap_or(0),
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
fn buffers(plan: &Plan, shape: LayerShape, batch: &BatchShape) -> [(&'static str, u64); 6] {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let group = batch.multiplicative;
    let materialises = plan.multiplicative() == Lowering::Bmm;
    let scaled = if materialises { 0 } else { group.tokens_times_width };
    let additive = if materialises { batch.additive } else { batch.additive.and(batch.scaled_additive) };
    let packs = plan.additive() == Lowering::Bmm;
    let of = |used: bool, elements: u64| if used { elements } else { 0 };
    [
        ("the table of virtual rows", 4 * (batch.plain_rows + scaled)),
        ("the table of materialised weights", of(materialises, group.adapters * d * k)),
        ("the packed rows of materialised weights", of(materialises, group.adapters * group.longest * d.max(k))),
        ("the packed rows of additive adapters", of(packs, additive.adapters * additive.longest * d.max(k))),
        ("the packed vectors of additive adapters", of(packs, additive.adapters * additive.largest_width * d.max(k))),
        ("the shrunk rows", additive.adapters * additive.longest * additive.largest_width),
    ]
}

/// Whether a plan's buffers can be indexed and are no longer than the device's longest.
pub(crate) fn can_hold(plan: &Plan, shape: LayerShape, batch: &BatchShape, largest_buffer_bytes: Option<u64>) -> bool {
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

fn virtual_rows(
    segments: &[Segment],
    adapters: &[AdapterSlots],
    materialises: impl Fn(&AdapterSlots) -> bool,
) -> Vec<VirtualRow> {
    let mut table = Vec::new();
    let mut row = 0;
    for segment in segments {
        let adapter = &adapters[segment.adapter as usize];
        for row in row..row + segment.rows {
            if materialises(adapter) {
                continue;
            }
            let last = adapter.virtual_rows.len().saturating_sub(1);
            table.extend(adapter.virtual_rows.iter().enumerate().map(|(position, scales)| VirtualRow {
                row,
                in_slot: slot(scales.in_scale),
                out_slot: slot(scales.out_scale),
                last: u32::from(position == last),
            }));
        }
        row += segment.rows;
    }
    table
}

/// One block an adapter, every block as long as the longest.
fn pack(blocks: &[Vec<u32>]) -> Packing {
    let block = blocks.iter().map(Vec::len).max().unwrap_or(0);
    let padded =
        |rows: &Vec<u32>| rows.iter().copied().chain(std::iter::repeat(NO_ROW)).take(block).collect::<Vec<_>>();
    Packing { block: block as u32, index: blocks.iter().flat_map(padded).collect() }
}

fn materialised(
    adapters: &[AdapterSlots],
    rows_of: &[Vec<u32>],
    materialises: impl Fn(&AdapterSlots) -> bool,
) -> Option<Materialised> {
    let mut step = Materialised { adapters: Vec::new(), scales: Vec::new(), rows: Packing::default() };
    let mut blocks = Vec::new();
    for (adapter, rows) in
        adapters.iter().zip(rows_of).filter(|(adapter, rows)| !rows.is_empty() && materialises(adapter))
    {
        let first_scale = step.scales.len() as u32;
        let scale =
            |scales: &VirtualRowSlots| Scale { in_slot: slot(scales.in_scale), out_slot: slot(scales.out_scale) };
        step.scales.extend(adapter.virtual_rows.iter().map(scale));
        step.adapters.push(MaterialisedAdapter {
            first_scale,
            end_scale: step.scales.len() as u32,
            shrink: adapter.low_rank.shrink,
            expand: adapter.low_rank.expand,
            rank: adapter.low_rank.rank,
        });
        blocks.push(rows.clone());
    }
    step.rows = pack(&blocks);
    (!blocks.is_empty()).then_some(step)
}

fn segmented(segments: &[Segment], adapters: &[AdapterSlots], adds: impl Fn(&AdapterSlots) -> bool) -> Step {
    let mut items = Vec::new();
    let (mut row, mut offset) = (0, 0);
    for segment in segments {
        let adapter = &adapters[segment.adapter as usize];
        if adds(adapter) {
            let low_rank = adapter.low_rank;
            for first in (0..segment.rows).step_by(SEGMENT_TILE_ROWS as usize) {
                let rows = SEGMENT_TILE_ROWS.min(segment.rows - first);
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
