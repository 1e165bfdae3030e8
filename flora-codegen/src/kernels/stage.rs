//! How operands come to where they are multiplied: a step of d is *fetched* into the registers of the cube's units while the step
//! before it is multiplied, and *staged* in shared memory, scaled and decoded, once that is done. So the time that memory takes to
//! answer is spent on multiplying, on every device and without its asynchronous copies.
//! What is fetched waits as words, whatever it is.
//!
//! Bytes: those of the tile kernel. Registers: a vector for each load of a unit, see [`MOST_AHEAD`].

use cubecl::prelude::*;

use super::blueprint::{PAD, RANK_CHUNK, SUM_PAD, TileBlueprint};
use super::decode::{
    level, loads, lower_row, minimum, nested, scale, scale_word, super_word, upper_bits, upper_from, upper_row,
};
use super::item;
use super::tables::{self, Layout, tile_row};
use super::units::{staged_at, staged_column, staged_row, stages};
use super::words::{from_words, ones, to_words};

/// A unit's part of the next step: X words of a vector of x, A of one of the adapters' and W of one of w0, whose scales are
/// vectors of N.
#[derive(CubeType)]
pub(crate) struct Fetched<N: Size, X: Size, A: Size, W: Size> {
    /// Virtual rows' numbers of x; 0 outside of the item.
    inputs: Array<Vector<u32, X>>,
    /// Their in-scales, 1 where a row has none; unused where no row has any.
    in_scales: Array<Vector<u32, A>>,
    /// Of w0, as it is stored; 0 outside of the matrix.
    weights: Array<Vector<u32, W>>,
    /// What a quantised w0 is decoded with, as many of each as there are `weights`: words of its scales, of those of super-blocks, and
    /// of its upper plane, as far as it has them.
    weight_scales: Array<Vector<u32, N>>,
    /// In-vectors of a chunk of the terms of W_i; 0 outside of it.
    vectors: Array<Vector<u32, A>>,
}

/// Rounds in which the units of a cube stage `lines` lines of `line` elements, `width` at a time.
fn passes(blueprint: TileBlueprint, lines: u32, line: u32, width: usize) -> u32 {
    (lines * (line / width as u32)).div_ceil(blueprint.units())
}

fn row_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, blueprint.tile.rows, blueprint.tile.depth, width)
}

fn weight_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, blueprint.tile.depth / per_value(blueprint), blueprint.tile.columns, width)
}

fn vector_passes(blueprint: TileBlueprint, width: usize) -> u32 {
    passes(blueprint, RANK_CHUNK, blueprint.tile.depth, width)
}

/// Numbers in a value of the array of w0.
fn per_value(blueprint: TileBlueprint) -> u32 {
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
    let vectors = if blueprint.on_chip { vector_passes(blueprint, row_width) } else { 0 };
    rows + weights + vectors <= MOST_AHEAD
}

/// Where the words of super-blocks' scales of a pass are kept.
fn super_at(blueprint: TileBlueprint, width: usize, pass: u32) -> usize {
    (weight_passes(blueprint, width) + pass) as usize
}

/// Where the words of the upper plane of a pass are kept.
fn upper_at(blueprint: TileBlueprint, width: usize, pass: u32) -> usize {
    let before = blueprint.quantisation.map_or(1, loads).saturating_sub(2);
    (before * weight_passes(blueprint, width) + pass) as usize
}

/// As many as are `used`, or one, because there is no array of none.
fn room(passes: u32, used: bool) -> usize {
    if used { passes as usize } else { 1 }
}

/// Room for a step.
#[cube]
pub(crate) fn nothing_fetched<M: Size, N: Size, X: Size, A: Size, W: Size>(
    #[comptime] blueprint: TileBlueprint,
) -> Fetched<N, X, A, W> {
    let row_width = M::value();
    let width = N::value();
    let quantised = comptime!(blueprint.quantisation.is_some());
    Fetched::<N, X, A, W> {
        inputs: Array::new(comptime!(room(row_passes(blueprint, row_width), true))),
        in_scales: Array::new(comptime!(room(row_passes(blueprint, row_width), blueprint.scaled))),
        weights: Array::new(comptime!(room(weight_passes(blueprint, width), true))),
        weight_scales: Array::new(comptime!(room(
            weight_passes(blueprint, width) * (blueprint.quantisation.map_or(1, loads) - 1),
            quantised
        ))),
        vectors: Array::new(comptime!(room(vector_passes(blueprint, row_width), blueprint.on_chip))),
    }
}

