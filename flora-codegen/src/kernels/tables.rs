//! The index tables of the kernels: a record type for each, and its words by name. Routines fill records, kernels read their
//! words through the functions that are made of the records' fields here, and `traffic` counts the records; so a word has one
//! position, and this file says which.
//!
//! A launch has one array of words: records of one type, then those of the next ([`Words`]).

use bytemuck::{Pod, Zeroable};
use cubecl::prelude::*;
use flora_plan::schedule::{
    EXPAND_ITEM_WORDS, MATERIALISED_ADAPTER_WORDS, MaterialisedAdapter, SCALE_WORDS, SEGMENT_ITEM_ROWS,
    SHRINK_TASK_WORDS, Scale, ScheduledRow, SegmentItem, TILE_ROW_WORDS,
};

/// A virtual row of the tile kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct TileRow {
    /// Which row of x, which scales, and whether it is the last of its output row.
    pub(crate) virtual_row: ScheduledRow,
    /// The first expand slot of its output row's low-rank sum.
    pub(crate) expand: u32,
    /// The rank of that sum, 0 for none.
    pub(crate) rank: u32,
    /// Where its h lies.
    pub(crate) hidden: u32,
    /// A record of eight words is two loads of four.
    pub(crate) padding: u32,
}

/// What a cube of the tile kernel multiplies: virtual rows of whole output rows that share a weight.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Item {
    /// The first virtual row.
    pub(crate) first: u32,
    /// One past the last.
    pub(crate) end: u32,
    /// Which weight.
    pub(crate) weight: u32,
    /// The first scale of its W_i.
    pub(crate) first_scale: u32,
    /// One past the last.
    pub(crate) end_scale: u32,
    /// How many virtual rows of its W_i are unscaled.
    pub(crate) unscaled: u32,
    /// Where its rows' h lies.
    pub(crate) hidden: u32,
    /// How many numbers that is.
    pub(crate) hidden_count: u32,
}

/// An item as a cube keeps it in shared memory, with the cube's own place behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct CubeItem {
    /// The record of the table.
    pub(crate) item: Item,
    /// The cube's column tile.
    pub(crate) column_tile: u32,
    /// Its part of the depth.
    pub(crate) split: u32,
}

/// A shrink task: x @ b for up to [`TASK_SIDE`] rows by up to as many ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct ShrinkTask {
    /// The first row.
    pub(crate) first_row: u32,
    /// How many.
    pub(crate) rows: u32,
    /// The first shrink slot.
    pub(crate) shrink: u32,
    /// How many ranks.
    pub(crate) ranks: u32,
    /// Where the first row's h lies.
    pub(crate) hidden: u32,
    /// How far the next row's is from it.
    pub(crate) pitch: u32,
}

/// Rows of one segment that a cube of `expand` adds to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct ExpandItem {
    /// The first row.
    pub(crate) first_row: u32,
    /// How many.
    pub(crate) rows: u32,
    /// The first expand slot.
    pub(crate) expand: u32,
    /// The rank.
    pub(crate) rank: u32,
    /// Where the first row's h lies; the next row's is `rank` further.
    pub(crate) hidden: u32,
}

/// An adapter whose scales' gradients are made by tiles of G ∘ w0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct OuterAdapter {
    /// Which of all adapters' rows is its first.
    pub(crate) first_row: u32,
    /// How many.
    pub(crate) rows: u32,
    /// Which of all in-scales is its first.
    pub(crate) first_in: u32,
    /// How many.
    pub(crate) in_scales: u32,
    /// Which of all out-scales is its first.
    pub(crate) first_out: u32,
    /// How many.
    pub(crate) out_scales: u32,
}

/// An adapter whose low-rank vectors' gradients are summed over its rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct LowRankGradient {
    /// Which of all adapters' rows is its first.
    pub(crate) first_row: u32,
    /// How many.
    pub(crate) rows: u32,
    /// Where the first row's h lies; the next row's is `rank` further.
    pub(crate) hidden: u32,
    /// The rank.
    pub(crate) rank: u32,
    /// Which of the gradients is its first.
    pub(crate) target: u32,
}

