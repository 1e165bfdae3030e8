//! Numbers of a weight's strips as floats: those of [`PackedWeight::value`](flora_plan::weight::PackedWeight::value), but for
//! roundings where a block has a minimum.

use std::ops::Range;

use flora_plan::layer::Quantisation;
use half::{bf16, f16};
use pulp::Simd;

use crate::layout::STRIP;
use crate::vectorise::vectorised;

/// Widens numbers into `out`.
pub(crate) fn widen<'o, S: Simd, T: Copy>(
    simd: S,
    values: &[T],
    number: impl Fn(T) -> f32,
    out: &'o mut [f32],
) -> &'o [f32] {
    vectorised(
        simd,
        #[inline(always)]
        || out.iter_mut().zip(values).for_each(|(out, value)| *out = number(*value)),
    );
    out
}

/// Exact for what a weight holds, finite numbers, and without the branches that keep the library's from being computed a vector at
/// a time: the bits of an f16 without its sign are those of an f32 that is too small by the difference of the two biases.
#[inline(always)]
pub(crate) fn widen_f16(value: f16) -> f32 {
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Exact for finite numbers, likewise.
#[inline(always)]
pub(crate) fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// A strip of a quantised weight.
#[derive(Clone, Copy)]
pub(crate) struct Words<'a> {
    /// `[d / per_word, STRIP]`, rounded up.
    pub(crate) words: &'a [u32],
    /// `[rows, STRIP]`
    pub(crate) scales: &'a [u32],
    pub(crate) quantisation: Quantisation,
}

impl Words<'_> {
    /// Inputs `depth`, from a multiple of 32 on, to `out` `[depth, STRIP]`.
    pub(crate) fn decode<S: Simd>(self, simd: S, depth: Range<usize>, out: &mut [f32]) -> &[f32] {
        vectorised(
            simd,
            #[inline(always)]
            || self.decode_blocks(simd, depth, out),
        );
        out
    }

    #[inline(always)]
    fn decode_blocks<S: Simd>(self, simd: S, depth: Range<usize>, out: &mut [f32]) {
        let per_word = self.quantisation.per_word() as usize;
        let block = self.quantisation.block.map_or(usize::MAX, |block| block as usize);
        let (mut scales, mut offsets) = ([0.0; STRIP], [0.0; STRIP]);
        let mut first = depth.start;
        while first < depth.end {
            let end = depth.end.min((first / block + 1).saturating_mul(block));
            self.load_scales(first, &mut scales, &mut offsets);
            for input in (first..end).step_by(per_word) {
                let stored = &self.words[input / per_word * STRIP..][..STRIP];
                let inputs = end.min(input + per_word) - input;
                let out = &mut out[(input - depth.start) * STRIP..][..inputs * STRIP];
                // With bits and inputs that the compiler knows, shifts are an instruction each, where others are three.
                let unpack = |quantisation, out| unpack(simd, quantisation, stored, &scales, &offsets, out);
                match (self.quantisation, inputs) {
                    (Quantisation { bits: 4, .. }, 8) => unpack(Quantisation { bits: 4, ..self.quantisation }, out),
                    (Quantisation { bits: 8, .. }, 4) => unpack(Quantisation { bits: 8, ..self.quantisation }, out),
                    (quantisation, _) => unpack(quantisation, out),
                }
            }
            first = end;
        }
    }

    /// The scales of the block that holds `input`, and what is added to their products with [`based`] numbers.
    #[inline(always)]
    fn load_scales(self, input: usize, scales: &mut [f32; STRIP], offsets: &mut [f32; STRIP]) {
        let packed = |row: usize| &self.scales[row * STRIP..(row + 1) * STRIP];
        // The library's conversion asks the processor what it can, for every number.
        let half = |word: u32| widen_f16(f16::from_bits(word as u16));
        // Exact, as scales and minima have eleven bits, but for minima of quite another magnitude.
        let offset_of =
            |scale: f32, minimum: f32| minimum - scale * (base(self.quantisation) + self.quantisation.zero as f32);
        match self.quantisation.block.map(|block| input / block as usize) {
            None => scales.iter_mut().zip(packed(0)).for_each(|(scale, bits)| *scale = f32::from_bits(*bits)),
            Some(block) if self.quantisation.minimum => {
                for ((scale, offset), word) in scales.iter_mut().zip(offsets).zip(packed(block)) {
                    *scale = half(*word);
                    *offset = offset_of(*scale, half(word >> 16));
                }
            }
            Some(block) => {
                let shift = 16 * (block % 2) as u32;
                for ((scale, offset), word) in scales.iter_mut().zip(offsets).zip(packed(block / 2)) {
                    *scale = half(word >> shift);
                    *offset = offset_of(*scale, 0.0);
                }
            }
        }
    }
}

/// 2 to the bits of a stored number.
#[inline(always)]
fn base(quantisation: Quantisation) -> f32 {
    (1u32 << quantisation.bits) as f32
}

/// The number of `bits` bits from `first` on, as a float, and [`base`] more: in the mantissa of the base, its bits are the highest.
#[inline(always)]
fn based<S: Simd>(simd: S, stored: S::u32s, bits: u32, first: u32) -> S::f32s {
    let highest = 23 - bits;
    let shifted = match first <= highest {
        true => simd.wrapping_dyn_shl_u32s(stored, simd.splat_u32s(highest - first)),
        false => simd.wrapping_dyn_shr_u32s(stored, simd.splat_u32s(first - highest)),
    };
    let mantissa = simd.and_u32s(shifted, simd.splat_u32s(((1 << bits) - 1) << highest));
    simd.transmute_f32s_u32s(simd.or_u32s(mantissa, simd.splat_u32s(((1 << bits) as f32).to_bits())))
}

/// One word of every column to rows of numbers, `out` `[inputs, columns]`: scale · (stored − zero) + minimum.
#[inline(always)]
fn unpack<S: Simd>(
    simd: S,
    quantisation: Quantisation,
    stored: &[u32],
    scales: &[f32],
    offsets: &[f32],
    out: &mut [f32],
) {
    let ((stored, _), (scales, _), (offsets, _)) =
        (S::as_simd_u32s(stored), S::as_simd_f32s(scales), S::as_simd_f32s(offsets));
    let (out, _) = S::as_mut_simd_f32s(out);
    let vectors = stored.len();
    assert!(scales.len() == vectors && offsets.len() == vectors);
    let zero = simd.splat_f32s(base(quantisation) + quantisation.zero as f32);
    for (input, out) in out.chunks_exact_mut(vectors).enumerate() {
        for (at, out) in out.iter_mut().enumerate() {
            let number = based(simd, stored[at], quantisation.bits, quantisation.bits * input as u32);
            *out = match quantisation.block {
                Some(_) => simd.mul_add_e_f32s(scales[at], number, offsets[at]),
                // Its scales have too many bits for an exact offset.
                None => simd.mul_f32s(scales[at], simd.sub_f32s(number, zero)),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            if half.is_finite() {
                assert_eq!(widen_f16(half).to_bits(), half.to_f32().to_bits(), "f16 {bits:#x}");
            }
            if brain.is_finite() {
                assert_eq!(widen_bf16(brain).to_bits(), brain.to_f32().to_bits(), "bf16 {bits:#x}");
            }
        }
    }
}
