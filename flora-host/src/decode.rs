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
pub(crate) const GROUP: usize = 32;

/// Bits of what has one scale for each output, and of what has a codebook. Ways that no format takes aren't compiled.
const OUTPUT_BITS: u32 = 8;
const CODEBOOK_BITS: u32 = 4;

/// What decoding makes of stored numbers, less what they stand for.
#[inline(always)]
fn below(quantisation: Quantisation) -> f32 {
    match quantisation.levels {
        Levels::Linear { zero } => base(quantisation.bits) + zero as f32,
        Levels::Codebook(_) => 0.0,
    }
}

/// What becomes of numbers as they are decoded.
pub(crate) trait Decoded<S: Simd> {
    /// Takes those of some groups of inputs. Inlined, so that what `number` does is done in its loop.
    fn take<const BITS: u32>(
        self,
        simd: S,
        groups: Groups<'_>,
        number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
    );
}

/// Groups of inputs that follow one another, and their scales.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    /// From the first group's on.
    words: &'a [u32],
    scales: &'a BlockScales,
    /// Inputs of a block.
    block: usize,
}

impl<'a> Groups<'a> {
    /// The words of group `at`, and the scales and offsets of each half.
    #[inline(always)]
    pub(crate) fn group<const BITS: u32>(&self, at: usize) -> (&'a [u32], Halves<'a>) {
        let len = BITS as usize * STRIP;
        let words = &self.words[at * len..];
        let halves =
            [at * GROUP / self.block, (at * GROUP + GROUP / 2) / self.block].map(|block| self.scales.block(block));
        (&words[..len.min(words.len())], halves)
    }
}

/// Scales and offsets of a group's inputs, half by half.
pub(crate) type Halves<'a> = [(&'a [f32; STRIP], &'a [f32; STRIP]); 2];

impl Words<'_> {
    /// Inputs `depth`, from a multiple of 32 on, to `out` `[depth, STRIP]`. Nothing that `scales` had matters.
    pub(crate) fn decode<'o, S: Simd>(
        self,
        simd: S,
        depth: Range<usize>,
        out: &'o mut [f32],
        scales: &mut BlockScales,
    ) -> &'o [f32] {
        for inputs in self.pieces(depth.clone()) {
            let out = &mut out[(inputs.start - depth.start) * STRIP..(inputs.end - depth.start) * STRIP];
            self.each(simd, inputs, scales, Written(out));
        }
        out
    }

    /// Inputs whose scales are found at a time.
    pub(crate) fn pieces(self, depth: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        // The scales of outputs serve for any number of inputs.
        let piece = if self.quantisation.block().is_some() { PIECE } else { depth.len().max(1) };
        depth.clone().step_by(piece).map(move |first| first..depth.end.min(first + piece))
    }

    /// Decodes one of the pieces.
    pub(crate) fn each<S: Simd>(
        self,
        simd: S,
        inputs: Range<usize>,
        scales: &mut BlockScales,
        decoded: impl Decoded<S>,
    ) {
        let first = inputs.start;
        vectorised(
            simd,
            #[inline(always)]
            || scales.find(self.quantisation, self.scales, inputs, below(self.quantisation)),
        );
        let scales = &*scales;
        // With bits that the compiler knows, shifts are an instruction each, where others are three.
        match self.quantisation.bits {
            2 => self.unpack::<S, 2>(simd, first, scales, decoded),
            3 => self.unpack::<S, 3>(simd, first, scales, decoded),
            4 => self.unpack::<S, 4>(simd, first, scales, decoded),
            5 => self.unpack::<S, 5>(simd, first, scales, decoded),
            6 => self.unpack::<S, 6>(simd, first, scales, decoded),
            _ => self.unpack::<S, 8>(simd, first, scales, decoded),
        }
    }

    /// Rows of numbers from `first` on, whose scales have been found: scale · level(stored) + minimum. Each way is a function of its
    /// own: together they would be too large for the compiler to inline what each needs.
    fn unpack<S: Simd, const BITS: u32>(self, simd: S, first: usize, scales: &BlockScales, decoded: impl Decoded<S>) {
        let words = &self.words[first / GROUP * BITS as usize * STRIP..];
        let block = self.quantisation.block().map_or(usize::MAX, |block| block as usize);
        let groups = Groups { words, scales, block };
        match (self.quantisation.levels, self.quantisation.scales) {
            // Its scales have too many bits for an exact offset.
            (Levels::Linear { zero }, Scales::Outputs) if BITS == OUTPUT_BITS => vectorised(
                simd,
                #[inline(always)]
                || {
                    let zero = simd.splat_f32s(base(BITS) + zero as f32);
                    decoded.take::<BITS>(
                        simd,
                        groups,
                        #[inline(always)]
                        |stored, scale, _| simd.mul_f32s(scale, simd.sub_f32s(stored.based(simd), zero)),
                    );
                },
            ),
            (Levels::Codebook(levels), _) if BITS == CODEBOOK_BITS => vectorised(
                simd,
                #[inline(always)]
                || {
                    let levels = levels.map(f32::from);
                    decoded.take::<BITS>(
                        simd,
                        groups,
                        #[inline(always)]
                        |stored, scale, _| simd.mul_f32s(scale, looked_up(simd, levels, stored.lowest(simd))),
                    );
                },
            ),
            _ => vectorised(
                simd,
                #[inline(always)]
                || {
                    decoded.take::<BITS>(
                        simd,
                        groups,
                        #[inline(always)]
                        |stored, scale, offset| simd.mul_add_e_f32s(scale, stored.based(simd), offset),
                    );
                },
            ),
        }
    }
}

