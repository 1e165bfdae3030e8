//! Rows of x rounded to 8 bits, so that processors multiply four numbers at a time. Each block of a row's inputs has its own scale, so
//! that one large number costs its block alone its exactness.
//!
//! x ≈ scale · n with n in −127..=127 and scale = max |x| / 127 of the block: off by half a scale at most. A block with a number that
//! isn't finite has NaN for a scale, and so have all outputs of its row.

use std::ops::Range;

use flora_plan::layer::Quantisation;
use pulp::Simd;

use crate::decode::GROUP;
use crate::layout::{PAIRED_SLICE, X_PITCH};
use crate::pack::Vectors;
use crate::stored_bytes::{QUAD, stride, zero};
use crate::vectorise::vectorised;

/// The depth that a row's products are summed over before they are scaled and added to its sum: as with floats, a row's bits depend
/// on it.
pub(crate) const BYTE_SLICE: usize = PAIRED_SLICE;

/// The least inputs of a block.
const SHORTEST: usize = 16;

/// The largest integer.
const MOST: f32 = 127.0;

/// A block whose numbers are all below this is rounded as if one were as large: a scale has an inverse then.
const LEAST: f32 = 1e-30;

/// The place of a row's scales, one a block, behind its quads.
pub(crate) const SCALES: usize = BYTE_SLICE / QUAD;

/// The place of what its sums begin with: see [`Begin`].
pub(crate) const BEGINNINGS: usize = SCALES + BYTE_SLICE / SHORTEST;

const _: () = assert!(BEGINNINGS + BYTE_SLICE / SHORTEST <= X_PITCH);

/// How rows are rounded for a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rounding {
    /// Inputs of a block: 16 or 32.
    block: usize,
    /// From an input of a quad to its next.
    stride: usize,
    /// What the weight's blocks begin with.
    begin: Begin,
}

/// What is known of a block's sum before it is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// −zero · Σ n, an integer that the sum of the products with stored numbers begins with.
    Zero(i32),
    /// scale · Σ n, a float that the weight's minimum is multiplied by.
    Minimum,
}

impl Rounding {
    /// For weights that are stored so; `None` where their blocks are of other extents than those of x.
    pub(crate) fn of(quantisation: Quantisation) -> Option<Self> {
        let block = quantisation.block().map_or(GROUP, |block| block as usize);
        let begin = if quantisation.minimum() { Begin::Minimum } else { Begin::Zero(zero(quantisation)) };
        [SHORTEST, GROUP].contains(&block).then_some(Self { block, stride: stride(quantisation.bits), begin })
    }

    /// Quads of a block.
    pub(crate) fn quads(self) -> usize {
        self.block / QUAD
    }

    /// Whether the weight's blocks have minima.
    pub(crate) fn has_minimum(self) -> bool {
        matches!(self.begin, Begin::Minimum)
    }

    /// Packs rows of x, [`X_PITCH`] words apart, each by its in-vector where it has one (slots count from 1): quads, scales, and what
    /// sums begin with. Zeros follow the inputs up to a multiple of 32.
    pub(crate) fn pack<S: Simd>(
        self,
        simd: S,
        x: Vectors<'_>,
        in_pool: Vectors<'_>,
        rows: impl Iterator<Item = (u32, u32)>,
        depth: Range<usize>,
        out: &mut [u32],
    ) {
        let mut floats = [0.0; BYTE_SLICE];
        let floats = &mut floats[..depth.len().next_multiple_of(GROUP)];
        vectorised(
            simd,
            #[inline(always)]
            || {
                for ((row, in_slot), out) in rows.zip(out.chunks_mut(X_PITCH)) {
                    let lying =
                        x.f32s(row as usize, depth.clone()).filter(|row| in_slot == 0 && row.len() == floats.len());
                    if let Some(numbers) = lying {
                        self.round(numbers, out);
                        continue;
                    }
                    // Zeros stay behind them.
                    x.scaled((row, in_slot), in_pool, depth.start, &mut floats[..depth.len()]);
                    self.round(floats, out);
                }
            },
        );
    }

    /// Rounds whole groups of numbers.
    #[inline(always)]
    fn round(self, numbers: &[f32], out: &mut [u32]) {
        match (self.block, self.stride) {
            (SHORTEST, 1) => self.round_blocks::<SHORTEST, 1>(numbers, out),
            (SHORTEST, 2) => self.round_blocks::<SHORTEST, 2>(numbers, out),
            (SHORTEST, _) => self.round_blocks::<SHORTEST, 4>(numbers, out),
            (_, 1) => self.round_blocks::<GROUP, 1>(numbers, out),
            (_, 2) => self.round_blocks::<GROUP, 2>(numbers, out),
            (_, _) => self.round_blocks::<GROUP, 4>(numbers, out),
        }
    }

    /// Loops and not the library's functions on arrays: those are compiled without the instruction set.
    #[inline(always)]
    fn round_blocks<const BLOCK: usize, const STRIDE: usize>(self, numbers: &[f32], out: &mut [u32]) {
        let (quads, rest) = out.split_at_mut(SCALES);
        let (scales, beginnings) = rest.split_at_mut(BEGINNINGS - SCALES);
        let blocks = numbers.as_chunks::<BLOCK>().0.iter().zip(quads.chunks_exact_mut(BLOCK / QUAD));
        for ((numbers, quads), (scale, beginning)) in blocks.zip(scales.iter_mut().zip(beginnings)) {
            // Bits of numbers without their signs rise as the numbers do, and those that aren't finite are the largest.
            let mut largest = LEAST.to_bits();
            for number in numbers {
                largest = largest.max(number.to_bits() & !SIGN);
            }
            let is_finite = largest < f32::INFINITY.to_bits();
            let largest = f32::from_bits(largest);
            let (inverse, own) = (MOST / largest, if is_finite { largest * (1.0 / MOST) } else { f32::NAN });
            let mut integers = [0; BLOCK];
            for at in 0..BLOCK {
                integers[at] = (numbers[at] * inverse + EVEN).to_bits().wrapping_sub(EVEN.to_bits());
            }
            let mut half = BLOCK / 2;
            let mut partial = integers;
            while half > 0 {
                for at in 0..half {
                    partial[at] = partial[at].wrapping_add(partial[at + half]);
                }
                half /= 2;
            }
            let sum = partial[0];
            for (at, quad) in quads.iter_mut().enumerate() {
                let first = at / STRIDE * QUAD * STRIDE + at % STRIDE;
                let byte = |place: usize| integers[first + place * STRIDE] & 0xff;
                *quad = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
            }
            *scale = own.to_bits();
            *beginning = match self.begin {
                Begin::Zero(zero) => 0u32.wrapping_sub((zero as u32).wrapping_mul(sum)),
                Begin::Minimum => (own * sum as i32 as f32).to_bits(),
            };
        }
    }
}

/// Of a float.
const SIGN: u32 = 1 << 31;

/// A float whose neighbours are whole numbers away: what is added to it is rounded to one, and to an even one where it is between two.
const EVEN: f32 = 12_582_912.0;
