//! How operands come to where they are multiplied: a step of d is *fetched* into the registers of the cube's units while the step
//! before it is multiplied, and *staged* in shared memory, scaled and decoded, once that is done. So the time that memory takes to
//! answer is spent on multiplying, on every device and without its asynchronous copies.
//! What is fetched waits as words, whatever it is.
//!
//! Bytes: those of the tile kernel. Registers: a vector for each load of a unit, which [`super::fetched`] bounds.

use cubecl::prelude::*;

use super::blueprint::{Multiply, PAD, SUM_PAD, TileBlueprint};
use super::fetched::{
    Depths, Fetched, load, ones_stand, place, places_are_signed, row_passes, vector_passes, weight_passes, within,
};
use super::places::Places;
use super::quantised::{fetch_words, stage_words};
use super::tables::Layout;
use super::units::{staged_at, staged_column, staged_row, stages};
use super::words::{from_words, ones};

/// Fetches a step that starts at depth `depth0`, and advances `places`. Only a `ragged` one may leave the cube's depths.
#[cube]
pub(crate) fn fetch<X: Float, W: Numeric, A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    x: &Array<Vector<X, M>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<Vector<A, M>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    places: &mut Places,
    layout: Layout,
    entry: &SharedMemory<u32>,
    depth0: u32,
    depths: Depths,
    #[comptime] ragged: bool,
    #[comptime] blueprint: TileBlueprint,
) {
    fetch_rows::<X, A, M, N, XW, AW, WW>(x, in_pool, fetched, places, depth0, depths, ragged, blueprint);
    if comptime!(blueprint.quantisation.is_some()) {
        fetch_words::<W, N, XW, AW, WW>(
            weight,
            weight_scales,
            fetched,
            layout,
            entry,
            depth0,
            depths,
            ragged,
            blueprint,
        );
    } else {
        fetch_weight::<W, N, XW, AW, WW>(weight, fetched, places, layout, depth0, depths, ragged, blueprint);
    }
    if comptime!(blueprint.on_chip > 0) {
        fetch_vectors::<A, M, N, XW, AW, WW>(in_pool, fetched, &mut places.vectors, depth0, depths, ragged, blueprint);
    }
}

// Conditions here hold single loads, one after the other, so that CUDA's compiler makes predicates of them and no branch parts a
// load from the next.

#[cube]
fn fetch_rows<X: Float, A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    places: &mut Places,
    depth0: u32,
    depths: Depths,
    #[comptime] ragged: bool,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(row_passes(blueprint, size)) {
        let own = comptime!(pass as usize);
        let mut inside = true.runtime();
        if comptime!(ragged) {
            inside = within(depth0 + staged_column(pass, line, units) * width, depths);
        }
        let at = places.inputs[own];
        let mut input = Vector::<u32, XW>::new(0u32);
        if inside {
            input = load::<X, M, XW>(x, at, blueprint);
        }
        fetched.inputs[own] = input;
        places.inputs[own] = at + line;
        if comptime!(blueprint.scaled) {
            let at = places.in_scales[own];
            if comptime!(ones_stand(blueprint, size)) {
                if inside && i32::cast_from(at) >= 0 {
                    fetched.in_scales[own] = load::<A, M, AW>(in_pool, at, blueprint);
                }
            } else {
                let mut scale = ones::<A, M, AW>();
                if inside && i32::cast_from(at) >= 0 {
                    scale = load::<A, M, AW>(in_pool, at, blueprint);
                }
                fetched.in_scales[own] = scale;
            }
            places.in_scales[own] = at + line;
        }
    }
}

#[cube]
fn fetch_weight<W: Numeric, N: Size, XW: Size, AW: Size, WW: Size>(
    weight: &Array<Vector<W, N>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    places: &mut Places,
    layout: Layout,
    depth0: u32,
    depths: Depths,
    #[comptime] ragged: bool,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.columns / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(weight_passes(blueprint, size)) {
        let own = comptime!(pass as usize);
        let mut inside = true.runtime();
        if comptime!(ragged) {
            inside = within(staged_row(depth0, pass, line, units), depths);
        }
        let at = places.weights[own];
        let mut words = Vector::<u32, WW>::new(0u32);
        if inside {
            words = load::<W, N, WW>(weight, at, blueprint);
        }
        fetched.weights[own] = words;
        places.weights[own] = at + layout.k / width * comptime!(blueprint.tile.depth);
    }
}

