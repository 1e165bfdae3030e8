//! Operands in the form that the kernels read: rows of x widened and scaled, panels of W0 decoded and cut into strips.

use std::ops::Range;

use flora_plan::layer::Quantisation;
use flora_plan::weight::{PackedWeight, WeightValues};
use half::{bf16, f16};
use pulp::{Simd, WithSimd};

use crate::fetch::fetch;
use crate::kernel::{SLICE, X_PITCH, strip_columns};
use crate::values::Values;

/// A weight `[d, k]`.
#[derive(Clone, Copy)]
pub(crate) enum Weight<'a> {
    /// As it is stored.
    Packed(&'a PackedWeight),
    /// W_i, made whole.
    Made(&'a [f32]),
}

impl<'a> Weight<'a> {
    /// Its numbers, where they need no decoding.
    pub(crate) fn floats(self) -> Option<&'a [f32]> {
        match self {
            Weight::Made(values) => Some(values),
            Weight::Packed(weight) => match weight.values() {
                WeightValues::F32(values) => Some(values),
                _ => None,
            },
        }
    }
}

/// A matrix of vectors `[slots, width]`.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) values: Values<'a>,
    pub(crate) width: usize,
}

impl Vectors<'_> {
    /// The numbers of vector `slot` from `first` on.
    pub(crate) fn widen(&self, slot: usize, first: usize, out: &mut [f32]) {
        self.values.widen(slot * self.width + first, out);
    }

    /// Asks for `len` numbers of vector `slot` from `first` on.
    pub(crate) fn fetch(&self, slot: usize, first: usize, len: usize) {
        let range = slot * self.width + first..slot * self.width + first + len;
        match self.values {
            Values::F32(values) => fetch(&values[range]),
            Values::F16(values) => fetch(&values[range]),
            Values::Bf16(values) => fetch(&values[range]),
        }
    }

    /// The same by `out`, number by number.
    fn multiply(&self, slot: usize, first: usize, out: &mut [f32]) {
        let first = slot * self.width + first;
        match self.values {
            Values::F32(values) => multiply(out, &values[first..first + out.len()]),
            _ => {
                let mut widened = [0.0; 64];
                for (start, out) in (first..).step_by(64).zip(out.chunks_mut(64)) {
                    let widened = &mut widened[..out.len()];
                    self.values.widen(start, widened);
                    multiply(out, widened);
                }
            }
        }
    }
}

fn multiply(out: &mut [f32], factors: &[f32]) {
    out.iter_mut().zip(factors).for_each(|(out, factor)| *out *= factor);
}

/// Runs `work` with the instruction set's vectors at the compiler's disposal.
pub(crate) fn vectorised<S: Simd, R>(simd: S, work: impl FnOnce() -> R) -> R {
    struct Work<F>(F);
    impl<F: FnOnce() -> R, R> WithSimd for Work<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    simd.vectorize(Work(work))
}

/// Packs rows of x, [`X_PITCH`] apart, each by its in-vector where it has one (slots count from 1).
pub(crate) fn pack_rows<S: Simd>(
    simd: S,
    x: Vectors<'_>,
    in_pool: Vectors<'_>,
    rows: impl Iterator<Item = (u32, u32)>,
    depth: Range<usize>,
    out: &mut [f32],
) {
    vectorised(
        simd,
        #[inline(always)]
        || {
            for ((row, in_slot), out) in rows.zip(out.chunks_mut(X_PITCH)) {
                let out = &mut out[..depth.len()];
                x.widen(row as usize, depth.start, out);
                if let Some(slot) = in_slot.checked_sub(1) {
                    in_pool.multiply(slot as usize, depth.start, out);
                }
            }
        },
    );
}

/// Asks for what [`pack_rows`] reads of a row.
pub(crate) fn fetch_row(x: Vectors<'_>, in_pool: Vectors<'_>, (row, in_slot): (u32, u32), depth: &Range<usize>) {
    x.fetch(row as usize, depth.start, depth.len());
    if let Some(slot) = in_slot.checked_sub(1) {
        in_pool.fetch(slot as usize, depth.start, depth.len());
    }
}

/// Floats from one strip of a packed panel to the next: a row more than a slice, so that strips don't share cache sets.
pub(crate) const fn strip_pitch<S: Simd>() -> usize {
    (SLICE + 1) * strip_columns::<S>()
}

