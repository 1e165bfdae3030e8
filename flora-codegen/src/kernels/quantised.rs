//! A quantised weight on its way to where it is multiplied: its words and scales are fetched as they are stored, and decoded as they are
//! staged, where the type that is multiplied allows two at a time.

use cubecl::prelude::*;

use super::blueprint::{Multiply, PAD, SUM_PAD, TileBlueprint};
use super::decode::{
    BYTE_MAGIC, MAGIC, byte_number, folded_zero, folds_zero, inputs_of_scales, level, lower_row, minimum, nested,
    scale, scale_word, super_word, upper_bits, upper_from, upper_row,
};
use super::decode_pairs::{MAGIC as PAIR_MAGIC, block_scales, decode_pair, decodes_pairs, halves_of, magic};
use super::fetched::{
    Depths, Fetched, load, per_value, place, places_are_signed, super_at, upper_at, weight_passes, within,
};
use super::item;
use super::tables::Layout;
use super::units::{line_within, staged_at, staged_column, staged_row, stages};
use super::words::from_words;

/// Fetches words of a quantised weight, and what they are decoded with.
#[cube]
pub(crate) fn fetch_words<W: Numeric, N: Size, XW: Size, AW: Size, WW: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    depth0: u32,
    depths: Depths,
    #[comptime] ragged: bool,
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
    let quantisation = comptime!(blueprint.quantisation.unwrap());
    #[unroll]
    for pass in 0..comptime!(weight_passes(blueprint, size)) {
        let own = comptime!(pass as usize);
        let column = min(column0 + staged_column(pass, line, units), columns - 1);
        let depth = depth0 + line_within(pass, line, lines, units) * per_value;
        let at = depth / per_value;
        let mut inside = true.runtime();
        if comptime!(ragged) {
            inside = within(depth, depths);
        }
        let mut words = Vector::<u32, WW>::new(0u32);
        if inside {
            words = load::<W, N, WW>(weight, lower_row(at, quantisation) * columns + column, blueprint);
        }
        fetched.weights[own] = words;
        let mut scales = Vector::<u32, N>::new(0u32);
        if inside {
            if comptime!(blueprint.even_blocks) {
                let together = comptime!(inputs_of_scales(quantisation).unwrap());
                let row = depth0 / together + staged_depth(pass, together, size, blueprint) / together;
                scales = weight_scales[(row * columns + column) as usize];
            } else {
                scales = scale_word::<N>(weight_scales, depth, column, columns, quantisation);
            }
        }
        fetched.weight_scales[own] = scales;
        if comptime!(nested(quantisation).is_some()) {
            let mut of_all = Vector::<u32, N>::new(0u32);
            if inside {
                let nested = comptime!(nested(quantisation).unwrap());
                of_all = super_word::<N>(weight_scales, depth, column, columns, nested);
            }
            fetched.weight_scales[comptime!(super_at(blueprint, size, pass))] = of_all;
        }
        if comptime!(upper_bits(quantisation) > 0) {
            let mut upper = Vector::<u32, N>::new(0u32);
            if inside {
                let line = upper_row(depth, quantisation);
                upper = Vector::cast_from(weight[(line * columns + column) as usize]);
            }
            fetched.weight_scales[comptime!(upper_at(blueprint, size, pass))] = upper;
        }
    }
}

/// Whether the units of a cube decode in pass `pass` numbers of one run of `run` depths of a step, of which `width` columns are a
/// vector.
fn is_one_run(blueprint: TileBlueprint, width: usize, pass: u32, run: u32) -> bool {
    let line = blueprint.tile.columns / width as u32;
    let depths = blueprint.units() / line * per_value(blueprint);
    blueprint.units().is_multiple_of(line) && pass * depths / run == ((pass + 1) * depths - 1) / run
}

/// The depth in a step of what the unit stages in pass `pass`; where all units' are of one run of `run` depths, that of the first.
#[cube]
fn staged_depth(
    #[comptime] pass: u32,
    #[comptime] run: u32,
    #[comptime] width: usize,
    #[comptime] blueprint: TileBlueprint,
) -> u32 {
    let line = comptime!(blueprint.tile.columns / width as u32);
    let units = comptime!(blueprint.units());
    let lines = comptime!(blueprint.tile.depth / per_value(blueprint));
    if comptime!(is_one_run(blueprint, width, pass, run)) {
        comptime!(pass * (units / line) * per_value(blueprint)).runtime()
    } else {
        line_within(pass, line, lines, units) * comptime!(per_value(blueprint))
    }
}

