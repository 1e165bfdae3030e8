//! The item that a cube of the tile kernel multiplies, as its units read it: words in shared memory, so that no register keeps
//! through the main loop what the epilogue needs.

use core::mem::offset_of;

use cubecl::prelude::*;

use super::blueprint::TileBlueprint;
use super::tables::{CubeItem, Item};

/// Words of an item in the table.
pub(crate) const ITEM_WORDS: u32 = (size_of::<Item>() / size_of::<u32>()) as u32;
/// Words of an item in shared memory.
pub(crate) const CUBE_ITEM_WORDS: usize = size_of::<CubeItem>() / size_of::<u32>();
/// Where a cube keeps its column tile.
pub(crate) const COLUMN_TILE: usize = offset_of!(CubeItem, column_tile) / size_of::<u32>();
/// Where it keeps its split.
pub(crate) const SPLIT: usize = offset_of!(CubeItem, split) / size_of::<u32>();

/// A cube function for each field: its word of the item in shared memory.
macro_rules! words {
    ($($(#[$doc:meta])* $field:ident),+ $(,)?) => {
        $(
            $(#[$doc])*
            #[cube]
            pub(crate) fn $field(entry: &SharedMemory<u32>) -> u32 {
                entry[comptime!(offset_of!(CubeItem, item.$field) / size_of::<u32>())]
            }
        )+
    };
}

words! {
    /// The first virtual row.
    first,
    /// One past the last.
    end,
    /// Which weight.
    weight,
    /// The first scale of its W_i.
    first_scale,
    /// One past the last.
    end_scale,
    /// How many virtual rows of its W_i are unscaled.
    unscaled,
    /// Where its rows' h lies.
    hidden,
    /// How many numbers that is.
    hidden_count,
}

/// The cube's column tile: the cube's position, unless that came from a ticket.
#[cube]
pub(crate) fn column_tile(entry: &SharedMemory<u32>, #[comptime] blueprint: TileBlueprint) -> u32 {
    if comptime!(blueprint.hidden > 0) { entry[COLUMN_TILE] } else { CUBE_POS_Y }
}

/// The cube's part of the depth.
#[cube]
pub(crate) fn split(entry: &SharedMemory<u32>, #[comptime] blueprint: TileBlueprint) -> u32 {
    if comptime!(blueprint.hidden > 0) { entry[SPLIT] } else { CUBE_POS_Z }
}
