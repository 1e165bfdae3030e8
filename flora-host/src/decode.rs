//! Numbers of a weight's strips as floats; the arithmetic of [`PackedWeight::value`](flora_plan::weight::PackedWeight::value).

use std::ops::Range;

use flora_plan::layer::Quantisation;
use half::{bf16, f16};
use pulp::Simd;

use crate::pack::vectorised;
use crate::weight::STRIP;

/// Widens numbers.
pub(crate) fn widen<S: Simd, T: Copy>(simd: S, values: &[T], number: impl Fn(T) -> f32, out: &mut [f32]) {
    vectorised(
        simd,
        #[inline(always)]
        || out.iter_mut().zip(values).for_each(|(out, value)| *out = number(*value)),
    );
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
    pub(crate) fn decode<S: Simd>(self, simd: S, depth: Range<usize>, out: &mut [f32]) {
        vectorised(
            simd,
            #[inline(always)]
            || self.decode_blocks(simd, depth, out),
        );
    }

    #[inline(always)]
    fn decode_blocks<S: Simd>(self, simd: S, depth: Range<usize>, out: &mut [f32]) {
        let per_word = self.quantisation.per_word() as usize;
        let block = self.quantisation.block.map_or(usize::MAX, |block| block as usize);
        let (mut scales, mut minima) = ([0.0; STRIP], [0.0; STRIP]);
        let mut first = depth.start;
        while first < depth.end {
            let end = depth.end.min((first / block + 1).saturating_mul(block));
            self.load_scales(first, &mut scales, &mut minima);
            for input in (first..end).step_by(per_word) {
                let stored = &self.words[input / per_word * STRIP..][..STRIP];
                let inputs = end.min(input + per_word) - input;
                let out = &mut out[(input - depth.start) * STRIP..][..inputs * STRIP];
                unpack(simd, self.quantisation, stored, &scales, &minima, out);
            }
            first = end;
        }
    }

    /// The scales and minima of the block that holds `input`.
    #[inline(always)]
    fn load_scales(self, input: usize, scales: &mut [f32; STRIP], minima: &mut [f32; STRIP]) {
        let packed = |row: usize| &self.scales[row * STRIP..(row + 1) * STRIP];
        // The library's conversion asks the processor what it can, for every number.
        let half = |word: u32| widen_f16(f16::from_bits(word as u16));
        match self.quantisation.block.map(|block| input / block as usize) {
            None => scales.iter_mut().zip(packed(0)).for_each(|(scale, bits)| *scale = f32::from_bits(*bits)),
            Some(block) if self.quantisation.minimum => {
                for ((scale, minimum), word) in scales.iter_mut().zip(minima).zip(packed(block)) {
                    (*scale, *minimum) = (half(*word), half(word >> 16));
                }
            }
            Some(block) => {
                let shift = 16 * (block % 2) as u32;
                scales.iter_mut().zip(packed(block / 2)).for_each(|(scale, word)| *scale = half(word >> shift));
            }
        }
    }
}

/// One word of every column to rows of numbers, `out` `[inputs, columns]`: scale · (stored − zero) + minimum.
#[inline(always)]
fn unpack<S: Simd>(
    simd: S,
    quantisation: Quantisation,
    stored: &[u32],
    scales: &[f32],
    minima: &[f32],
    out: &mut [f32],
) {
    // Whole words with shifts that the compiler knows: an instruction each, where others are three.
    match (quantisation.bits, out.len() / STRIP) {
        (4, 8) => unpack_inputs::<S, 8>(simd, 4, quantisation, stored, scales, minima, out),
        (8, 4) => unpack_inputs::<S, 4>(simd, 8, quantisation, stored, scales, minima, out),
        (bits, _) => {
            for (input, out) in out.chunks_exact_mut(STRIP).enumerate() {
                let shift = simd.splat_u32s(bits * input as u32);
                let mut shifted = [0; STRIP];
                let ((stored, _), (words, _)) = (S::as_simd_u32s(stored), S::as_mut_simd_u32s(&mut shifted));
                words.iter_mut().zip(stored).for_each(|(word, own)| *word = simd.wrapping_dyn_shr_u32s(*own, shift));
                unpack_inputs::<S, 1>(simd, bits, quantisation, &shifted, scales, minima, out);
            }
        }
    }
}

/// The first `INPUTS` numbers of every word.
#[inline(always)]
fn unpack_inputs<S: Simd, const INPUTS: usize>(
    simd: S,
    bits: u32,
    quantisation: Quantisation,
    stored: &[u32],
    scales: &[f32],
    minima: &[f32],
    out: &mut [f32],
) {
    // A whole number below 2²³ in the mantissa of 2²³ is that number more than 2²³.
    const MAGIC: f32 = 8_388_608.0;
    let (mask, magic) = (simd.splat_u32s((1 << bits) - 1), simd.splat_u32s(MAGIC.to_bits()));
    let zero = simd.splat_f32s(MAGIC + quantisation.zero as f32);
    let ((stored, _), (scales, _), (minima, _)) =
        (S::as_simd_u32s(stored), S::as_simd_f32s(scales), S::as_simd_f32s(minima));
    let (out, _) = S::as_mut_simd_f32s(out);
    let vectors = stored.len();
    assert!(scales.len() == vectors && minima.len() == vectors && out.len() == INPUTS * vectors);
    for (at, ((stored, scale), minimum)) in stored.iter().zip(scales).zip(minima).enumerate() {
        for input in 0..INPUTS {
            let number = simd.wrapping_dyn_shr_u32s(*stored, simd.splat_u32s(bits * input as u32));
            let number = simd.or_u32s(simd.and_u32s(number, mask), magic);
            let number = simd.sub_f32s(simd.transmute_f32s_u32s(number), zero);
            out[input * vectors + at] = simd.add_f32s(simd.mul_f32s(*scale, number), *minimum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (one, other) = (f16::from_bits(bits), bf16::from_bits(bits));
            if one.is_finite() {
                assert_eq!(widen_f16(one).to_bits(), one.to_f32().to_bits(), "f16 {bits:#x}");
            }
            if other.is_finite() {
                assert_eq!(widen_bf16(other).to_bits(), other.to_f32().to_bits(), "bf16 {bits:#x}");
            }
        }
    }
}
