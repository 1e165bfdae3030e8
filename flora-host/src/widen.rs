//! Halves as floats, where a weight holds them.

use half::{bf16, f16};
use pulp::Simd;

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