/// Numbers that are written, `[inputs, STRIP]`.
struct Written<'o>(&'o mut [f32]);

impl<S: Simd> Decoded<S> for Written<'_> {
    #[inline(always)]
    fn take<const BITS: u32>(
        self,
        simd: S,
        groups: Groups<'_>,
        number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
    ) {
        for (at, out) in self.0.chunks_mut(GROUP * STRIP).enumerate() {
            let (words, halves) = groups.group::<BITS>(at);
            if out.len() == GROUP * STRIP {
                write_group(simd, words, halves, out, number);
            } else {
                // Of a weight without blocks, the last.
                let mut whole = [0.0; GROUP * STRIP];
                write_part(simd, words, halves, &mut whole, number);
                out.copy_from_slice(&whole[..out.len()]);
            }
        }
    }
}

/// A group whose words may end before it does.
#[inline(always)]
pub(crate) fn write_part<S: Simd, const BITS: u32>(
    simd: S,
    words: &[u32],
    halves: Halves<'_>,
    out: &mut [f32; GROUP * STRIP],
    number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
) {
    let mut padded = [0; 8 * STRIP];
    padded[..words.len()].copy_from_slice(words);
    write_group(simd, &padded[..BITS as usize * STRIP], halves, out, number);
}

/// A group's words `[BITS, STRIP]` to its numbers `[GROUP, STRIP]`.
#[inline(always)]
fn write_group<S: Simd, const BITS: u32>(
    simd: S,
    words: &[u32],
    halves: Halves<'_>,
    out: &mut [f32],
    number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
) {
    let vectors = STRIP / S::F32_LANES;
    let out = S::as_mut_simd_f32s(out).0;
    assert!(out.len() == GROUP * vectors);
    // A half after the other: a few rows of the numbers are written at a time.
    for (half, scales) in halves.into_iter().enumerate() {
        for at in 0..vectors {
            group_half::<S, BITS, 1>(
                simd,
                words,
                scales,
                (half, at),
                number,
                #[inline(always)]
                |input, [value]| out[input * vectors + at] = value,
            );
        }
    }
}