/// Decodes rows `depth` of columns `columns` of a weight into strips, [`strip_pitch`] apart. Columns beyond the last are 0.
/// `row` holds the columns, rounded up to strips.
pub(crate) fn pack_panel<S: Simd>(
    simd: S,
    weight: Weight<'_>,
    k: usize,
    depth: Range<usize>,
    columns: Range<usize>,
    row: &mut [f32],
    out: &mut [f32],
) {
    let weight = match weight {
        Weight::Made(values) => {
            return vectorised(
                simd,
                #[inline(always)]
                || pack_f32::<S>(values, k, depth, columns, out),
            );
        }
        Weight::Packed(weight) => weight,
    };
    vectorised(
        simd,
        #[inline(always)]
        || match (weight.values(), weight.format().quantisation()) {
            (WeightValues::F32(values), _) => pack_f32::<S>(values, k, depth, columns, out),
            (WeightValues::F16(values), _) => pack_halves::<S, _>(values, k, depth, columns, row, out, widen_f16),
            (WeightValues::Bf16(values), _) => pack_halves::<S, _>(values, k, depth, columns, row, out, widen_bf16),
            (WeightValues::Words(words), Some(quantisation)) => {
                for (strip, out) in out.chunks_mut(strip_pitch::<S>()).enumerate() {
                    let first = columns.start + strip * strip_columns::<S>();
                    let columns = first..columns.end.min(first + strip_columns::<S>());
                    decode(simd, weight, words, quantisation, depth.clone(), columns, out);
                }
            }
            // `PackedWeight` makes words of quantised formats only.
            (WeightValues::Words(_), None) => {}
        },
    );
}

