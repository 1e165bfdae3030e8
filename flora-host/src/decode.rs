//! Numbers of a weight's strips as floats: those of [`PackedWeight::value`](flora_plan::weight::PackedWeight::value), but for
//! roundings where a block has a minimum.

use std::ops::Range;

use flora_plan::layer::{Levels, Quantisation, Scales};
use pulp::Simd;

use crate::block_scales::{BlockScales, PIECE, base};
use crate::layout::STRIP;
use crate::lookup::looked_up;
use crate::vectorise::vectorised;

/// A strip of a quantised weight.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    /// `[rows, STRIP]`
    pub(crate) words: &'a [u32],
    /// `[rows, STRIP]`
    pub(crate) scales: &'a [u32],
    pub(crate) quantisation: Quantisation,
}

/// Inputs whose words lie together.
const GROUP: usize = 32;

impl Words<'_> {
    /// Inputs `depth`, from a multiple of 32 on, to `out` `[depth, STRIP]`. Nothing that `scales` had matters.
    pub(crate) fn decode<'o, S: Simd>(
        self,
        simd: S,
        depth: Range<usize>,
        out: &'o mut [f32],
        scales: &mut BlockScales,
    ) -> &'o [f32] {
        // The scales of outputs serve for any number of inputs.
        let piece = if self.quantisation.block().is_some() { PIECE } else { depth.len().max(1) };
        for first in depth.clone().step_by(piece) {
            let inputs = first..depth.end.min(first + piece);
            let out = &mut out[(first - depth.start) * STRIP..(inputs.end - depth.start) * STRIP];
            vectorised(
                simd,
                #[inline(always)]
                || scales.find(self.quantisation, self.scales, inputs),
            );
            // With bits that the compiler knows, shifts are an instruction each, where others are three.
            match self.quantisation.bits {
                2 => self.unpack::<S, 2>(simd, first, scales, out),
                3 => self.unpack::<S, 3>(simd, first, scales, out),
                4 => self.unpack::<S, 4>(simd, first, scales, out),
                5 => self.unpack::<S, 5>(simd, first, scales, out),
                6 => self.unpack::<S, 6>(simd, first, scales, out),
                _ => self.unpack::<S, 8>(simd, first, scales, out),
            }
        }
        out
    }

    /// Rows of numbers from `first` on, whose scales have been found: scale · level(stored) + minimum. Each way is a function of its
    /// own: together they would be too large for the compiler to inline what each needs.
    fn unpack<S: Simd, const BITS: u32>(self, simd: S, first: usize, scales: &BlockScales, out: &mut [f32]) {
        match (self.quantisation.levels, self.quantisation.scales) {
            // Its scales have too many bits for an exact offset.
            (Levels::Linear { zero }, Scales::Outputs) => vectorised(
                simd,
                #[inline(always)]
                || {
                    let zero = simd.splat_f32s(base(BITS) + zero as f32);
                    self.groups::<S, BITS>(
                        simd,
                        first,
                        scales,
                        out,
                        #[inline(always)]
                        |stored, scale, _| simd.mul_f32s(scale, simd.sub_f32s(stored.based(simd), zero)),
                    );
                },
            ),
            (Levels::Linear { .. }, _) => vectorised(
                simd,
                #[inline(always)]
                || {
                    self.groups::<S, BITS>(
                        simd,
                        first,
                        scales,
                        out,
                        #[inline(always)]
                        |stored, scale, offset| simd.mul_add_e_f32s(scale, stored.based(simd), offset),
                    );
                },
            ),
            (Levels::Codebook(levels), _) => vectorised(
                simd,
                #[inline(always)]
                || {
                    let levels = levels.map(f32::from);
                    self.groups::<S, BITS>(
                        simd,
                        first,
                        scales,
                        out,
                        #[inline(always)]
                        |stored, scale, _| simd.mul_f32s(scale, looked_up(simd, levels, stored.lowest(simd))),
                    );
                },
            ),
        }
    }

    /// Group after group of inputs.
    #[inline(always)]
    fn groups<S: Simd, const BITS: u32>(
        self,
        simd: S,
        first: usize,
        scales: &BlockScales,
        out: &mut [f32],
        number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
    ) {
        let block = self.quantisation.block().map_or(usize::MAX, |block| block as usize);
        let words = &self.words[first / GROUP * BITS as usize * STRIP..];
        let groups = out.chunks_mut(GROUP * STRIP).zip(words.chunks(BITS as usize * STRIP));
        for (at, (out, words)) in groups.enumerate() {
            let halves = [at * GROUP / block, (at * GROUP + GROUP / 2) / block].map(|block| scales.block(block));
            if out.len() == GROUP * STRIP {
                group(simd, words, halves, out, number);
            } else {
                // Of a weight without blocks, the last.
                let (mut whole, mut padded) = ([0.0; GROUP * STRIP], [0; 8 * STRIP]);
                padded[..words.len()].copy_from_slice(words);
                group(simd, &padded[..BITS as usize * STRIP], halves, &mut whole, number);
                out.copy_from_slice(&whole[..out.len()]);
            }
        }
    }
}

