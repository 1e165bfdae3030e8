//! Halves as floats, and floats as halves, without the branches that keep the library's conversions from being computed a vector at a
//! time.

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

/// Exact for what a weight holds, finite numbers: the bits of an f16 without its sign are those of an f32 that is too small by the
/// difference of the two biases.
#[inline(always)]
pub(crate) fn widen_f16(value: f16) -> f32 {
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Exact; NaN stays NaN.
#[inline(always)]
pub(crate) fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// The nearest bf16, the even one of two.
#[inline(always)]
pub(crate) fn round_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
}

/// [`round_bf16`] of every number.
#[inline(always)]
pub(crate) fn round_all(values: &[f32], out: &mut [bf16]) {
    out.iter_mut().zip(values).for_each(|(out, value)| *out = round_bf16(*value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_rounded_as_the_library_does() {
        let mut random = fastrand::Rng::with_seed(1);
        let special = [0, 1, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7f80_0001, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000];
        for bits in special.into_iter().chain(std::iter::repeat_with(|| random.u32(..)).take(1 << 20)) {
            let value = f32::from_bits(bits);
            assert_eq!(round_bf16(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
    }

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
