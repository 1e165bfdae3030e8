//! Where a unit's loads lie, in vectors of their arrays. A place is found once a tile and advances with each step of d, so that no
//! step asks a table or multiplies for it.
//!
//! Lines that aren't there are the last one again: nobody writes what they give. So a load needs no condition for them.

use cubecl::prelude::*;

use super::blueprint::TileBlueprint;
use super::fetched::{row_passes, vector_passes, weight_passes};
use super::item;
use super::tables::{self, Layout, tile_row};
use super::units::{line_within, staged_column, staged_row};

/// Where ones stand for a vector: below every place, however far it advances.
const NONE: u32 = 1 << 31;

/// The places of a unit's next loads.
#[derive(CubeType)]
pub(crate) struct Places {
    /// Of x.
    pub(crate) inputs: Array<u32>,
    /// Of the in-scales of those rows.
    pub(crate) in_scales: Array<u32>,
    /// Of w0, unless it is quantised.
    pub(crate) weights: Array<u32>,
    /// Of in-vectors of W_i.
    pub(crate) vectors: Array<u32>,
}

/// The places for the virtual rows from `chunk` and the scales of W_i from `rank`, at depth `depth0`, which may lie before 0.
#[cube]
pub(crate) fn places<M: Size, N: Size>(
    tables: &Array<u32>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    chunk: u32,
    rank: u32,
    depth0: u32,
    #[comptime] blueprint: TileBlueprint,
) -> Places {
    let row_width = M::value();
    let width = N::value();
    let units = comptime!(blueprint.units());
    let row_line = comptime!(blueprint.tile.depth / row_width as u32);
    let vectors = layout.d / comptime!(row_width as u32);
    let row_passes = comptime!(row_passes(blueprint, row_width));
    // Signed, or a place before 0 would be far behind.
    let before = u32::cast_from(i32::cast_from(depth0) / comptime!(row_width as i32));
    let last = item::end(entry) - 1;
    let mut inputs = Array::<u32>::new(comptime!(row_passes as usize));
    let mut in_scales = Array::<u32>::new(comptime!(if blueprint.scaled { row_passes as usize } else { 1 }));
    #[unroll]
    for pass in 0..row_passes {
        let at = comptime!(pass as usize);
        let words = min(staged_row(chunk, pass, row_line, units), last) * tile_row::WORDS;
        let along = before + staged_column(pass, row_line, units);
        inputs[at] = tile_row::row(tables, words) * vectors + along;
        if comptime!(blueprint.scaled) {
            in_scales[at] = vector_place(tile_row::in_slot(tables, words), vectors, along);
        }
    }
    let quantised = comptime!(blueprint.quantisation.is_some());
    let weight_passes = comptime!(if quantised { 1 } else { weight_passes(blueprint, width) });
    let mut weights = Array::<u32>::new(comptime!(weight_passes as usize));
    if comptime!(!quantised) {
        let line = comptime!(blueprint.tile.columns / width as u32);
        let columns = layout.k / comptime!(width as u32);
        let first = item::weight(entry) * layout.d + depth0;
        #[unroll]
        for pass in 0..weight_passes {
            let down = line_within(pass, line, comptime!(blueprint.tile.depth), units);
            let across = item::column_tile(entry, blueprint) * line + staged_column(pass, line, units);
            weights[comptime!(pass as usize)] = (first + down) * columns + min(across, columns - 1);
        }
    }
    let vectors = vector_places::<M>(tables, layout, entry, rank, depth0, blueprint);
    Places { inputs, in_scales, weights, vectors }
}

/// The places of the in-vectors of the scales from `rank`, at depth `depth0`. Of a scale that isn't there it is a vector of ones: its
/// out-vector is zeros.
#[cube]
pub(crate) fn vector_places<M: Size>(
    tables: &Array<u32>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    rank: u32,
    depth0: u32,
    #[comptime] blueprint: TileBlueprint,
) -> Array<u32> {
    let width = M::value();
    let line = comptime!(blueprint.tile.depth / width as u32);
    let units = comptime!(blueprint.units());
    let vectors = layout.d / comptime!(width as u32);
    let before = u32::cast_from(i32::cast_from(depth0) / comptime!(width as i32));
    let passes = comptime!(if blueprint.on_chip > 0 { vector_passes(blueprint, width) } else { 1 });
    let mut places = Array::<u32>::new(comptime!(passes as usize));
    if comptime!(blueprint.on_chip > 0) {
        #[unroll]
        for pass in 0..passes {
            let own = staged_row(rank, pass, line, units);
            let mut slot = 0u32;
            if own < item::end_scale(entry) {
                slot = tables::scale::in_slot(tables, layout.scales + own * tables::scale::WORDS);
            }
            let along = before + staged_column(pass, line, units);
            places[comptime!(pass as usize)] = vector_place(slot, vectors, along);
        }
    }
    places
}

/// The place of vector `along` of slot `slot`, of which each has `vectors`; [`NONE`] of slot 0.
#[cube]
fn vector_place(slot: u32, vectors: u32, along: u32) -> u32 {
    let mut place = NONE.runtime();
    if slot > 0 {
        place = (slot - 1) * vectors + along;
    }
    place
}
