//! What a unit has fetched of a step of d, how many loads that is, and the ways from an array to registers and on to shared memory.

use cubecl::prelude::*;

use super::blueprint::{Multiply, TileBlueprint};
use super::decode::loads;
use super::registers::{put, read};
use super::words::{ones, to_words};

/// A unit's part of the next step: X words of a vector of x, A of one of the adapters' and W of one of w0, whose scales are
/// vectors of N.
#[derive(CubeType)]
pub(crate) struct Fetched<N: Size, X: Size, A: Size, W: Size> {
    /// Virtual rows' numbers of x; 0 outside of the item.
    pub(crate) inputs: Array<Vector<u32, X>>,
    /// Their in-scales, 1 where a row has none; unused where no row has any.
    pub(crate) in_scales: Array<Vector<u32, A>>,
    /// Of w0, as it is stored; 0 outside of the matrix.
    pub(crate) weights: Array<Vector<u32, W>>,
    /// What a quantised w0 is decoded with, as many of each as there are `weights`: words of its scales, of those of super-blocks, and
    /// of its upper plane, as far as it has them.
    pub(crate) weight_scales: Array<Vector<u32, N>>,
    /// In-vectors of a chunk of the terms of W_i; 0 outside of it.
    pub(crate) vectors: Array<Vector<u32, A>>,
}

/// Rounds in which the units of a cube stage `lines` lines of `line` elements, `width` at a time.
fn passes(blueprint: TileBlueprint, lines: u32, line: u32, width: usize) -> u32 {
    (lines * (line / width as u32)).div_ceil(blueprint.units())
}

pub(crate) fn row_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, blueprint.tile.rows, blueprint.tile.depth, width)
}

pub(crate) fn weight_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, blueprint.tile.depth / per_value(blueprint), blueprint.tile.columns, width)
}

pub(crate) fn vector_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, blueprint.on_chip, blueprint.tile.depth, width)
}

/// Numbers in a value of the array of w0.
pub(crate) fn per_value(blueprint: TileBlueprint) -> u32 {
    blueprint.quantisation.map_or(1, |quantisation| quantisation.per_word())
}

/// Most loads of a unit that are fetched ahead: room for vectors of eight halves, over all tiles at most 14 loads, and for quantised
/// weights, which make vectors of four, at most 22. Single halves come to 18 to 112.
const MOST_AHEAD: u32 = 24;

/// Whether a step is fetched while the one before it is multiplied, and not just before it is staged: where vectors are whole.
/// Single numbers, of sizes that are multiples of nothing, would be so many loads that the registers are short of room for sums.
pub(crate) fn fetches_ahead(blueprint: TileBlueprint, row_width: usize, width: usize) -> bool {
    let rows = row_passes(blueprint, row_width) * if blueprint.scaled { 2 } else { 1 };
    let weights = weight_passes(blueprint, width) * blueprint.quantisation.map_or(1, loads);
    let vectors = if blueprint.on_chip > 0 { vector_passes(blueprint, row_width) } else { 0 };
    rows + weights + vectors <= MOST_AHEAD
}

/// Where the words of super-blocks' scales of a pass are kept.
pub(crate) fn super_at(blueprint: TileBlueprint, width: usize, pass: u32) -> usize {
    (weight_passes(blueprint, width) + pass) as usize
}

/// Where the words of the upper plane of a pass are kept.
pub(crate) fn upper_at(blueprint: TileBlueprint, width: usize, pass: u32) -> usize {
    let before = blueprint.quantisation.map_or(1, loads).saturating_sub(2);
    (before * weight_passes(blueprint, width) + pass) as usize
}

/// As many as are `used`, or one, because there is no array of none.
fn room(passes: u32, used: bool) -> usize {
    if used { passes as usize } else { 1 }
}