/// Queries of one sequence that a cube of attention has, and the keys that it goes through.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct AttentionItem {
    /// The first row of the sequence.
    pub(crate) first_row: u32,
    /// The position of that row.
    pub(crate) first_position: u32,
    /// The first query: row of the sequence · query heads of a key-value head + head among those.
    pub(crate) first_query: u32,
    /// How many.
    pub(crate) queries: u32,
    /// The word of the sequence's first block.
    pub(crate) blocks: u32,
    /// The position of the first key, the first of a block.
    pub(crate) start: u32,
    /// One past that of the last.
    pub(crate) end: u32,
    /// Where the first query's splits are kept to be merged.
    pub(crate) partial: u32,
    /// Splits of each query.
    pub(crate) splits: u32,
    /// Which of them the cube has.
    pub(crate) split: u32,
}

/// A query whose splits are merged.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct MergedQuery {
    /// Its row.
    pub(crate) row: u32,
    /// Its head among those of a key-value head.
    pub(crate) head: u32,
    /// Where its splits are.
    pub(crate) partial: u32,
    /// How many.
    pub(crate) splits: u32,
}

impl From<&SegmentItem> for ExpandItem {
    fn from(item: &SegmentItem) -> Self {
        let SegmentItem { first_row, rows, shrink: _, expand, rank, offset } = *item;
        Self { first_row, rows, expand, rank, hidden: offset }
    }
}

/// Rows of a shrink task, and ranks of a shrink task.
pub(crate) const TASK_SIDE: u32 = SEGMENT_ITEM_ROWS;

/// What an entry of h holds before it is there: a NaN that no sum is.
pub(crate) const NO_SUM: u32 = u32::MAX;
/// Words before the first entry of h: the next ticket.
pub(crate) const H_START: u32 = 1;

/// Words of a record.
const fn words_of<T>() -> u32 {
    (size_of::<T>() / size_of::<u32>()) as u32
}

/// The words of a table as they are uploaded: records of one type, then those of the next.
#[derive(Default)]
pub(crate) struct Words(Vec<u32>);

impl Words {
    /// Appends records; the word that they start at.
    pub(crate) fn append<T: Pod>(&mut self, records: &[T]) -> u32 {
        let start = self.0.len() as u32;
        self.0.extend_from_slice(bytemuck::cast_slice(records));
        start
    }

    /// All of them.
    pub(crate) fn as_slice(&self) -> &[u32] {
        &self.0
    }
}

// What kernels are compiled with.
const _: () = {
    assert!(words_of::<TileRow>() == 8);
    assert!(words_of::<Item>() == 8);
    assert!(words_of::<CubeItem>() == 10);
    assert!(words_of::<Scale>() == 2);
    assert!(words_of::<ShrinkTask>() == 6);
    assert!(words_of::<ExpandItem>() == 5);
    assert!(words_of::<MaterialisedAdapter>() == 5);
    assert!(words_of::<OuterAdapter>() == 6);
    assert!(words_of::<LowRankGradient>() == 5);
    assert!(words_of::<AttentionItem>() == 10);
    assert!(words_of::<MergedQuery>() == 4);
};

// What a plan's limits count.
const _: () = {
    assert!((words_of::<TileRow>() + words_of::<Item>()) as u64 == TILE_ROW_WORDS);
    assert!(words_of::<Scale>() as u64 == SCALE_WORDS);
    assert!(words_of::<ShrinkTask>() as u64 == SHRINK_TASK_WORDS);
    assert!(words_of::<ExpandItem>() as u64 == EXPAND_ITEM_WORDS);
    assert!(words_of::<MaterialisedAdapter>() as u64 == MATERIALISED_ADAPTER_WORDS);
};