/// Decodes and stages the words, as [`stage_weight`](super::stage::stage_weight) says.
#[cube]
pub(crate) fn stage_words<W: Numeric, S: Float, N: Size, XW: Size, AW: Size, WW: Size>(
    fetched: &Fetched<N, XW, AW, WW>,
    weight_tile: &mut SharedMemory<Vector<S, N>>,
    start: u32,
    factor: &SharedMemory<Vector<f32, N>>,
    depth0: u32,
    small: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.columns / width);
    let pitch = comptime!((blueprint.tile.columns + PAD) / width);
    let units = comptime!(blueprint.units());
    let per_value = comptime!(per_value(blueprint));
    let lines = comptime!(blueprint.tile.depth / per_value);
    #[unroll]
    for pass in 0..comptime!(weight_passes(blueprint, size)) {
        if stages(pass, line, lines, units) {
            let words = Vector::<u32, N>::cast_from(from_words::<W, N, WW>(fetched.weights[comptime!(pass as usize)]));
            let depth = if comptime!(blueprint.even_blocks) {
                let block = comptime!(blueprint.quantisation.unwrap().block().unwrap_or(1));
                staged_depth(pass, block, size, blueprint)
            } else {
                depth0 + staged_row(0u32, pass, line, units) * per_value
            };
            let at = start + staged_at(pass, line, comptime!(per_value * pitch), units);
            if comptime!(decodes_pairs(blueprint, size)) {
                let scales = fetched.weight_scales[comptime!(pass as usize)];
                stage_pairs::<S, N>(words, scales, weight_tile, at, depth, small, blueprint);
            } else {
                stage_numbers::<S, N, XW, AW, WW>(
                    words,
                    fetched,
                    weight_tile,
                    factor,
                    at,
                    depth,
                    small,
                    pass,
                    blueprint,
                );
            }
        }
    }
}

/// One number after the other, in f32.
#[cube]
fn stage_numbers<S: Float, N: Size, XW: Size, AW: Size, WW: Size>(
    words: Vector<u32, N>,
    fetched: &Fetched<N, XW, AW, WW>,
    weight_tile: &mut SharedMemory<Vector<S, N>>,
    factor: &SharedMemory<Vector<f32, N>>,
    at: u32,
    depth: u32,
    small: u32,
    #[comptime] pass: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let width = comptime!(size as u32);
    let line = comptime!(blueprint.tile.columns / width);
    let pitch = comptime!((blueprint.tile.columns + PAD) / width);
    let factor_pitch = comptime!((blueprint.tile.columns + SUM_PAD) / width);
    let units = comptime!(blueprint.units());
    let per_value = comptime!(per_value(blueprint));
    let quantisation = comptime!(blueprint.quantisation.unwrap());
    let scales = fetched.weight_scales[comptime!(pass as usize)];
    let mut of_all = Vector::<u32, N>::new(0u32);
    if comptime!(nested(quantisation).is_some()) {
        of_all = fetched.weight_scales[comptime!(super_at(blueprint, size, pass))];
    }
    let mut upper = Vector::<u32, N>::new(0u32);
    if comptime!(upper_bits(quantisation) > 0) {
        let word = fetched.weight_scales[comptime!(upper_at(blueprint, size, pass))];
        upper = upper_from::<N>(word, depth, quantisation);
    }
    let native = comptime!(blueprint.multiply == Multiply::Mma);
    // Where a device may round the product of a multiply-add, only what is exact without one is.
    let folds = comptime!(native && folds_zero(quantisation));
    let mut magic_word = MAGIC.runtime();
    if comptime!(native) {
        magic_word = magic(small, if folds { BYTE_MAGIC } else { MAGIC });
    }
    let slope = scale::<N>(scales, of_all, depth, quantisation, native);
    let least = if comptime!(folds) {
        folded_zero::<N>(slope, quantisation)
    } else {
        minimum::<N>(scales, of_all, depth, quantisation, native)
    };
    #[unroll]
    for position in 0..per_value {
        let mut value = if comptime!(folds) {
            fma(slope, byte_number::<N>(words, magic_word, position), least)
        } else {
            slope * level::<N>(words, upper, magic_word, position, quantisation) + least
        };
        if comptime!(blueprint.on_chip > 0 && !places_are_signed(blueprint)) {
            let at = staged_at(pass, line, comptime!(per_value * factor_pitch), units);
            value *= factor[(at + position * factor_pitch) as usize];
        }
        place::<S, N>(weight_tile, at + position * pitch, Vector::cast_from(value), blueprint);
    }
}

/// The numbers of two columns at a time, as halves.
#[cube]
fn stage_pairs<S: Float, N: Size>(
    words: Vector<u32, N>,
    scales: Vector<u32, N>,
    weight_tile: &mut SharedMemory<Vector<S, N>>,
    at: u32,
    depth: u32,
    small: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let size = N::value();
    let pairs = comptime!(size / 2);
    let size!(P) = pairs;
    let pitch = comptime!((blueprint.tile.columns + PAD) / size as u32);
    let quantisation = comptime!(blueprint.quantisation.unwrap());
    let scales = block_scales::<N>(scales, depth, quantisation);
    let mut slopes = Array::<u32>::new(pairs);
    #[unroll]
    for pair in 0..pairs {
        let (low, high) = (scales[comptime!(2 * pair)], scales[comptime!(2 * pair + 1)]);
        slopes[pair] = halves_of(low, high, false);
    }
    let magic_word = magic(small, PAIR_MAGIC);
    #[unroll]
    for position in 0..comptime!(quantisation.per_word()) {
        let mut decoded = Vector::<u32, P>::empty();
        #[unroll]
        for pair in 0..pairs {
            decoded[pair] = decode_pair::<S>(
                words[comptime!(2 * pair)],
                words[comptime!(2 * pair + 1)],
                slopes[pair],
                magic_word,
                position,
                quantisation,
            );
        }
        place::<S, N>(weight_tile, at + position * pitch, from_words::<S, N, P>(decoded), blueprint);
    }
}