/// The numbers of half a group in `SIDE` vectors of its columns, from vector `at` on: one input after the other.
#[inline(always)]
pub(crate) fn group_half<S: Simd, const BITS: u32, const SIDE: usize>(
    simd: S,
    words: &[u32],
    (scales, offsets): (&[f32; STRIP], &[f32; STRIP]),
    (half, at): (usize, usize),
    number: impl Fn(Stored<S, BITS>, S::f32s, S::f32s) -> S::f32s + Copy,
    mut take: impl FnMut(usize, [S::f32s; SIDE]),
) {
    let vectors = STRIP / S::F32_LANES;
    let words = S::as_simd_u32s(words).0;
    let (scales, offsets) = (S::as_simd_f32s(scales).0, S::as_simd_f32s(offsets).0);
    assert!(words.len() == BITS as usize * vectors && at + SIDE <= vectors);
    assert!(scales.len() == vectors && offsets.len() == vectors);
    let (mut side_scales, mut side_offsets) = ([scales[at]; SIDE], [offsets[at]; SIDE]);
    for side in 1..SIDE {
        (side_scales[side], side_offsets[side]) = (scales[at + side], offsets[at + side]);
    }
    // Loops and not the library's functions on arrays: those are compiled without the instruction set, and what is called in them too.
    // Written out, so that the compiler knows every shift.
    let mut runs = [[simd.splat_u32s(0); SIDE]; MOST_RUNS];
    macro_rules! join {
        ($($run:literal)*) => {{
            $({
                let run = Group::<BITS>::RUNS[$run];
                for side in 0..SIDE {
                    let word = |row: usize| words[row * vectors + at + side];
                    runs[$run][side] = joined::<S, BITS>(simd, run, word(run.lower.0), word(run.upper.0));
                }
            })*
        }};
    }
    join!(0 1 2 3 4 5 6 7);
    macro_rules! each {
        ($($input:literal)*) => {{
            $({
                let (run, first) = Group::<BITS>::PLACES[$input];
                let mut values = [simd.splat_f32s(0.0); SIDE];
                for side in 0..SIDE {
                    values[side] = number(Stored { word: runs[run][side], first }, side_scales[side], side_offsets[side]);
                }
                take($input, values);
            })*
        }};
    }
    if half == 0 {
        each!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    } else {
        each!(16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
    }
}

/// The most runs of a group.
const MOST_RUNS: usize = 8;

/// Where words and bits are that are decoded as one word: a word of the lower plane, or with an upper plane every other input of one
/// and their upper bits.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    /// A row of the group's words, and the first input's first bit in it.
    pub(crate) lower: (usize, u32),
    /// Likewise; unused without an upper plane.
    pub(crate) upper: (usize, u32),
}

/// How numbers of so many bits lie in a group's words.
pub(crate) struct Group<const BITS: u32>;

impl<const BITS: u32> Group<BITS> {
    /// Of which only the bits matter.
    const QUANTISATION: Quantisation =
        Quantisation { bits: BITS, levels: Levels::Linear { zero: 0 }, scales: Scales::Outputs };

    /// Bits of the lower plane and of the upper one.
    const PLANES: (u32, u32) = Self::QUANTISATION.planes();

    /// Inputs from one of a run to its next.
    const STEP: u32 = if Self::PLANES.1 > 0 { 2 } else { 1 };

    /// The runs; what is beyond the last is the last again.
    pub(crate) const RUNS: [Run; MOST_RUNS] = {
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
    pub(crate) const PLACES: [(usize, u32); GROUP] = {
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
pub(crate) fn joined<S: Simd, const BITS: u32>(simd: S, run: Run, lower: S::u32s, upper: S::u32s) -> S::u32s {
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
pub(crate) struct Stored<S: Simd, const BITS: u32> {
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
pub(crate) fn moved<S: Simd>(simd: S, words: S::u32s, from: u32, to: u32) -> S::u32s {
    match from <= to {
        true => simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(to - from)),
        false => simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(from - to)),
    }
}
