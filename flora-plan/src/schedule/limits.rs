//! How large a batch, and what a plan puts in memory for it, may be.

use super::error::ScheduleError;
use crate::batch::{BatchShape, GroupShape};
use crate::layer::LayerShape;
use crate::lowering::{AdditiveLowering, MultiplicativeLowering};
use crate::plan::{Lowerings, Plan};

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

/// What a plan puts in memory beside x, y and the layer's operands, in elements.
pub(super) fn buffers(plan: &Plan, shape: LayerShape, batch: &BatchShape) -> [(&'static str, u64); 5] {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let group = batch.multiplicative;
    // What is stacked, whether W_i are made in memory, what is summed by itself, and whether that is packed.
    let (scaled, materialises, additive, packs) = match plan.lowerings() {
        Lowerings::Merged => (0, false, GroupShape::default(), false),
        Lowerings::Separate(parts) => {
            let scaled = match parts.multiplicative {
                MultiplicativeLowering::Stacked => group.tokens_times_width,
                MultiplicativeLowering::OnChip => {
                    group.tokens_times_width - batch.wide_from(parts.on_chip_from()).0.tokens_times_width
                }
                MultiplicativeLowering::Bmm => 0,
            };
            let packs = match parts.additive {
                AdditiveLowering::Fused | AdditiveLowering::Segmented => false,
                AdditiveLowering::Bmm => true,
            };
            (scaled, parts.multiplicative.materialises(), batch.summed_beside(parts.multiplicative), packs)
        }
    };
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