/// Room for a step; vectors of scales are ones.
#[cube]
pub(crate) fn nothing_fetched<T: Float, M: Size, N: Size, X: Size, A: Size, W: Size>(
    #[comptime] blueprint: TileBlueprint,
) -> Fetched<N, X, A, W> {
    let row_width = M::value();
    let width = N::value();
    let quantised = comptime!(blueprint.quantisation.is_some());
    Fetched::<N, X, A, W> {
        inputs: Array::new(comptime!(room(row_passes(blueprint, row_width), true))),
        in_scales: all_ones::<T, M, A>(comptime!(row_passes(blueprint, row_width)), blueprint.scaled, blueprint),
        weights: Array::new(comptime!(room(weight_passes(blueprint, width), true))),
        weight_scales: Array::new(comptime!(room(
            weight_passes(blueprint, width) * (blueprint.quantisation.map_or(1, loads) - 1),
            quantised
        ))),
        vectors: all_ones::<T, M, A>(
            comptime!(vector_passes(blueprint, row_width)),
            comptime!(blueprint.on_chip > 0),
            blueprint,
        ),
    }
}

/// Room for vectors of scales, which are ones where a step doesn't put them.
#[cube]
fn all_ones<T: Float, M: Size, A: Size>(
    #[comptime] passes: u32,
    #[comptime] used: bool,
    #[comptime] blueprint: TileBlueprint,
) -> Array<Vector<u32, A>> {
    let width = M::value();
    let mut all = Array::new(comptime!(room(passes, used)));
    #[unroll]
    for at in 0..comptime!(if used && ones_stand(blueprint, width) { passes } else { 0 }) {
        all[at as usize] = ones::<T, M, A>();
    }
    all
}

/// Whether places are signed: where the device loads four matrices at once, all arrays are short enough.
pub(crate) fn places_are_signed(blueprint: TileBlueprint) -> bool {
    blueprint.multiply == Multiply::Mma
}

/// Whether the step that the others leave over of d is the first one. Zeros then come before it, and groups of 16 depths end where
/// they would in a tile of any depth, so that its bits don't depend on the tile. Words of numbers that start between two of them
/// would be in the way.
pub(crate) fn ragged_first(blueprint: TileBlueprint, row_width: usize) -> bool {
    let whole_words = match blueprint.quantisation {
        Some(quantisation) => quantisation.block().is_some() || quantisation.per_word() <= row_width as u32,
        None => true,
    };
    places_are_signed(blueprint) && whole_words
}

/// Whether the ones of a row that has no scale stand from before the first step on, so that no step puts them there: what isn't loaded
/// in one step then isn't in any, but for depths before 0, where x is 0.
pub(crate) fn ones_stand(blueprint: TileBlueprint, row_width: usize) -> bool {
    ragged_first(blueprint, row_width)
}

/// The depths of a cube that are looked at: a step that `start` to `end` don't fill is told apart by them.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Depths {
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// Whether numbers from `depth` on are of the cube's depths: those before 0 are far behind.
#[cube]
pub(crate) fn within(depth: u32, depths: Depths) -> bool {
    depth - depths.start < depths.end - depths.start
}

/// The vector at `at` as words.
#[cube]
pub(crate) fn load<T: Numeric, V: Size, P: Size>(
    from: &Array<Vector<T, V>>,
    at: u32,
    #[comptime] blueprint: TileBlueprint,
) -> Vector<u32, P> {
    if comptime!(places_are_signed(blueprint)) {
        to_words::<T, V, P>(read::<T, V>(from, i32::cast_from(at)))
    } else {
        to_words::<T, V, P>(from[at as usize])
    }
}

/// Puts a vector into shared memory.
#[cube]
pub(crate) fn place<S: Float, V: Size>(
    tile: &mut SharedMemory<Vector<S, V>>,
    at: u32,
    value: Vector<S, V>,
    #[comptime] blueprint: TileBlueprint,
) {
    if comptime!(places_are_signed(blueprint)) {
        put::<S, V>(tile, i32::cast_from(at), value);
    } else {
        tile[at as usize] = value;
    }
}
