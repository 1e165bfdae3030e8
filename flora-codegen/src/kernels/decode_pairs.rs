//! Quantised weights decoded two at a time, as halves: the numbers of two neighbouring columns in one register.
//!
//! Adding 1024 to an integer of up to 10 bits is putting its bits below a half's exponent. So a number is a mask, a sum and a product
//! for two of them, where f32 takes each of these for one and packs in the end. The level is exact, and so is the scale, which is a
//! half in the file: the product has the bits of an f32's, rounded once. With a minimum it would be rounded twice.

use cubecl::prelude::*;
use flora_plan::layer::{Element, Levels, Quantisation, ScaleKind, Scales};

use super::blueprint::{Multiply, TileBlueprint};
use super::decode::{upper_bits, zero};
use super::registers::Pair;

/// 1024 as a half, twice.
pub(crate) const MAGIC: u32 = 0x6400_6400;
/// Bits of a half that an integer beside it may have.
const MAGIC_BITS: u32 = 10;

/// Whether a weight's numbers are decoded in pairs, where a vector has `width` of them.
pub(crate) fn decodes_pairs(blueprint: TileBlueprint, width: usize) -> bool {
    let Some(quantisation) = blueprint.quantisation else { return false };
    let halves = matches!(quantisation.scales, Scales::Blocks { kind: ScaleKind::F16, .. });
    let linear = matches!(quantisation.levels, Levels::Linear { .. }) && upper_bits(quantisation) == 0;
    let linear = linear && !quantisation.minimum();
    let is_half = blueprint.multiply == Multiply::Mma && blueprint.stage == Element::F16;
    is_half && halves && linear && width.is_multiple_of(2)
}

/// Where position `at` is read: whether in the words' upper halves, how far those are shifted, and the first bit after that.
fn field(at: u32, bits: u32) -> (bool, u32, u32) {
    let first = at * bits % 16;
    let shift = if first + bits > MAGIC_BITS { 8 } else { 0 };
    (at * bits >= 16, shift, first - shift)
}

/// The low halves of two words, or their upper ones: said as halves, which CUDA's compiler makes one permutation of.
#[cube]
pub(crate) fn halves_of(low: u32, high: u32, #[comptime] upper: bool) -> u32 {
    let half = comptime!(usize::from(upper));
    let mut halves = Vector::<u16, Const<2>>::empty();
    halves[0usize] = Vector::<u16, Const<2>>::reinterpret(low)[half];
    halves[1usize] = Vector::<u16, Const<2>>::reinterpret(high)[half];
    u32::reinterpret(halves)
}

/// The numbers at position `at` of the words of two columns, times their scales.
#[cube]
pub(crate) fn decode_pair<S: Float>(
    low: u32,
    high: u32,
    slope: u32,
    magic: u32,
    #[comptime] at: u32,
    #[comptime] quantisation: Quantisation,
) -> u32 {
    let bits = comptime!(quantisation.bits);
    let (upper, shift, first) = comptime!(field(at, bits));
    let mut halves = halves_of(low, high, upper);
    if comptime!(shift > 0) {
        halves >>= shift;
    }
    let mask = comptime!(((1u32 << bits) - 1) << first);
    let number = Pair::<S>::reinterpret((halves & comptime!(mask | mask << 16)) | magic);
    let zero = comptime!(zero(quantisation.levels) as f32);
    let power = comptime!(1.0 / (1u32 << first) as f32);
    let offset = Pair::<S>::new(S::new(comptime!(1024.0 * power + zero)));
    let level = if comptime!(first == 0) { number - offset } else { number * Pair::<S>::new(S::new(power)) - offset };
    u32::reinterpret(level * Pair::<S>::reinterpret(slope))
}

/// The scale of the block of `depth` in the low half of its word.
#[cube]
pub(crate) fn block_scales<N: Size>(
    words: Vector<u32, N>,
    depth: u32,
    #[comptime] quantisation: Quantisation,
) -> Vector<u32, N> {
    words >> Vector::new(depth / comptime!(quantisation.block().unwrap_or(1)) % 2 * 16)
}

/// `word`, with a number that is known to be small, but not to CUDA's compiler: so the constant is in a register, and a mask and it are
/// one instruction.
#[cube]
pub(crate) fn magic(small: u32, #[comptime] word: u32) -> u32 {
    (small >> 31) + word
}
