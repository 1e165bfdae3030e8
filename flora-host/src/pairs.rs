//! Pairs of neighbouring inputs in bf16, which newer processors multiply two at a time: twice the products of floats in the same time,
//! each with its sum in f32. A weight in bf16 lies in pairs on every processor; where there is no such instruction, or x isn't bf16, it
//! is widened as it is read.
//!
//! A pair is the word of its first number in the lower half and the second in the upper one.

use std::ops::Range;

use half::bf16;
use pulp::Simd;

use crate::layout::{PAIRED_SLICE, STRIP, X_PITCH};
use crate::pack::Vectors;
use crate::products::Pairs;
use crate::vectorise::vectorised;
use crate::widen::{round_all, round_bf16};

/// A pair.
#[inline(always)]
pub(crate) fn pair(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// Puts a number in the first or the second place of a pair.
#[inline(always)]
pub(crate) fn put(pair: &mut u32, place: usize, number: bf16) {
    let shift = 16 * place;
    *pair = *pair & !(0xffff << shift) | u32::from(number.to_bits()) << shift;
}

/// Rows of pairs `[Pairs::of(inputs), STRIP]` as floats `[inputs, STRIP]`, exactly.
pub(crate) fn widen_pairs<'o, S: Simd>(simd: S, pairs: &[u32], out: &'o mut [f32]) -> &'o [f32] {
    vectorised(
        simd,
        #[inline(always)]
        || {
            for (pairs, out) in pairs.chunks_exact(STRIP).zip(out.chunks_mut(2 * STRIP)) {
                let (first, second) = out.split_at_mut(STRIP);
                first.iter_mut().zip(pairs).for_each(|(out, pair)| *out = f32::from_bits(pair << 16));
                second.iter_mut().zip(pairs).for_each(|(out, pair)| *out = f32::from_bits(pair & 0xffff_0000));
            }
        },
    );
    out
}

/// Rows of floats `[inputs, STRIP]`, rounded, as rows of pairs, and zeros after them.
pub(crate) fn round_pairs<'o, S: Simd>(simd: S, floats: &[f32], out: &'o mut [u32]) -> &'o [u32] {
    vectorised(
        simd,
        #[inline(always)]
        || {
            let (out, rest) = out.split_at_mut(Pairs::of(floats.len() / STRIP) * STRIP);
            rest.fill(0);
            for (floats, out) in floats.chunks(2 * STRIP).zip(out.chunks_exact_mut(STRIP)) {
                let (first, second) = floats.split_at(STRIP);
                match second.is_empty() {
                    true => {
                        out.iter_mut().zip(first).for_each(|(out, first)| *out = pair(round_bf16(*first), bf16::ZERO))
                    }
                    false => {
                        for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
                            *out = pair(round_bf16(*first), round_bf16(*second));
                        }
                    }
                }
            }
        },
    );
    out
}

/// Packs rows of x as pairs, [`X_PITCH`] apart, with zeros after them: as they are, or multiplied by their in-vector (slots count from
/// 1) and rounded.
pub(crate) fn pack_pairs<S: Simd>(
    simd: S,
    x: Vectors<'_>,
    in_pool: Vectors<'_>,
    rows: impl Iterator<Item = (u32, u32)>,
    depth: Range<usize>,
    out: &mut [u32],
) {
    let mut floats = [0.0; PAIRED_SLICE];
    let floats = &mut floats[..depth.len()];
    for ((row, in_slot), out) in rows.zip(out.chunks_mut(X_PITCH)) {
        let numbers = numbers_of(&mut out[..Pairs::padded(depth.len())]);
        numbers[depth.len()..].fill(bf16::ZERO);
        let numbers = &mut numbers[..depth.len()];
        vectorised(
            simd,
            #[inline(always)]
            || match x.bf16s(row as usize, depth.clone()) {
                Some(values) if in_slot == 0 => numbers.copy_from_slice(values),
                _ => {
                    x.scaled((row, in_slot), in_pool, depth.start, floats);
                    round_all(floats, numbers);
                }
            },
        );
    }
}

/// The numbers of pairs, on processors that have a word's lower half first: all that multiply pairs do.
#[inline(always)]
pub(crate) fn numbers_of(pairs: &mut [u32]) -> &mut [bf16] {
    const { assert!(cfg!(any(not(target_arch = "x86_64"), target_endian = "little"))) };
    bytemuck::cast_slice_mut(pairs)
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;

    struct ThereAndBack<'a> {
        floats: &'a [f32],
    }

    impl WithSimd for ThereAndBack<'_> {
        type Output = Vec<f32>;
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            let rows = self.floats.len() / STRIP;
            let mut pairs = vec![0; Pairs::of(rows) * STRIP];
            round_pairs(simd, self.floats, &mut pairs);
            let mut out = vec![f32::NAN; self.floats.len()];
            widen_pairs(simd, &pairs, &mut out);
            out
        }
    }

    #[test]
    fn floats_come_back_rounded_from_pairs_of_any_count() {
        let mut random = fastrand::Rng::with_seed(2);
        for rows in [1, 2, 7, 64, 65] {
            let floats: Vec<f32> = std::iter::repeat_with(|| random.f32() - 0.5).take(rows * STRIP).collect();
            let rounded: Vec<f32> = floats.iter().map(|value| bf16::from_f32(*value).to_f32()).collect();
            assert_eq!(Arch::new().dispatch(ThereAndBack { floats: &floats }), rounded, "{rows} rows");
        }
    }
}