/// A group's words `[BITS, STRIP]` to its numbers `[GROUP, STRIP]`. Each half has scales and offsets.
#[inline(always)]
fn group<S: Simd, const BITS: u32>(
    simd: S,
    words: &[u32],
    halves: [(&[f32; STRIP], &[f32; STRIP]); 2],
    out: &mut [f32],
    number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s,
) {
    let vectors = STRIP / S::F32_LANES;
    let (words, out) = (S::as_simd_u32s(words).0, S::as_mut_simd_f32s(out).0);
    let halves = halves.map(|(scales, offsets)| (S::as_simd_f32s(scales).0, S::as_simd_f32s(offsets).0));
    assert!(words.len() == BITS as usize * vectors && out.len() == GROUP * vectors);
    assert!(halves.iter().all(|(scales, offsets)| scales.len() == vectors && offsets.len() == vectors));
    // A half after the other: a few rows of the numbers are written at a time.
    for half in 0..2 {
        for at in 0..vectors {
            let word = |row: usize| words[row * vectors + at];
            // Written out, so that the compiler knows every shift.
            macro_rules! runs {
                ($($run:literal)*) => {{
                    [$({
                        let run = Group::<BITS>::RUNS[$run];
                        joined::<S, BITS>(simd, run, word(run.lower.0), word(run.upper.0))
                    }),*]
                }};
            }
            let runs: [S::u32s; MOST_RUNS] = runs!(0 1 2 3 4 5 6 7);
            macro_rules! each {
                ($half:literal: $($input:literal)*) => {{
                    let (scale, offset) = (halves[$half].0[at], halves[$half].1[at]);
                    $(
                        let (run, first) = Group::<BITS>::PLACES[$input];
                        out[$input * vectors + at] = number(Stored { word: runs[run], first }, scale, offset);
                    )*
                }};
            }
            if half == 0 {
                each!(0: 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            } else {
                each!(1: 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
            }
        }
    }
}

/// The most runs of a group.
const MOST_RUNS: usize = 8;

/// Where words and bits are that are decoded as one word: a word of the lower plane, or with an upper plane every other input of one
/// and their upper bits.
#[derive(Clone, Copy)]
struct Run {
    /// A row of the group's words, and the first input's first bit in it.
    lower: (usize, u32),
    /// Likewise; unused without an upper plane.
    upper: (usize, u32),
}

/// How numbers of so many bits lie in a group's words.
struct Group<const BITS: u32>;

impl<const BITS: u32> Group<BITS> {
    /// Of which only the bits matter.
    const QUANTISATION: Quantisation =
        Quantisation { bits: BITS, levels: Levels::Linear { zero: 0 }, scales: Scales::Outputs };

    /// Bits of the lower plane and of the upper one.
    const PLANES: (u32, u32) = Self::QUANTISATION.planes();

    /// Inputs from one of a run to its next.
    const STEP: u32 = if Self::PLANES.1 > 0 { 2 } else { 1 };

    /// The runs; what is beyond the last is the last again.
    const RUNS: [Run; MOST_RUNS] = {
        let quantisation = Self::QUANTISATION;
        let mut runs = [Run { lower: (0, 0), upper: (0, 0) }; MOST_RUNS];
        let (mut at, most) = (0, (GROUP as u32 / quantisation.per_word() * Self::STEP) as usize - 1);
        while at < MOST_RUNS {
            let run = if at < most { at as u32 } else { most as u32 };
            let input = run / Self::STEP * quantisation.per_word() + run % Self::STEP;
            runs[at].lower = (quantisation.row(input) as usize, run % Self::STEP * Self::PLANES.0);
            if Self::PLANES.1 > 0 {
                runs[at].upper = (quantisation.upper_row(input) as usize, quantisation.upper_shift(input));
            }
            at += 1;
        }
        runs
    };

    /// Of every input its run, and its first bit there.
    const PLACES: [(usize, u32); GROUP] = {
        let mut places = [(0, 0); GROUP];
        let mut at = 0;
        while at < GROUP {
            let (input, per_word) = (at as u32, Self::QUANTISATION.per_word());
            let run = input / per_word * Self::STEP + input % Self::STEP;
            places[at] = (run as usize, input % per_word / Self::STEP * Self::STEP * Self::PLANES.0);
            at += 1;
        }
        places
    };

    /// The bits of a run that are the lower plane's, where there is an upper one.
    const LOWER: u32 = {
        let (mut mask, mut at) = (0, 0);
        while at < 32 {
            mask |= ((1 << Self::PLANES.0) - 1) << at;
            at += Self::QUANTISATION.pair();
        }
        mask
    };
}

/// The word of a run: of its lower and its upper words. Where a run has no bits, anything is left.
#[inline(always)]
fn joined<S: Simd, const BITS: u32>(simd: S, run: Run, lower: S::u32s, upper: S::u32s) -> S::u32s {
    let (lower_bits, upper_bits) = Group::<BITS>::PLANES;
    if upper_bits == 0 {
        return lower;
    }
    let lower = simd.and_u32s(moved(simd, lower, run.lower.1, 0), simd.splat_u32s(Group::<BITS>::LOWER));
    let upper = simd.and_u32s(moved(simd, upper, run.upper.1, lower_bits), simd.splat_u32s(!Group::<BITS>::LOWER));
    simd.or_u32s(lower, upper)
}

/// An input of a vector's columns.
#[derive(Clone, Copy)]
struct Stored<S: Simd, const BITS: u32> {
    /// Of its run.
    word: S::u32s,
    /// Its first bit.
    first: u32,
}

impl<S: Simd, const BITS: u32> Stored<S, BITS> {
    /// The number as a float, and [`base`] more: in the mantissa of the base, its bits are the highest.
    #[inline(always)]
    fn based(self, simd: S) -> S::f32s {
        let to = 23 - BITS;
        let mantissa = simd.and_u32s(moved(simd, self.word, self.first, to), simd.splat_u32s(((1 << BITS) - 1) << to));
        simd.transmute_f32s_u32s(simd.or_u32s(mantissa, simd.splat_u32s(base(BITS).to_bits())))
    }

    /// The number in the lowest bits, and anything above.
    #[inline(always)]
    fn lowest(self, simd: S) -> S::u32s {
        moved(simd, self.word, self.first, 0)
    }
}

/// Words whose bit `from` becomes bit `to`.
#[inline(always)]
fn moved<S: Simd>(simd: S, words: S::u32s, from: u32, to: u32) -> S::u32s {
    match from <= to {
        true => simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(to - from)),
        false => simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(from - to)),
    }
}