/// Fetches the virtual rows from `chunk`, and a tile of the item's weight and the first in-vectors of its W_i, at depths from
/// `depth0`.
#[cube]
pub(crate) fn fetch<X: Float, W: Numeric, A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    x: &Array<Vector<X, M>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    chunk: u32,
    depth0: u32,
    depth_end: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    // What is read again here is kept in no register through the multiplication.
    let mut first = chunk;
    if comptime!(!blueprint.chunks()) {
        first = item::first(entry);
    }
    fetch_rows::<X, A, M, N, XW, AW, WW>(
        x,
        in_pool,
        tables,
        fetched,
        layout,
        first,
        item::end(entry),
        depth0,
        depth_end,
        blueprint,
    );
    fetch_weight::<W, N, XW, AW, WW>(weight, weight_scales, fetched, layout, entry, depth0, depth_end, blueprint);
    if comptime!(blueprint.on_chip) {
        fetch_vectors::<A, M, N, XW, AW, WW>(
            in_pool,
            tables,
            fetched,
            layout,
            item::first_scale(entry),
            item::end_scale(entry),
            depth0,
            blueprint,
        );
    }
}

// Conditions here hold single loads, one after the other, so that CUDA's compiler makes predicates of them and no branch parts a
// load from the next.

#[cube]
fn fetch_rows<X: Float, A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    chunk: u32,
    end: u32,
    depth0: u32,
    depth_end: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let units = comptime!(blueprint.units());
    let vectors = layout.d / width;
    #[unroll]
    for pass in 0..comptime!(row_passes(blueprint, size)) {
        let row = staged_row(chunk, pass, line, units);
        let depth = depth0 / width + staged_column(pass, line, units);
        let inside =
            stages(pass, line, comptime!(blueprint.tile.rows), units) && row < end && depth < depth_end / width;
        let entry = row * tile_row::WORDS;
        let mut input = Vector::<u32, XW>::new(0u32);
        if inside {
            input = to_words::<X, M, XW>(x[(tile_row::row(tables, entry) * vectors + depth) as usize]);
        }
        fetched.inputs[comptime!(pass as usize)] = input;
        if comptime!(blueprint.scaled) {
            let mut slot = 0u32;
            if inside {
                slot = tile_row::in_slot(tables, entry);
            }
            let mut scale = ones::<A, M, AW>();
            if slot > 0 {
                scale = to_words::<A, M, AW>(in_pool[((slot - 1) * vectors + depth) as usize]);
            }
            fetched.in_scales[comptime!(pass as usize)] = scale;
        }
    }
}

#[cube]
fn fetch_weight<W: Numeric, N: Size, XW: Size, AW: Size, WW: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    depth0: u32,
    depth_end: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.columns / width);
    let units = comptime!(blueprint.units());
    let columns = layout.k / width;
    let column0 = item::column_tile(entry, blueprint) * line;
    let per_value = comptime!(per_value(blueprint));
    let lines = comptime!(blueprint.tile.depth / per_value);
    // Which weight; a quantised layer has one.
    let mut first = 0u32;
    if comptime!(blueprint.quantisation.is_none()) {
        first = item::weight(entry) * layout.d;
    }
    #[unroll]
    for pass in 0..comptime!(weight_passes(blueprint, size)) {
        let column = column0 + staged_column(pass, line, units);
        let at = staged_row(depth0 / per_value, pass, line, units);
        let inside = stages(pass, line, lines, units) && at * per_value < depth_end && column < columns;
        let mut words = Vector::<u32, WW>::new(0u32);
        if inside {
            if comptime!(blueprint.quantisation.is_some()) {
                let line = lower_row(at, comptime!(blueprint.quantisation.unwrap()));
                words = to_words::<W, N, WW>(weight[(line * columns + column) as usize]);
            } else {
                words = to_words::<W, N, WW>(weight[((first + at) * columns + column) as usize]);
            }
        }
        fetched.weights[comptime!(pass as usize)] = words;
        if comptime!(blueprint.quantisation.is_some()) {
            let quantisation = comptime!(blueprint.quantisation.unwrap());
            let mut scales = Vector::<u32, N>::new(0u32);
            if inside {
                scales = scale_word::<N>(weight_scales, at * per_value, column, columns, quantisation);
            }
            fetched.weight_scales[comptime!(pass as usize)] = scales;
            if comptime!(nested(quantisation).is_some()) {
                let mut of_all = Vector::<u32, N>::new(0u32);
                if inside {
                    let nested = comptime!(nested(quantisation).unwrap());
                    of_all = super_word::<N>(weight_scales, at * per_value, column, columns, nested);
                }
                fetched.weight_scales[comptime!(super_at(blueprint, size, pass))] = of_all;
            }
            if comptime!(upper_bits(quantisation) > 0) {
                let mut upper = Vector::<u32, N>::new(0u32);
                if inside {
                    let line = upper_row(at * per_value, quantisation);
                    upper = Vector::cast_from(weight[(line * columns + column) as usize]);
                }
                fetched.weight_scales[comptime!(upper_at(blueprint, size, pass))] = upper;
            }
        }
    }
}