/// Fetches in-vectors of W_i.
#[cube]
pub(crate) fn fetch_vectors<A: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    in_pool: &Array<Vector<A, M>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    places: &mut Array<u32>,
    depth0: u32,
    depths: Depths,
    #[comptime] ragged: bool,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(vector_passes(blueprint, size)) {
        let own = comptime!(pass as usize);
        let at = places[own];
        let mut inside = i32::cast_from(at) >= 0;
        if comptime!(ragged) {
            inside = inside && within(depth0 + staged_column(pass, line, units) * width, depths);
        }
        if comptime!(ones_stand(blueprint, size)) {
            if inside {
                fetched.vectors[own] = load::<A, M, AW>(in_pool, at, blueprint);
            }
        } else {
            let mut vector = ones::<A, M, AW>();
            if inside {
                vector = load::<A, M, AW>(in_pool, at, blueprint);
            }
            fetched.vectors[own] = vector;
        }
        places[own] = at + line;
    }
}

/// Stages the rows, scaled, from vector `start` of the tile on.
#[cube]
pub(crate) fn stage_rows<X: Float, A: Float, S: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    row_tile: &mut SharedMemory<Vector<S, M>>,
    start: u32,
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
                if comptime!(blueprint.adapters_alike && blueprint.multiply == Multiply::Mma) {
                    // The bits of the f32 product, which is exact, rounded once.
                    value *= Vector::cast_from(scale);
                } else {
                    value = Vector::cast_from(Vector::<f32, M>::cast_from(input) * Vector::<f32, M>::cast_from(scale));
                }
            }
            place::<S, M>(row_tile, start + staged_at(pass, line, pitch, units), value, blueprint);
        }
    }
}

/// Stages the in-vectors, `[blueprint.on_chip, depth + PAD]`, from vector `start` of the tile on.
#[cube]
pub(crate) fn stage_vectors<A: Float, S: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    in_tile: &mut SharedMemory<Vector<S, M>>,
    start: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = M::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.depth / width);
    let pitch = comptime!((blueprint.tile.depth + PAD) / width);
    let units = comptime!(blueprint.units());
    #[unroll]
    for pass in 0..comptime!(vector_passes(blueprint, size)) {
        if stages(pass, line, comptime!(blueprint.on_chip), units) {
            let vector = Vector::cast_from(from_words::<A, M, AW>(fetched.vectors[comptime!(pass as usize)]));
            place::<S, M>(in_tile, start + staged_at(pass, line, pitch, units), vector, blueprint);
        }
    }
}

/// Stages the weights, from vector `start` of the tile on: decoded, and times `factor` `[depth, columns + SUM_PAD]` where the item
/// has a W_i that isn't made in registers. `small` is a number below 2³¹.
#[cube]
pub(crate) fn stage_weight<W: Numeric, S: Float, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    weight_tile: &mut SharedMemory<Vector<S, N>>,
    start: u32,
    factor: &SharedMemory<Vector<f32, N>>,
    depth0: u32,
    small: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    if comptime!(blueprint.quantisation.is_some()) {
        stage_words::<W, S, N, XW, AW, WW>(fetched, weight_tile, start, factor, depth0, small, blueprint);
    } else {
        let size = N::value();
        let width = comptime!(size as u32);
        let line = comptime!(blueprint.tile.columns / width);
        let pitch = comptime!((blueprint.tile.columns + PAD) / width);
        let factor_pitch = comptime!((blueprint.tile.columns + SUM_PAD) / width);
        let units = comptime!(blueprint.units());
        let lines = comptime!(blueprint.tile.depth);
        #[unroll]
        for pass in 0..comptime!(weight_passes(blueprint, size)) {
            if stages(pass, line, lines, units) {
                let raw = from_words::<W, N, WW>(fetched.weights[comptime!(pass as usize)]);
                let mut value = Vector::<S, N>::cast_from(raw);
                if comptime!(blueprint.on_chip > 0 && !places_are_signed(blueprint)) {
                    let scale = factor[staged_at(pass, line, factor_pitch, units) as usize];
                    value = Vector::cast_from(Vector::<f32, N>::cast_from(raw) * scale);
                }
                place::<S, N>(weight_tile, start + staged_at(pass, line, pitch, units), value, blueprint);
            }
        }
    }
}
