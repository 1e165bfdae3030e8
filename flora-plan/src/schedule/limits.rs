//! How large a batch, and what a plan puts in memory for it, may be.

use super::error::ScheduleError;
use super::steps::SEGMENT_ITEM_ROWS;
use crate::batch::{BatchShape, GroupShape};
use crate::layer::LayerShape;
use crate::lowering::{AdditiveLowering, MultiplicativeLowering};
use crate::plan::Plan;

/// Kernels index with 32 bits; half of them leave room for the last cube's units past the end, and for "no row".
const INDEX_LIMIT: u64 = i32::MAX as u64;

/// The least depth of a split, a multiple of every tile's and of every block of a quantised weight.
pub const SPLIT_DEPTH: u32 = 256;

/// The most cubes that share the depth of a layer on any device.
pub fn most_splits(shape: LayerShape) -> u32 {
    (shape.d / SPLIT_DEPTH).clamp(1, 8)
}

pub(super) fn fits(what: &'static str, elements: u64) -> Result<(), ScheduleError> {
    if elements <= INDEX_LIMIT { Ok(()) } else { Err(ScheduleError::TooLarge { what, elements }) }
}

pub(super) fn batch_fits(shape: LayerShape, tokens: u64) -> Result<(), ScheduleError> {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    fits("the batch", tokens)?;
    fits("x", tokens * d)?;
    fits("y", tokens * k)?;
    fits("the base weight", d * k)
}

/// Words of the kernels' tables, at most: for each virtual row its record and that of the item that it may be alone in.
pub const TILE_ROW_WORDS: u64 = 16;
/// For each task of up to 16 rows and ranks of a low-rank sum.
pub const SHRINK_TASK_WORDS: u64 = 6;
/// For each up to 16 rows that a low-rank sum is added to.
pub const EXPAND_ITEM_WORDS: u64 = 5;
/// For each virtual row of a W_i.
pub const SCALE_WORDS: u64 = 2;
/// For each adapter whose W_i is materialised.
pub const MATERIALISED_ADAPTER_WORDS: u64 = 5;

/// A product of extents, the largest number there is where it is larger.
fn product(extents: &[u64]) -> u64 {
    extents.iter().copied().fold(1, u64::saturating_mul)
}

fn sum(terms: &[u64]) -> u64 {
    terms.iter().copied().fold(0, u64::saturating_add)
}

/// The rows whose W_i is made tile by tile, of a batch as the plan sees it.
fn on_chip(plan: &Plan, seen: &BatchShape) -> GroupShape {
    match plan.parts().multiplicative {
        MultiplicativeLowering::OnChip => seen.wide_from(plan.parts().on_chip_from()).0,
        MultiplicativeLowering::Stacked | MultiplicativeLowering::Bmm => GroupShape::default(),
    }
}

/// Virtual rows that are multiplied by the base weight, likewise.
fn base_rows(plan: &Plan, seen: &BatchShape) -> u64 {
    match plan.parts().multiplicative {
        MultiplicativeLowering::Bmm => seen.plain_rows,
        MultiplicativeLowering::Stacked | MultiplicativeLowering::OnChip => {
            let (group, on_chip) = (seen.multiplicative, on_chip(plan, seen));
            let stacked = group.tokens_times_width.saturating_sub(on_chip.tokens_times_width);
            sum(&[seen.plain_rows, stacked, on_chip.tokens])
        }
    }
}

/// Whether everything that a plan needs for a batch can be indexed in a layer of this shape.
pub(super) fn check(plan: &Plan, shape: LayerShape, batch: &BatchShape) -> Result<(), ScheduleError> {
    batch_fits(shape, batch.all_rows())?;
    buffers(plan, shape, batch).into_iter().try_for_each(|(what, elements)| fits(what, elements))
}