/// Fetches the in-vectors from `chunk` of those before `end`.
#[cube]
pub(crate) fn fetch_vectors<A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    chunk: u32,
    end: u32,
    depth0: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let units = comptime!(blueprint.units());
    let vectors = layout.d / width;
    #[unroll]
    for pass in 0..comptime!(vector_passes(blueprint, size)) {
        let rank = staged_row(chunk, pass, line, units);
        let depth = depth0 / width + staged_column(pass, line, units);
        let inside = stages(pass, line, RANK_CHUNK, units) && rank < end && depth < vectors;
        let mut slot = 0u32;
        let mut vector = Vector::<u32, AW>::new(0u32);
        if inside {
            slot = tables::scale::in_slot(tables, layout.scales + rank * tables::scale::WORDS);
            vector = ones::<A, M, AW>();
        }
        if slot > 0 {
            vector = to_words::<A, M, AW>(in_pool[((slot - 1) * vectors + depth) as usize]);
        }
        fetched.vectors[comptime!(pass as usize)] = vector;
    }
}

/// Stages the rows, scaled.
#[cube]
pub(crate) fn stage_rows<X: Float, A: Float, S: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    row_tile: &mut SharedMemory<Vector<S, M>>,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let pitch = comptime!((blueprint.tile.depth + PAD) / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(row_passes(blueprint, size)) {
        if stages(pass, line, comptime!(blueprint.tile.rows), units) {
            let input = from_words::<X, M, XW>(fetched.inputs[comptime!(pass as usize)]);
            let mut value = Vector::<S, M>::cast_from(input);
            if comptime!(blueprint.scaled) {
                let scale = from_words::<A, M, AW>(fetched.in_scales[comptime!(pass as usize)]);
                value = Vector::cast_from(Vector::<f32, M>::cast_from(input) * Vector::<f32, M>::cast_from(scale));
            }
            row_tile[staged_at(pass, line, pitch, units) as usize] = value;
        }
    }
}

/// Stages the in-vectors, `[RANK_CHUNK, depth + PAD]`.
#[cube]
pub(crate) fn stage_vectors<A: Float, S: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    in_tile: &mut SharedMemory<Vector<S, M>>,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let pitch = comptime!((blueprint.tile.depth + PAD) / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(vector_passes(blueprint, size)) {
        if stages(pass, line, RANK_CHUNK, units) {
            let vector = from_words::<A, M, AW>(fetched.vectors[comptime!(pass as usize)]);
            in_tile[staged_at(pass, line, pitch, units) as usize] = Vector::cast_from(vector);
        }
    }
}

/// Stages the weights: decoded, and times `factor` `[depth, columns + SUM_PAD]` where the item has a W_i.
#[cube]
pub(crate) fn stage_weight<W: Numeric, S: Float, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    weight_tile: &mut SharedMemory<Vector<S, N>>,
    factor: &SharedMemory<Vector<f32, N>>,
    depth0: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.columns / width);
    let pitch = comptime!((blueprint.tile.columns + PAD) / width);
    let factor_pitch = comptime!((blueprint.tile.columns + SUM_PAD) / width);
    let units = comptime!(blueprint.units());
    let per_value = comptime!(per_value(blueprint));
    let lines = comptime!(blueprint.tile.depth / per_value);
    #[unroll]
    for pass in 0..comptime!(weight_passes(blueprint, size)) {
        if stages(pass, line, lines, units) {
            let raw = from_words::<W, N, WW>(fetched.weights[comptime!(pass as usize)]);
            if comptime!(blueprint.quantisation.is_none()) {
                let mut value = Vector::<S, N>::cast_from(raw);
                if comptime!(blueprint.on_chip) {
                    let scale = factor[staged_at(pass, line, factor_pitch, units) as usize];
                    value = Vector::cast_from(Vector::<f32, N>::cast_from(raw) * scale);
                }
                weight_tile[staged_at(pass, line, pitch, units) as usize] = value;
            } else {
                let quantisation = comptime!(blueprint.quantisation.unwrap());
                let words = Vector::<u32, N>::cast_from(raw);
                let scales = fetched.weight_scales[comptime!(pass as usize)];
                let depth = staged_row(depth0 / per_value, pass, line, units) * per_value;
                let mut of_all = Vector::<u32, N>::new(0u32);
                if comptime!(nested(quantisation).is_some()) {
                    of_all = fetched.weight_scales[comptime!(super_at(blueprint, size, pass))];
                }
                let mut upper = Vector::<u32, N>::new(0u32);
                if comptime!(upper_bits(quantisation) > 0) {
                    let word = fetched.weight_scales[comptime!(upper_at(blueprint, size, pass))];
                    upper = upper_from::<N>(word, depth, quantisation);
                }
                let slope = scale::<N>(scales, of_all, depth, quantisation);
                let least = minimum::<N>(scales, of_all, depth, quantisation);
                #[unroll]
                for position in 0..per_value {
                    let mut value = slope * level::<N>(words, upper, position, quantisation) + least;
                    if comptime!(blueprint.on_chip) {
                        let at = staged_at(pass, line, comptime!(per_value * factor_pitch), units);
                        value *= factor[(at + position * factor_pitch) as usize];
                    }
                    let at = staged_at(pass, line, comptime!(per_value * pitch), units);
                    weight_tile[(at + position * pitch) as usize] = Vector::cast_from(value);
                }
            }
        }
    }
}
