//! Quantised weights, decoded as they are staged: value = scale · level(stored) + minimum, in f32. Where a number's bits and scales
//! lie is [`Quantisation`]'s and [`Nested`]'s matter; what a device computes of it at run time is here once more, in its own integers.

use cubecl::prelude::*;
use flora_plan::layer::{Levels, Nested, Quantisation, ScaleKind, Scales};

/// The two levels of scales, where there are two.
pub(crate) fn nested(quantisation: Quantisation) -> Option<Nested> {
    match quantisation.scales {
        Scales::Nested(nested) => Some(nested),
        Scales::Outputs | Scales::Blocks { .. } => None,
    }
}

/// Bits of the upper plane.
pub(crate) fn upper_bits(quantisation: Quantisation) -> u32 {
    quantisation.planes().1
}

/// Loads that a word of the lower plane and what it is decoded with take.
pub(crate) fn loads(quantisation: Quantisation) -> u32 {
    2 + u32::from(nested(quantisation).is_some()) + u32::from(upper_bits(quantisation) > 0)
}

fn powers_of_two(quantisation: Quantisation) -> bool {
    matches!(quantisation.scales, Scales::Blocks { kind: ScaleKind::PowerOfTwo, .. })
}

/// What stands for 0; 128 of a codebook, whose levels are then bytes.
fn zero(levels: Levels) -> u32 {
    match levels {
        Levels::Linear { zero } => zero,
        Levels::Codebook(_) => 128,
    }
}

/// Two bits of every level of a codebook, from bit 2 · `pair` of its byte on, as a word: those of level i from bit 2i on.
fn bit_pairs(levels: Levels, pair: u32) -> u32 {
    let Levels::Codebook(levels) = levels else { return 0 };
    let byte = |level: i8| (i32::from(level) + 128) as u32;
    (0..).zip(levels).map(|(at, level)| (byte(level) >> (2 * pair) & 3) << (2 * at)).sum()
}

/// The row of line `line` of the lower plane, whose lines are words of consecutive inputs.
#[cube]
pub(crate) fn lower_row(line: u32, #[comptime] quantisation: Quantisation) -> u32 {
    if comptime!(upper_bits(quantisation) == 0) {
        line
    } else {
        let lines = comptime!(32 / quantisation.per_word());
        line / lines * comptime!(quantisation.bits) + line % lines
    }
}

/// Which of the interleaved runs of upper bits holds those of `depth`, in bits.
#[cube]
fn upper_run(depth: u32, #[comptime] quantisation: Quantisation) -> u32 {
    let run = depth % 32 / comptime!(quantisation.per_word()) * 2 + depth % 2;
    run * comptime!(upper_bits(quantisation))
}

/// The row of the upper bits of `depth`, and of the other inputs of its lower word.
#[cube]
pub(crate) fn upper_row(depth: u32, #[comptime] quantisation: Quantisation) -> u32 {
    let run = upper_run(depth, quantisation);
    depth / 32 * comptime!(quantisation.bits)
        + comptime!(quantisation.planes().0)
        + run / comptime!(quantisation.pair())
}