/// What a plan puts in memory beside x and the layer's operands, in elements of at most four bytes. Every element is counted that
/// a launch allocates, on any device: a schedule's launches ask for no more than this.
fn buffers(plan: &Plan, shape: LayerShape, batch: &BatchShape) -> [(&'static str, u64); 11] {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let (batch, parts) = (plan.seen(batch), plan.parts());
    let group = batch.multiplicative;
    // Whether W_i are made in memory, what is summed beside them, and how.
    let (materialises, additive) = (parts.multiplicative.materialises(), batch.summed_beside(parts.multiplicative));
    let (packs, fuses) = match parts.additive {
        AdditiveLowering::Fused => (false, true),
        AdditiveLowering::Segmented => (false, false),
        AdditiveLowering::Bmm => (true, false),
    };
    let rows = base_rows(plan, &batch);
    let of = |used: bool, elements: u64| if used { elements } else { 0 };
    // Rows of one adapter share a task where they follow one another, which they needn't.
    let tasks = sum(&[additive.tokens_times_width / u64::from(SEGMENT_ITEM_ROWS), additive.tokens]);
    let tasks = product(&[SHRINK_TASK_WORDS, tasks]);
    let packed_rows = product(&[additive.adapters, additive.longest]);
    let tile_table = sum(&[
        product(&[TILE_ROW_WORDS, rows]),
        product(&[SCALE_WORDS, on_chip(plan, &batch).widths]),
        of(fuses, tasks),
    ]);
    let adapters_table = product(&[MATERIALISED_ADAPTER_WORDS, group.adapters]);
    let hidden = match packs {
        true => product(&[packed_rows, additive.largest_width]),
        // `fused` has a ticket beside them, and both twice.
        false if fuses => product(&[2, additive.tokens_times_width.saturating_add(u64::from(additive.tokens > 0))]),
        false => additive.tokens_times_width,
    };
    let widest = d.max(k).max(1);
    [
        ("y", product(&[batch.all_rows(), k])),
        ("the table of virtual rows", tile_table),
        ("the table of rows with the resident weight", product(&[TILE_ROW_WORDS, batch.merged_rows()])),
        ("the table of rows with a materialised weight", of(materialises, product(&[TILE_ROW_WORDS, group.tokens]))),
        (
            "the table of materialised weights",
            of(materialises, sum(&[adapters_table, product(&[SCALE_WORDS, group.widths])])),
        ),
        ("the materialised weights", of(materialises, product(&[group.adapters, d, k]))),
        ("the packed rows of additive adapters", of(packs, product(&[packed_rows, widest]))),
        (
            "the packed vectors of additive adapters",
            of(packs, product(&[additive.adapters, additive.largest_width, widest])),
        ),
        ("the table of packed rows", of(packs, product(&[TILE_ROW_WORDS, packed_rows]))),
        (
            "the table of low-rank sums",
            of(!packs && !fuses, sum(&[tasks, product(&[EXPAND_ITEM_WORDS, additive.tokens])])),
        ),
        ("the low-rank sums", hidden),
    ]
}

/// The sums of the cubes that share the depth, where a device has them share it, in elements of four bytes.
fn partial_sums(plan: &Plan, shape: LayerShape, virtual_rows: u64) -> u64 {
    if plan.splits() { product(&[u64::from(most_splits(shape)), virtual_rows, u64::from(shape.k)]) } else { 0 }
}

/// Whether a plan's buffers can be indexed and are no longer than the device's longest. A batch that it accepts is never refused by
/// a launch because of a buffer.
pub fn can_hold(plan: &Plan, shape: LayerShape, batch: &BatchShape, largest_buffer_bytes: Option<u64>) -> bool {
    let longest = largest_buffer_bytes.map_or(u64::MAX, |bytes| bytes / size_of::<f32>() as u64).min(INDEX_LIMIT);
    let seen = plan.seen(batch);
    let partial = partial_sums(plan, shape, base_rows(plan, &seen).max(seen.merged_rows()));
    buffers(plan, shape, batch).into_iter().map(|(_, elements)| elements).chain([partial]).all(|own| own <= longest)
}
