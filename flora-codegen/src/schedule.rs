//! From a plan and a batch to the steps that run it: which rows, which vectors, in which order. Index tables, no tensor data;
//! the host backend and every kernel read the same ones.

use bytemuck::{Pod, Zeroable};

use crate::batch::{AdapterSlots, LayerShape, Segment, VirtualRowSlots};
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

/// The steps of one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Rows of the batch.
    pub tokens: u32,
    /// One past the largest in-vector slot in use.
    pub in_slots: u32,
    /// One past the largest out-vector slot in use.
    pub out_slots: u32,
    /// In order.
    pub steps: Vec<Step>,
}

/// Why a batch can't be scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A segment names an adapter that the table lacks.
    #[error("segment {segment} names adapter {adapter}, but the batch has {adapters}; load it or send the segment to the base")]
    UnknownAdapter {
        /// Position of the segment.
        segment: usize,
        /// What it names.
        adapter: u32,
        /// Length of the table.
        adapters: usize,
    },
    /// An index would not fit in 32 bits.
    #[error("{what} has {elements} elements, and kernels index 2^32; split the batch")]
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
    let rows_of = rows_by_adapter(segments, adapters.len())?;
    let tokens = segments.iter().map(|segment| u64::from(segment.rows)).sum::<u64>();
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    for (what, elements) in [("x", tokens * d), ("y", tokens * k), ("the base weight", d * k)] {
        fits(what, elements)?;
    }
    let tokens = tokens as u32;
    if tokens == 0 {
        return Ok(Schedule { tokens, in_slots: 0, out_slots: 0, steps: Vec::new() });
    }

    let materialises =
        |adapter: &AdapterSlots| plan.multiplicative == Lowering::Bmm && !adapter.is_plain() && !adapter.virtual_rows.is_empty();
    let mut steps = Vec::new();
    if adapters.iter().zip(&rows_of).all(|(adapter, rows)| rows.is_empty() || adapter.is_plain()) {
        steps.push(Step::BaseGemm);
    } else {
        let virtual_rows = virtual_rows(segments, adapters, materialises);
        fits("the table of virtual rows", 4 * virtual_rows.len() as u64)?;
        if !virtual_rows.is_empty() {
            steps.push(Step::Stacked(virtual_rows));
        }
        if let Some(step) = materialised(adapters, &rows_of, materialises) {
            fits("the table of materialised weights", step.adapters.len() as u64 * d * k)?;
            fits("the packed rows", step.rows.index.len() as u64 * d.max(k))?;
            steps.push(Step::Materialised(step));
        }
    }
    // A materialised weight holds the additive part of its adapter already.
    let adds = |adapter: &AdapterSlots| adapter.low_rank.rank > 0 && !materialises(adapter);
    if adapters.iter().zip(&rows_of).any(|(adapter, rows)| !rows.is_empty() && adds(adapter)) {
        steps.push(match plan.additive {
            Lowering::Bmm => {
                let step = low_rank_bmm(adapters, &rows_of, adds);
                fits("the packed rows", step.rows.index.len() as u64 * d.max(k))?;
                fits("the packed adapters", step.shrink.index.len() as u64 * d.max(k))?;
                Step::LowRankBmm(step)
            }
            Lowering::Segmented | Lowering::Stacked => segmented(segments, adapters, adds)?,
        });
    }
    if finishes && !matches!(steps[..], [Step::Stacked(_)]) {
        steps.push(Step::Finish);
    }
    let used = || adapters.iter().zip(&rows_of).filter(|(_, rows)| !rows.is_empty()).map(|(adapter, _)| adapter);
    Ok(Schedule {
        tokens,
        in_slots: used().map(AdapterSlots::in_slots).max().unwrap_or(0),
        out_slots: used().map(AdapterSlots::out_slots).max().unwrap_or(0),
        steps,
    })
}

fn fits(what: &'static str, elements: u64) -> Result<(), ScheduleError> {
    // One element short, because the largest index stands for "no row".
    if elements < u64::from(u32::MAX) { Ok(()) } else { Err(ScheduleError::TooLarge { what, elements }) }
}

fn rows_by_adapter(segments: &[Segment], adapters: usize) -> Result<Vec<Vec<u32>>, ScheduleError> {
    let mut rows_of = vec![Vec::new(); adapters];
    let mut row = 0u32;
    for (position, segment) in segments.iter().enumerate() {
        let rows = rows_of.get_mut(segment.adapter as usize).ok_or(ScheduleError::UnknownAdapter {
            segment: position,
            adapter: segment.adapter,
            adapters,
        })?;
        let end = row.checked_add(segment.rows).filter(|end| *end < NO_ROW);
        let end = end.ok_or(ScheduleError::TooLarge { what: "the batch", elements: u64::from(row) + u64::from(segment.rows) })?;
        rows.extend(row..end);
        row = end;
    }
    Ok(rows_of)
}

fn slot(slot: Option<u32>) -> u32 {
    slot.map_or(0, |slot| slot + 1)
}

/// A row whose adapter has no virtual rows (an additive part alone) still gets one, scaled to nothing, so that y is written:
/// such adapters are given a zero out-vector when they are loaded.
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
    let padded = |rows: &Vec<u32>| rows.iter().copied().chain(std::iter::repeat(NO_ROW)).take(block).collect::<Vec<_>>();
    Packing { block: block as u32, index: blocks.iter().flat_map(padded).collect() }
}

fn materialised(
    adapters: &[AdapterSlots],
    rows_of: &[Vec<u32>],
    materialises: impl Fn(&AdapterSlots) -> bool,
) -> Option<Materialised> {
    let mut step = Materialised { adapters: Vec::new(), scales: Vec::new(), rows: Packing::default() };
    let mut blocks = Vec::new();
    for (adapter, rows) in adapters.iter().zip(rows_of).filter(|(adapter, rows)| !rows.is_empty() && materialises(adapter)) {
        let first_scale = step.scales.len() as u32;
        let scale = |scales: &VirtualRowSlots| Scale { in_slot: slot(scales.in_scale), out_slot: slot(scales.out_scale) };
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

fn segmented(
    segments: &[Segment],
    adapters: &[AdapterSlots],
    adds: impl Fn(&AdapterSlots) -> bool,
) -> Result<Step, ScheduleError> {
    let mut items = Vec::new();
    let (mut row, mut offset) = (0, 0u64);
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
                    offset: offset as u32,
                });
                offset += u64::from(rows) * u64::from(low_rank.rank);
                fits("the shrunk rows", offset)?;
            }
        }
        row += segment.rows;
    }
    Ok(Step::Segmented { items, h_len: offset as u32 })
}

fn low_rank_bmm(
    adapters: &[AdapterSlots],
    rows_of: &[Vec<u32>],
    adds: impl Fn(&AdapterSlots) -> bool,
) -> LowRankBmm {
    let (mut rows, mut shrink, mut expand) = (Vec::new(), Vec::new(), Vec::new());
    for (adapter, own) in adapters.iter().zip(rows_of).filter(|(adapter, own)| !own.is_empty() && adds(adapter)) {
        let low_rank = adapter.low_rank;
        rows.push(own.clone());
        shrink.push((low_rank.shrink..low_rank.shrink + low_rank.rank).collect());
        expand.push((low_rank.expand..low_rank.expand + low_rank.rank).collect());
    }
    LowRankBmm { rows: pack(&rows), shrink: pack(&shrink), expand: pack(&expand) }
}