/// The upper bits of `depth` in the lowest bits, and those of the inputs after it as far from them as [`upper_after`] says.
#[cube]
pub(crate) fn upper_from<N: Size>(
    word: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<u32, N> {
    let pair = comptime!(quantisation.pair());
    let at = depth % comptime!(quantisation.per_word()) / 2 * pair;
    word >> Vector::new(at + upper_run(depth, quantisation) % pair)
}

/// Bits from an even input's upper bits to those of the input `at` further on in its lower word.
fn upper_after(quantisation: Quantisation, at: u32) -> u32 {
    at / 2 * quantisation.pair() + at % 2 * upper_bits(quantisation)
}

/// The levels at position `at` of words of the lower plane and of what [`upper_from`] gives for position 0.
#[cube]
pub(crate) fn level<N: Size>(
    words: Vector<u32, N>,
    upper: Vector<u32, N>,
    #[comptime] at: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<f32, N> {
    let bits = comptime!(quantisation.planes().0);
    let above = comptime!(upper_bits(quantisation));
    let low = (words >> Vector::new(comptime!(at * bits))) & Vector::new(comptime!((1u32 << bits) - 1));
    let mut stored = low;
    if comptime!(above > 0) {
        let high = (upper >> Vector::new(comptime!(upper_after(quantisation, at))))
            & Vector::new(comptime!((1u32 << above) - 1));
        stored = low | (high << Vector::new(bits));
    }
    if comptime!(matches!(quantisation.levels, Levels::Codebook(_))) {
        // A table would be memory; eight bits of sixteen levels are four constants.
        let place = stored << Vector::new(1u32);
        let mut byte = Vector::<u32, N>::new(0u32);
        #[unroll]
        for pair in 0..4u32 {
            let pairs = Vector::<u32, N>::new(comptime!(bit_pairs(quantisation.levels, pair)));
            byte += ((pairs >> place) & Vector::new(3u32)) << Vector::new(comptime!(2 * pair));
        }
        stored = byte;
    }
    Vector::cast_from(stored) - Vector::<f32, N>::new(comptime!(zero(quantisation.levels) as f32))
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

/// The word that has the scale of `depth` for the columns of vector `column`, and its minimum; `scales` as
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
    if comptime!(nested(quantisation).is_some()) {
        let nested = comptime!(nested(quantisation).unwrap());
        let block = depth % comptime!(nested.super_block()) / comptime!(nested.inputs);
        let first = depth / comptime!(nested.super_block()) * comptime!(nested.words());
        line = first + 1 + block / comptime!(nested.per_word());
    } else if comptime!(quantisation.block().is_some()) {
        // Two scales in a word, or a scale and a minimum.
        line = depth / comptime!(quantisation.block().unwrap_or(1) * if quantisation.minimum() { 1 } else { 2 });
    }
    scales[(line * columns + column) as usize]
}

/// The word of the super-block that holds `depth`, likewise.
#[cube]
pub(crate) fn super_word<N: Size>(
    scales: &Array<Vector<u32, N>>,
    depth: u32,
    column: u32,
    columns: u32,
    #[comptime] nested: Nested,
) -> Vector<u32, N> {
    let line = depth / comptime!(nested.super_block()) * comptime!(nested.words());
    scales[(line * columns + column) as usize]
}

/// The integer at `first` of the field of the block of `depth`.
#[cube]
fn integer<N: Size>(
    word: Vector<u32, N>,
    depth: u32,
    #[comptime] first: u32,
    #[comptime] nested: Nested,
) -> Vector<f32, N> {
    let shift = depth / comptime!(nested.inputs) % comptime!(nested.per_word()) * comptime!(nested.field()) + first;
    Vector::cast_from((word >> Vector::new(shift)) & Vector::new(comptime!((1u32 << nested.bits) - 1)))
}

/// The scale of `depth` in its word and that of its super-block, which others don't read.
#[cube]
pub(crate) fn scale<N: Size>(
    word: Vector<u32, N>,
    of_all: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<f32, N> {
    if comptime!(nested(quantisation).is_some()) {
        let nested = comptime!(nested(quantisation).unwrap());
        let number = integer::<N>(word, depth, 0u32, nested);
        half(of_all) * (number - Vector::new(comptime!(nested.zero as f32)))
    } else if comptime!(quantisation.block().is_none()) {
        Vector::<f32, N>::reinterpret(word)
    } else if comptime!(quantisation.minimum()) {
        half(word)
    } else {
        let at = depth / comptime!(quantisation.block().unwrap_or(1));
        let bits = word >> Vector::new(16 * (at % 2));
        if comptime!(powers_of_two(quantisation)) {
            Vector::<f32, N>::reinterpret(bits << Vector::new(16u32))
        } else {
            half(bits & Vector::new(0xffffu32))
        }
    }
}

/// The minimum in the same words; 0 where the format has none.
#[cube]
pub(crate) fn minimum<N: Size>(
    word: Vector<u32, N>,
    of_all: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<f32, N> {
    if comptime!(!quantisation.minimum()) {
        Vector::new(0.0f32)
    } else if comptime!(nested(quantisation).is_some()) {
        let nested = comptime!(nested(quantisation).unwrap());
        half(of_all >> Vector::new(16u32)) * integer::<N>(word, depth, comptime!(nested.bits), nested)
    } else {
        half(word >> Vector::new(16u32))
    }
}