/// A module of cube functions, one for each field of a record: each reads its word of the record that starts at word `record` of
/// a table.
macro_rules! records {
    ($(#[$doc:meta])* $module:ident: $record:ident { $($field:ident at $($path:ident).+),+ $(,)? }) => {
        $(#[$doc])*
        pub(crate) mod $module {
            use core::mem::offset_of;

            use cubecl::prelude::*;

            use super::*;

            /// Words of a record.
            pub(crate) const WORDS: u32 = words_of::<$record>();

            $(
                #[cube]
                pub(crate) fn $field(tables: &Array<u32>, record: u32) -> u32 {
                    word(tables, record, comptime!((offset_of!($record, $($path).+) / size_of::<u32>()) as u32))
                }
            )+
        }
    };
}

#[cube]
fn word(tables: &Array<u32>, record: u32, #[comptime] offset: u32) -> u32 {
    if comptime!(offset == 0) { tables[record as usize] } else { tables[(record + offset) as usize] }
}

records! {
    /// Words of a [`TileRow`].
    tile_row: TileRow {
        row at virtual_row.row,
        in_slot at virtual_row.in_slot,
        out_slot at virtual_row.out_slot,
        last at virtual_row.last,
        expand at expand,
        rank at rank,
        hidden at hidden,
    }
}

records! {
    /// Words of a [`Scale`].
    scale: Scale { in_slot at in_slot, out_slot at out_slot }
}

records! {
    /// Words of a [`ShrinkTask`].
    shrink_task: ShrinkTask {
        first_row at first_row,
        rows at rows,
        shrink at shrink,
        ranks at ranks,
        hidden at hidden,
        pitch at pitch,
    }
}

records! {
    /// Words of an [`ExpandItem`].
    expand_item: ExpandItem {
        first_row at first_row,
        rows at rows,
        expand at expand,
        rank at rank,
        hidden at hidden,
    }
}

records! {
    /// Words of a [`MaterialisedAdapter`].
    materialised_adapter: MaterialisedAdapter {
        first_scale at first_scale,
        end_scale at end_scale,
        shrink at shrink,
        expand at expand,
        rank at rank,
    }
}

records! {
    /// Words of an [`OuterAdapter`].
    outer_adapter: OuterAdapter {
        first_row at first_row,
        rows at rows,
        first_in at first_in,
        in_scales at in_scales,
        first_out at first_out,
        out_scales at out_scales,
    }
}

records! {
    /// Words of a [`LowRankGradient`].
    low_rank_gradient: LowRankGradient {
        first_row at first_row,
        rows at rows,
        hidden at hidden,
        rank at rank,
        target at target,
    }
}

records! {
    /// Words of an [`AttentionItem`].
    attention_item: AttentionItem {
        first_row at first_row,
        first_position at first_position,
        first_query at first_query,
        queries at queries,
        blocks at blocks,
        start at start,
        end at end,
        partial at partial,
        splits at splits,
        split at split,
    }
}

records! {
    /// Words of a [`MergedQuery`].
    merged_query: MergedQuery { row at row, head at head, partial at partial, splits at splits }
}

/// Where the parts of the tile kernel's table start, in words, and how many there are. Its virtual rows come first.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Layout {
    /// Inputs.
    pub(crate) d: u32,
    /// Outputs.
    pub(crate) k: u32,
    /// First word of the items.
    pub(crate) items: u32,
    /// How many.
    pub(crate) item_count: u32,
    /// First word of the scales of W_i.
    pub(crate) scales: u32,
    /// First word of the shrink tasks.
    pub(crate) tasks: u32,
    /// How many.
    pub(crate) task_count: u32,
    /// Column tiles.
    pub(crate) column_tiles: u32,
    /// Steps of d that a cube multiplies.
    pub(crate) depth: u32,
    /// Virtual rows of the batch.
    pub(crate) virtual_rows: u32,
    /// First word of h: the ticket, then sums.
    pub(crate) hidden: u32,
    /// First word of what the launch before has left, and this one empties.
    pub(crate) stale: u32,
    /// How many.
    pub(crate) stale_count: u32,
}

/// What a launch of `outer` is about: its table has adapters first.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct OuterLayout {
    /// Inputs.
    pub(crate) d: u32,
    /// Outputs.
    pub(crate) k: u32,
    /// Word of the first row of all adapters.
    pub(crate) rows: u32,
    /// Word of the first in-scale's partner.
    pub(crate) in_partners: u32,
    /// Word of the first out-scale's partner.
    pub(crate) out_partners: u32,
    /// In-scales of all adapters.
    pub(crate) in_scales: u32,
    /// Out-scales of all adapters.
    pub(crate) out_scales: u32,
    /// Tiles of a cube along the inputs.
    pub(crate) input_tiles: u32,
    /// Tiles of a cube along the outputs.
    pub(crate) output_tiles: u32,
}
