//! Quantised weights, decoded as they are staged: value = scale · level(stored) + minimum, in f32. Where a number's bits and scales
//! lie is [`Quantisation`]'s and [`Nested`]'s matter; what a device computes of it at run time is here once more, in its own integers.

use cubecl::prelude::*;
use flora_plan::layer::{Levels, Nested, Quantisation, ScaleKind, Scales};
use half::f16;

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

/// Whether decoding takes so many registers that the tile of most rows has none left for it: of words of four kinds, or of a codebook.
pub(crate) fn crowds_registers(quantisation: Quantisation) -> bool {
    loads(quantisation) >= 4 || matches!(quantisation.levels, Levels::Codebook(_))
}

fn powers_of_two(quantisation: Quantisation) -> bool {
    matches!(quantisation.scales, Scales::Blocks { kind: ScaleKind::PowerOfTwo, .. })
}

/// What stands for 0; 128 of a codebook, whose levels are then bytes.
pub(crate) fn zero(levels: Levels) -> u32 {
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

/// Inputs of an output whose blocks' scales share a word, where a number's position in its word doesn't depend on them.
pub(crate) fn inputs_of_scales(quantisation: Quantisation) -> Option<u32> {
    let Scales::Blocks { .. } = quantisation.scales else { return None };
    let blocks = if quantisation.minimum() { 1 } else { 2 };
    quantisation.block().filter(|_| upper_bits(quantisation) == 0).map(|block| blocks * block)
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

/// 2²³ as f32: an integer in the bits below it is added to it.
pub(crate) const MAGIC: u32 = 0x4b00_0000;
/// Bits of an f32 that such an integer may have.
const MAGIC_BITS: u32 = 23;

/// Where position `at` of a word of the lower plane is read: whether in the word's upper half, and the first bit there.
fn field(at: u32, quantisation: Quantisation) -> (bool, u32) {
    let (bits, above) = quantisation.planes();
    let first = at * bits;
    if first + bits + above > MAGIC_BITS { (true, first - 16) } else { (false, first) }
}

/// What is added to 2²³ + stored · 2^`first`, times 2^-`first`, to get stored − `zero`. All of it is exact.
fn magic_offset(first: u32, zero: u32) -> f32 {
    -((1u32 << (MAGIC_BITS - first)) as f32 + zero as f32)
}

fn power(first: u32) -> f32 {
    1.0 / (1u32 << first) as f32
}

/// The levels at position `at` of words of the lower plane and of what [`upper_from`] gives for position 0. No integer is converted: its
/// bits become an f32 of which a constant is taken away, because conversions are several times slower than sums on a GPU. `magic` is
/// [`MAGIC`].
#[cube]
pub(crate) fn level<N: Size>(
    words: Vector<u32, N>,
    upper: Vector<u32, N>,
    magic: u32,
    #[comptime] at: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<f32, N> {
    let bits = comptime!(quantisation.planes().0);
    let above = comptime!(upper_bits(quantisation));
    let (is_upper_half, first) = comptime!(field(at, quantisation));
    let mut part = words;
    if comptime!(is_upper_half) {
        part = words >> Vector::new(16u32);
    }
    let mut field = part & Vector::new(comptime!(((1u32 << bits) - 1) << first));
    if comptime!(above > 0) {
        // What the upper plane has belongs above them.
        let place = comptime!(upper_after(quantisation, at));
        let mask = comptime!(((1u32 << above) - 1) << place);
        let high = upper & Vector::new(mask);
        if comptime!(first + bits >= place) {
            field |= high << Vector::new(comptime!(first + bits - place));
        } else {
            field |= high >> Vector::new(comptime!(place - first - bits));
        }
    }
    let zero = comptime!(zero(quantisation.levels));
    if comptime!(matches!(quantisation.levels, Levels::Codebook(_))) {
        // A table would be memory; eight bits of sixteen levels are four constants.
        let place = (field >> Vector::new(first)) << Vector::new(1u32);
        let mut byte = Vector::<u32, N>::new(0u32);
        #[unroll]
        for pair in 0..4u32 {
            let pairs = Vector::<u32, N>::new(comptime!(bit_pairs(quantisation.levels, pair)));
            byte |= ((pairs >> place) & Vector::new(3u32)) << Vector::new(comptime!(2 * pair));
        }
        integer_less(byte, magic, 0u32, zero)
    } else {
        integer_less(field, magic, first, zero)
    }
}

/// field · 2^-`first` − `zero`, of an integer `field` below 2²³.
#[cube]
fn integer_less<N: Size>(
    field: Vector<u32, N>,
    magic: u32,
    #[comptime] first: u32,
    #[comptime] zero: u32,
) -> Vector<f32, N> {
    let number = Vector::<f32, N>::reinterpret(field | Vector::new(magic));
    let offset = Vector::<f32, N>::new(comptime!(magic_offset(first, zero)));
    if comptime!(first == 0) { number + offset } else { fma(number, Vector::new(comptime!(power(first))), offset) }
}

/// 2¹⁵ as f32: a byte at bits 8 to 15 is an integer that is added to it.
pub(crate) const BYTE_MAGIC: u32 = 0x4700_0000;

/// Whether scale · (stored − zero) is one multiply-add, scale · number − scale · (2¹⁵ + zero). The scale is an f16, of 11 bits, so that
/// what is taken away has 20 and the result 19: both are exact in f32, as long as the product isn't rounded by itself.
pub(crate) fn folds_zero(quantisation: Quantisation) -> bool {
    let halves = matches!(quantisation.scales, Scales::Blocks { kind: ScaleKind::F16, .. });
    let linear = matches!(quantisation.levels, Levels::Linear { zero } if zero == 128);
    halves && linear && quantisation.planes() == (8, 0) && !quantisation.minimum()
}

/// What [`folds_zero`] adds.
#[cube]
pub(crate) fn folded_zero<N: Size>(slope: Vector<f32, N>, #[comptime] quantisation: Quantisation) -> Vector<f32, N> {
    slope * Vector::new(comptime!(-32768.0 - zero(quantisation.levels) as f32))
}

/// 2¹⁵ and the byte at position `at` of words; `magic` is [`BYTE_MAGIC`].
#[cube]
pub(crate) fn byte_number<N: Size>(words: Vector<u32, N>, magic: u32, #[comptime] at: u32) -> Vector<f32, N> {
    let mut part = words;
    if comptime!(at == 0) {
        part = words << Vector::new(8u32);
    } else if comptime!(at > 1) {
        part = words >> Vector::new(comptime!(8 * at.max(1) - 8));
    }
    Vector::<f32, N>::reinterpret((part & Vector::new(0xff00u32)) | Vector::new(magic))
}

/// f16 in the low halves of words; `native` where the device has such numbers.
#[cube]
fn widened<N: Size>(bits: Vector<u32, N>, #[comptime] native: bool) -> Vector<f32, N> {
    if comptime!(native) {
        let size = N::value();
        let size!(H) = comptime!(2 * size);
        let halves = Vector::<f16, H>::reinterpret(bits);
        let mut value = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..size {
            value[lane] = f32::cast_from(halves[comptime!(2 * lane)]);
        }
        value
    } else {
        widened_by_integers::<N>(bits)
    }
}

/// The same by integers, which every device has.
#[cube]
fn widened_by_integers<N: Size>(bits: Vector<u32, N>) -> Vector<f32, N> {
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
    #[comptime] zero: u32,
) -> Vector<f32, N> {
    let shift = depth / comptime!(nested.inputs) % comptime!(nested.per_word()) * comptime!(nested.field()) + first;
    let number = (word >> Vector::new(shift)) & Vector::new(comptime!((1u32 << nested.bits) - 1));
    integer_less::<N>(number, MAGIC.runtime(), 0u32, zero)
}

/// The scale of `depth` in its word and that of its super-block, which others don't read.
#[cube]
pub(crate) fn scale<N: Size>(
    word: Vector<u32, N>,
    of_all: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
    #[comptime] native: bool,
) -> Vector<f32, N> {
    if comptime!(nested(quantisation).is_some()) {
        let nested = comptime!(nested(quantisation).unwrap());
        widened(of_all, native) * integer::<N>(word, depth, 0u32, nested, nested.zero)
    } else if comptime!(quantisation.block().is_none()) {
        Vector::<f32, N>::reinterpret(word)
    } else if comptime!(quantisation.minimum()) {
        widened(word, native)
    } else {
        let at = depth / comptime!(quantisation.block().unwrap_or(1));
        let bits = word >> Vector::new(16 * (at % 2));
        if comptime!(powers_of_two(quantisation)) {
            Vector::<f32, N>::reinterpret(bits << Vector::new(16u32))
        } else {
            widened(bits & Vector::new(0xffffu32), native)
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
    #[comptime] native: bool,
) -> Vector<f32, N> {
    if comptime!(!quantisation.minimum()) {
        Vector::new(0.0f32)
    } else if comptime!(nested(quantisation).is_some()) {
        let nested = comptime!(nested(quantisation).unwrap());
        widened(of_all >> Vector::new(16u32), native) * integer::<N>(word, depth, comptime!(nested.bits), nested, 0u32)
    } else {
        widened(word >> Vector::new(16u32), native)
    }
}