/// Exact for what a weight holds, finite numbers, and without the branches that keep the library's from being computed a vector at
/// a time: the bits of an f16 without its sign are those of an f32 that is too small by the difference of the two biases.
#[inline(always)]
fn widen_f16(value: f16) -> f32 {
    let bits = u32::from(value.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// Exact for finite numbers, likewise.
#[inline(always)]
fn widen_bf16(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// Inputs of a weight that are asked for before they are packed. They lie far from one another, so that the processor doesn't
/// foresee them by itself.
const AHEAD: usize = 8;

#[inline(always)]
fn pack_halves<S: Simd, T: Copy>(
    values: &[T],
    k: usize,
    depth: Range<usize>,
    columns: Range<usize>,
    row: &mut [f32],
    out: &mut [f32],
    widen: impl Fn(T) -> f32,
) {
    let end = depth.end;
    for (at, depth) in depth.enumerate() {
        if depth + AHEAD < end {
            fetch(&values[(depth + AHEAD) * k + columns.start..(depth + AHEAD) * k + columns.end]);
        }
        let values = &values[depth * k + columns.start..depth * k + columns.end];
        row.iter_mut().zip(values).for_each(|(out, value)| *out = widen(*value));
        scatter::<S>(row, columns.len(), at, out);
    }
}

#[inline(always)]
fn pack_f32<S: Simd>(values: &[f32], k: usize, depth: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
    let (width, end) = (strip_columns::<S>(), depth.end);
    for (at, depth) in depth.enumerate() {
        let row = &values[depth * k + columns.start..depth * k + columns.end];
        if depth + AHEAD < end {
            fetch(&values[(depth + AHEAD) * k + columns.start..(depth + AHEAD) * k + columns.end]);
        }
        let mut strips = out.chunks_mut(strip_pitch::<S>());
        let mut whole = row.chunks_exact(width);
        for (row, strip) in whole.by_ref().zip(strips.by_ref()) {
            copy_vectors::<S>(row, &mut strip[at * width..(at + 1) * width]);
        }
        if let (false, Some(strip)) = (whole.remainder().is_empty(), strips.next()) {
            let (own, padding) = strip[at * width..(at + 1) * width].split_at_mut(whole.remainder().len());
            own.copy_from_slice(whole.remainder());
            padding.fill(0.0);
        }
    }
}

/// One row of the panel to its strips.
#[inline(always)]
fn scatter<S: Simd>(row: &mut [f32], columns: usize, at: usize, out: &mut [f32]) {
    let width = strip_columns::<S>();
    row[columns..].fill(0.0);
    for (row, strip) in row.chunks_exact(width).zip(out.chunks_mut(strip_pitch::<S>())) {
        copy_vectors::<S>(row, &mut strip[at * width..(at + 1) * width]);
    }
}

/// Copies two vectors without a call to the library, which costs more than they do.
#[inline(always)]
fn copy_vectors<S: Simd>(from: &[f32], to: &mut [f32]) {
    let (from, _) = S::as_simd_f32s(from);
    let (to, _) = S::as_mut_simd_f32s(to);
    if let ([one, other], [to_one, to_other]) = (from, to) {
        // One after the other: as a pair they would go by way of the stack.
        *to_one = *one;
        *to_other = *other;
    }
}

/// The columns of a strip on the widest instruction set.
const MOST_COLUMNS: usize = 64;

/// One strip of a quantised weight; the arithmetic of [`PackedWeight::value`].
#[inline(always)]
fn decode<S: Simd>(
    simd: S,
    weight: &PackedWeight,
    words: &[u32],
    quantisation: Quantisation,
    depth: Range<usize>,
    columns: Range<usize>,
    out: &mut [f32],
) {
    let (k, width, per_word) = (weight.shape().k as usize, strip_columns::<S>(), quantisation.per_word() as usize);
    let (mut scales, mut minima, mut stored) = ([0.0; MOST_COLUMNS], [0.0; MOST_COLUMNS], [0; MOST_COLUMNS]);
    let (scales, minima, stored) = (&mut scales[..width], &mut minima[..width], &mut stored[..width]);
    let block = quantisation.block.map_or(usize::MAX, |block| block as usize);
    let mut first = depth.start;
    while first < depth.end {
        let end = if block == usize::MAX { depth.end } else { depth.end.min((first / block + 1) * block) };
        load_scales(weight, quantisation, first, columns.clone(), scales, minima);
        // Slices begin at a multiple of a word's inputs.
        for input in (first..end).step_by(per_word) {
            let row = input / per_word * k;
            let own = &words[row + columns.start..row + columns.end];
            // Of the next strip: rows of words lie too far from one another for the processor to foresee them.
            fetch(&words[row + columns.end..row + k.min(columns.end + width)]);
            let inputs = end.min(input + per_word) - input;
            let out = &mut out[(input - depth.start) * width..][..inputs * width];
            if own.len() == width {
                unpack(simd, quantisation, own, scales, minima, out);
            } else {
                stored[..own.len()].copy_from_slice(own);
                unpack(simd, quantisation, stored, scales, minima, out);
            }
        }
        first = end;
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
    match (quantisation.bits, out.len() / strip_columns::<S>()) {
        (4, 8) => unpack_inputs::<S, 8>(simd, 4, quantisation, stored, scales, minima, out),
        (8, 4) => unpack_inputs::<S, 4>(simd, 8, quantisation, stored, scales, minima, out),
        (bits, _) => {
            for (input, out) in out.chunks_exact_mut(strip_columns::<S>()).enumerate() {
                let shift = simd.splat_u32s(bits * input as u32);
                let mut shifted = [0; MOST_COLUMNS];
                let ((stored, _), (words, _)) = (S::as_simd_u32s(stored), S::as_mut_simd_u32s(&mut shifted));
                words.iter_mut().zip(stored).for_each(|(word, own)| *word = simd.wrapping_dyn_shr_u32s(*own, shift));
                let shifted = &shifted[..strip_columns::<S>()];
                unpack_inputs::<S, 1>(simd, bits, quantisation, shifted, scales, minima, out);
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

/// The scales and minima of the block that holds `input`; 0 beyond the last column.
#[inline(always)]
fn load_scales(
    weight: &PackedWeight,
    quantisation: Quantisation,
    input: usize,
    columns: Range<usize>,
    scales: &mut [f32],
    minima: &mut [f32],
) {
    let k = weight.shape().k as usize;
    scales[columns.len()..].fill(0.0);
    let packed = |row: usize| &weight.scales()[row * k + columns.start..row * k + columns.end];
    // The library's conversion asks the processor what it can, for every number.
    let half = |word: u32| widen_f16(f16::from_bits(word as u16));
    match quantisation.block.map(|block| input / block as usize) {
        None => scales.iter_mut().zip(packed(0)).for_each(|(scale, bits)| *scale = f32::from_bits(*bits)),
        Some(block) if quantisation.minimum => {
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
