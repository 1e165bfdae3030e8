//! Quantised weights, decoded as they are staged: value = scale · (stored − zero) + minimum, in f32.

use cubecl::prelude::*;
use flora_plan::layer::Quantisation;

/// The numbers at position `at` of words, as unsigned.
#[cube]
pub(crate) fn stored<N: Size>(words: Vector<u32, N>, #[comptime] at: u32, #[comptime] bits: u32) -> Vector<f32, N> {
    let shifted = words >> Vector::new(comptime!(at * bits));
    Vector::cast_from(shifted & Vector::new(comptime!((1u32 << bits) - 1)))
}

/// f16 in the low halves of words. Every device can do it, with or without f16.
#[cube]
fn half<N: Size>(bits: Vector<u32, N>) -> Vector<f32, N> {
    let exponent = (bits >> Vector::new(10u32)) & Vector::new(31u32);
    // 1 for a number too small to have an implicit leading bit: it is read with one, which is then taken away.
    let small = Vector::new(1u32) - ((exponent + Vector::new(31u32)) >> Vector::new(5u32));
    let magnitude = (bits & Vector::new(0x7fffu32)) << Vector::new(13u32);
    let biased = magnitude + ((Vector::new(112u32) + small) << Vector::new(23u32));
    let value = Vector::<f32, N>::reinterpret(biased) - Vector::cast_from(small) * Vector::new(6.103_515_6e-5f32);
    let negative: Vector<f32, N> = Vector::cast_from((bits >> Vector::new(15u32)) & Vector::new(1u32));
    value * (Vector::new(1.0f32) - negative - negative)
}

/// The word that has the scale of `depth` for the columns of vector `column`; `scales` as
/// [`flora_plan::weight::PackedWeight::scales`] has them, `columns` vectors a line.
#[cube]
pub(crate) fn scale_word<N: Size>(
    scales: &Array<Vector<u32, N>>,
    depth: u32,
    column: u32,
    columns: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<u32, N> {
    let mut line = 0u32;
    if comptime!(quantisation.block.is_some()) {
        // Two scales in a word, or a scale and a minimum.
        line = depth / comptime!(quantisation.block.unwrap_or(1) * if quantisation.minimum { 1 } else { 2 });
    }
    scales[(line * columns + column) as usize]
}

/// The scale of `depth` in its word.
#[cube]
pub(crate) fn scale<N: Size>(
    word: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<f32, N> {
    if comptime!(quantisation.block.is_none()) {
        Vector::<f32, N>::reinterpret(word)
    } else if comptime!(quantisation.minimum) {
        half(word)
    } else {
        let at = depth / comptime!(quantisation.block.unwrap_or(1));
        half((word >> Vector::new(16 * (at % 2))) & Vector::new(0xffffu32))
    }
}

/// The minimum in the same word; 0 where the format has none.
#[cube]
pub(crate) fn minimum<N: Size>(word: Vector<u32, N>, #[comptime] quantisation: Quantisation) -> Vector<f32, N> {
    if comptime!(quantisation.minimum) { half(word >> Vector::new(16u32)) } else { Vector::new(0.0f32) }
}
