//! The scales of some inputs of a strip as floats, block by block, whatever form the weight keeps them in.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use flora_plan::layer::{Nested, Quantisation, ScaleKind, Scales};
use half::f16;

use crate::layout::STRIP;
use crate::widen::widen_f16;

/// The most inputs whose blocks' scales are found at a time: few enough for their scales to lie in the first-level cache beside what
/// is decoded.
pub(crate) const PIECE: usize = 128;

/// The shortest block.
const SHORTEST: usize = 16;

/// What inputs are multiplied by, and what is added to their products with numbers that are too large by the same.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct BlockScales {
    /// Of each block.
    scales: [[f32; STRIP]; PIECE / SHORTEST],
    offsets: [[f32; STRIP]; PIECE / SHORTEST],
}

impl BlockScales {
    /// Floats that hold them.
    pub(crate) const FLOATS: usize = size_of::<Self>() / size_of::<f32>();

    /// Scales and offsets of block `at`.
    #[inline(always)]
    pub(crate) fn block(&self, at: usize) -> (&[f32; STRIP], &[f32; STRIP]) {
        (&self.scales[at], &self.offsets[at])
    }

    /// Those of at most [`PIECE`] inputs, from a multiple of 32 on; `rows` are the weight's, `[scale_rows, STRIP]`. What is multiplied
    /// is `below` too large.
    #[inline(always)]
    pub(crate) fn find(&mut self, quantisation: Quantisation, rows: &[u32], inputs: Range<usize>, below: f32) {
        let rows = Rows(rows);
        // Exact, as scales and minima have few bits, but for minima of quite another magnitude.
        let offset_of = |scale: f32, minimum: f32| minimum - scale * below;
        let (first, end) = (inputs.start as u32, inputs.end as u32);
        let Self { scales, offsets } = self;
        let blocks = |block: u32| scales.iter_mut().zip(offsets).zip(first / block..end.div_ceil(block));
        match quantisation.scales {
            Scales::Outputs => scales[0] = rows.row(0).map(f32::from_bits),
            Scales::Blocks { inputs, minimum: true, .. } => {
                for ((scales, offsets), block) in blocks(inputs) {
                    let words = rows.row(block);
                    for at in 0..STRIP {
                        scales[at] = half(words[at]);
                        offsets[at] = offset_of(scales[at], half(words[at] >> 16));
                    }
                }
            }
            Scales::Blocks { inputs, kind, minimum: false } => {
                for ((scales, offsets), block) in blocks(inputs) {
                    let (words, shift) = (rows.row(block / 2), 16 * (block % 2));
                    *scales = match kind {
                        ScaleKind::F16 => words.map(|word| half(word >> shift)),
                        ScaleKind::PowerOfTwo => words.map(|word| f32::from_bits(word >> shift << 16)),
                    };
                    *offsets = scales.map(|scale| offset_of(scale, 0.0));
                }
            }
            Scales::Nested(nested) => {
                let mut of_all = SuperBlock { scales: [0.0; STRIP], minima: [0.0; STRIP] };
                for (at, ((scales, offsets), block)) in blocks(nested.inputs).enumerate() {
                    let input = block * nested.inputs;
                    if at == 0 || block.is_multiple_of(nested.blocks) {
                        of_all.find(rows.row(nested.super_row(input)));
                    }
                    let fields = rows.row(nested.field_row(input));
                    of_all.block(nested, (fields, nested.field_shift(input)), scales, offsets);
                    for at in 0..STRIP {
                        offsets[at] = offset_of(scales[at], offsets[at]);
                    }
                }
            }
        }
    }
}

/// Rows of scales.
#[derive(Clone, Copy)]
struct Rows<'a>(&'a [u32]);

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, at: u32) -> &'a [u32; STRIP] {
        self.0[at as usize * STRIP..].first_chunk().expect("a weight has all rows of its scales")
    }
}

/// What the integers of a super-block's blocks are multiplied by.
struct SuperBlock {
    scales: [f32; STRIP],
    minima: [f32; STRIP],
}

impl SuperBlock {
    #[inline(always)]
    fn find(&mut self, words: &[u32; STRIP]) {
        self.scales = words.map(half);
        self.minima = words.map(|word| half(word >> 16));
    }

    /// The scales and minima of the block whose fields begin at that bit of these words.
    #[inline(always)]
    fn block(
        &self,
        nested: Nested,
        (fields, shift): (&[u32; STRIP], u32),
        scales: &mut [f32; STRIP],
        minima: &mut [f32; STRIP],
    ) {
        let (mask, zero) = ((1u32 << nested.bits) - 1, nested.zero as f32);
        // Signed integers become floats by one instruction.
        let number = |bits: u32| (bits & mask) as i32 as f32;
        for at in 0..STRIP {
            scales[at] = self.scales[at] * (number(fields[at] >> shift) - zero);
        }
        if nested.minimum {
            for at in 0..STRIP {
                minima[at] = self.minima[at] * number(fields[at] >> (shift + nested.bits));
            }
        } else {
            *minima = [0.0; STRIP];
        }
    }
}

/// The f16 in the low half of a word. The library's conversion asks the processor what it can, for every number.
#[inline(always)]
fn half(word: u32) -> f32 {
    widen_f16(f16::from_bits(word as u16))
}

/// 2 to the bits of a stored number.
#[inline(always)]
pub(crate) fn base(bits: u32) -> f32 {
    (1u32 << bits) as f32
}
