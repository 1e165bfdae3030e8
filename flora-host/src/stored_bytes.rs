//! Stored numbers of a strip as bytes, so that processors multiply four of them at a time by bytes of x. Decoding them to floats, scale
//! by scale, is what a quantised weight's products take longest with: here a mask does for four inputs of a column what a float takes
//! four instructions for.
//!
//! A *quad* is a word of four inputs' bytes. Which four is chosen so that a shift and a mask make it: inputs that are a stride apart
//! (see [`stride`]). Rows of x are put in the same order by [`crate::rounded`].

use std::ops::Range;

use flora_plan::layer::{Levels, Quantisation};
use pulp::Simd;

use crate::block_scales::{BlockScales, PIECE};
use crate::decode::{GROUP, Group, Words, joined, moved};
use crate::layout::STRIP;
use crate::lookup::looked_up_bytes;
use crate::vectorise::vectorised;

/// Inputs of a quad.
pub(crate) const QUAD: usize = 4;

/// Quads of a group.
pub(crate) const GROUP_QUADS: usize = GROUP / QUAD;

/// What is added to the levels of a codebook, which are signed, for them to be bytes.
const ABOVE_LEVELS: i16 = 128;

/// From an input of a quad to its next. The first inputs of the quads of so many times four inputs are the first of those.
pub(crate) const fn stride(bits: u32) -> usize {
    match bits {
        8 => 1,
        4..=6 => 2,
        _ => 4,
    }
}

/// The byte that stands for 0.
pub(crate) fn zero(quantisation: Quantisation) -> i32 {
    match quantisation.levels {
        Levels::Linear { zero } => zero as i32,
        Levels::Codebook(_) => i32::from(ABOVE_LEVELS),
    }
}

/// Inputs of a strip as bytes.
#[derive(Clone, Copy)]
pub(crate) struct ByteColumns<'a> {
    /// `[inputs / 4, STRIP]`
    pub(crate) quads: &'a [u32],
    /// Of [`PIECE`] inputs each.
    pub(crate) scales: &'a [BlockScales],
    /// Whether each block has its own scales; otherwise all have the first's.
    pub(crate) are_blocks: bool,
}

impl<'a> Words<'a> {
    /// Inputs `depth`, from a multiple of 32 on, with zeros or anything after them up to a multiple of 32. `quads` has room for them, and
    /// `scales` for every [`PIECE`] of them.
    pub(crate) fn bytes<'o, S: Simd>(
        self,
        simd: S,
        depth: Range<usize>,
        quads: &'o mut [u32],
        scales: &'o mut [BlockScales],
    ) -> ByteColumns<'o>
    where
        'a: 'o,
    {
        let Self { quantisation, scales: rows, .. } = self;
        let pieces = depth.clone().step_by(PIECE).map(|first| first..depth.end.min(first + PIECE));
        vectorised(
            simd,
            #[inline(always)]
            || pieces.zip(&mut *scales).for_each(|(piece, scales)| scales.find(quantisation, rows, piece, 0.0)),
        );
        let bits = quantisation.bits as usize;
        let words = &self.words[depth.start / GROUP * bits * STRIP..];
        let quads = &mut quads[..depth.len().div_ceil(GROUP) * GROUP_QUADS * STRIP];
        let are_blocks = quantisation.block().is_some();
        if bits == 8 && words.len() >= quads.len() {
            // They lie so.
            return ByteColumns { quads: &words[..quads.len()], scales, are_blocks };
        }
        match (quantisation.levels, bits) {
            (Levels::Codebook(levels), _) => {
                let table = levels.map(|level| (i16::from(level) + ABOVE_LEVELS) as u8);
                unpack::<S, 4>(
                    simd,
                    words,
                    quads,
                    #[inline(always)]
                    |bytes| looked_up_bytes(simd, table, bytes),
                );
            }
            (Levels::Linear { .. }, 2) => unpack::<S, 2>(simd, words, quads, as_they_are),
            (Levels::Linear { .. }, 3) => unpack::<S, 3>(simd, words, quads, as_they_are),
            (Levels::Linear { .. }, 4) => unpack::<S, 4>(simd, words, quads, as_they_are),
            (Levels::Linear { .. }, 5) => unpack::<S, 5>(simd, words, quads, as_they_are),
            (Levels::Linear { .. }, 6) => unpack::<S, 6>(simd, words, quads, as_they_are),
            (Levels::Linear { .. }, _) => unpack::<S, 8>(simd, words, quads, as_they_are),
        }
        ByteColumns { quads, scales, are_blocks }
    }
}

#[inline(always)]
fn as_they_are<T>(bytes: T) -> T {
    bytes
}

/// Groups of words to their quads. Words may end before the last group does.
fn unpack<S: Simd, const BITS: u32>(simd: S, words: &[u32], quads: &mut [u32], byte: impl Fn(S::u32s) -> S::u32s) {
    vectorised(
        simd,
        #[inline(always)]
        || {
            let len = BITS as usize * STRIP;
            for (at, quads) in quads.chunks_exact_mut(GROUP_QUADS * STRIP).enumerate() {
                let words = &words[at * len..];
                if words.len() >= len {
                    unpack_group::<S, BITS>(simd, &words[..len], quads, &byte);
                } else {
                    let mut padded = [0; 8 * STRIP];
                    padded[..words.len()].copy_from_slice(words);
                    unpack_group::<S, BITS>(simd, &padded[..len], quads, &byte);
                }
            }
        },
    );
}

/// A group's words `[BITS, STRIP]` to its quads `[GROUP_QUADS, STRIP]`.
#[inline(always)]
fn unpack_group<S: Simd, const BITS: u32>(
    simd: S,
    words: &[u32],
    quads: &mut [u32],
    byte: &impl Fn(S::u32s) -> S::u32s,
) {
    let vectors = STRIP / S::U32_LANES;
    let (words, quads) = (S::as_simd_u32s(words).0, S::as_mut_simd_u32s(quads).0);
    assert!(words.len() == BITS as usize * vectors && quads.len() == GROUP_QUADS * vectors);
    let mask = simd.splat_u32s(((1 << BITS) - 1) * 0x0101_0101);
    for at in 0..vectors {
        // Written out, so that the compiler knows every shift.
        macro_rules! each {
            ($($quad:literal)*) => {{
                $({
                    let (run, first, place) = Quads::<BITS>::PLACES[$quad];
                    let word = |row: usize| words[row * vectors + at];
                    let run = Group::<BITS>::RUNS[run];
                    let run = joined::<S, BITS>(simd, run, word(run.lower.0), word(run.upper.0));
                    quads[place * vectors + at] = byte(simd.and_u32s(moved(simd, run, first, 0), mask));
                })*
            }};
        }
        each!(0 1 2 3 4 5 6 7);
    }
}

/// Where the quads of a group are.
struct Quads<const BITS: u32>;

impl<const BITS: u32> Quads<BITS> {
    /// Of every quad its run, the bit of its first input there, and its place among the quads.
    const PLACES: [(usize, u32, usize); GROUP_QUADS] = {
        let mut places = [(0, 0, 0); GROUP_QUADS];
        let (stride, mut at, mut input) = (stride(BITS), 0, 0);
        while input < GROUP {
            let (run, first) = Group::<BITS>::PLACES[input];
            // The first of its quad.
            if first < 8 {
                places[at] = (run, first, input / (QUAD * stride) * stride + input % stride);
                at += 1;
            }
            input += 1;
        }
        assert!(at == GROUP_QUADS);
        places
    };
}
