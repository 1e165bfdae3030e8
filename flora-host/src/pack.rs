//! Rows of x in the form that the kernels read: widened and scaled.

use std::ops::Range;

use bytemuck::Pod;
use half::bf16;
use pulp::Simd;

use crate::fetch::Pieces;
use crate::layout::X_PITCH;
use crate::values::{NOT_REPLACED, Replaced, Values};
use crate::vectorise::vectorised;

/// A matrix of vectors `[slots, width]`.
#[derive(Clone, Copy)]
pub(crate) struct Vectors<'a> {
    pub(crate) values: Values<'a>,
    pub(crate) width: usize,
    /// Numbers from one vector to the next.
    pub(crate) pitch: usize,
    /// Vectors that are read in place of these.
    pub(crate) replaced: Option<Replaced<'a>>,
}

impl<'a> Vectors<'a> {
    /// Vectors that follow one another.
    pub(crate) fn dense(values: Values<'a>, width: usize) -> Self {
        Self { values, width, pitch: width, replaced: None }
    }
}

impl<'a> Vectors<'a> {
    /// Where the numbers of vector `slot` begin.
    fn of(&self, slot: usize) -> (Values<'a>, usize) {
        match self.replaced.map(|replaced| (replaced, replaced.places[slot])) {
            Some((replaced, place)) if place != NOT_REPLACED => {
                (Values::F32(replaced.values), place as usize * self.width)
            }
            _ => (self.values, slot * self.pitch),
        }
    }

    /// The numbers `range` of vector `slot` where they lie, if they are bf16.
    pub(crate) fn bf16s(&self, slot: usize, range: Range<usize>) -> Option<&'a [bf16]> {
        match self.of(slot) {
            (Values::Bf16(values), start) => Some(&values[start + range.start..start + range.end]),
            _ => None,
        }
    }

    /// The numbers `range` of vector `slot` where they lie, if they are f32.
    pub(crate) fn f32s(&self, slot: usize, range: Range<usize>) -> Option<&'a [f32]> {
        match self.of(slot) {
            (Values::F32(values), start) => Some(&values[start + range.start..start + range.end]),
            _ => None,
        }
    }

    /// The memory of some columns of vectors that follow one another.
    pub(crate) fn pieces(&self, slots: Range<usize>, columns: Range<usize>) -> Pieces<'a> {
        match self.values {
            Values::F32(values) => self.pieces_of(values, slots, columns),
            Values::F16(values) => self.pieces_of(values, slots, columns),
            Values::Bf16(values) => self.pieces_of(values, slots, columns),
        }
    }

    fn pieces_of<T: Pod>(&self, values: &'a [T], slots: Range<usize>, columns: Range<usize>) -> Pieces<'a> {
        let Some(last) = slots.end.checked_sub(1) else { return Pieces::default() };
        let (first, end) = (slots.start * self.pitch + columns.start, last * self.pitch + columns.end);
        let size = size_of::<T>();
        let all = values.get(first..end).unwrap_or_default();
        if columns.is_empty() || all.is_empty() {
            return Pieces::default();
        }
        Pieces::new(bytemuck::cast_slice(all), slots.len(), size * columns.len(), size * self.pitch)
    }

    /// The numbers of vector `slot` from `first` on.
    #[inline(always)]
    pub(crate) fn widen(&self, slot: usize, first: usize, out: &mut [f32]) {
        let (values, start) = self.of(slot);
        values.widen(start + first, out);
    }

    /// The same by `out`, number by number.
    #[inline(always)]
    pub(crate) fn multiply(&self, slot: usize, first: usize, out: &mut [f32]) {
        let (values, start) = self.of(slot);
        let first = start + first;
        match values {
            Values::F32(values) => multiply(out, &values[first..first + out.len()]),
            _ => {
                let mut widened = [0.0; 64];
                for (start, out) in (first..).step_by(64).zip(out.chunks_mut(64)) {
                    let widened = &mut widened[..out.len()];
                    values.widen(start, widened);
                    multiply(out, widened);
                }
            }
        }
    }
}

impl Vectors<'_> {
    /// The numbers of a row from `first` on, by its in-vector where it has one (slots count from 1).
    #[inline(always)]
    pub(crate) fn scaled(&self, (row, in_slot): (u32, u32), in_pool: Vectors<'_>, first: usize, out: &mut [f32]) {
        self.widen(row as usize, first, out);
        if let Some(slot) = in_slot.checked_sub(1) {
            in_pool.multiply(slot as usize, first, out);
        }
    }
}

fn multiply(out: &mut [f32], factors: &[f32]) {
    out.iter_mut().zip(factors).for_each(|(out, factor)| *out *= factor);
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
                let slot = in_slot.checked_sub(1).map(|slot| slot as usize);
                let f32s = (x.f32s(row as usize, depth.clone()), slot.map(|slot| in_pool.f32s(slot, depth.clone())));
                if let (Some(values), Some(Some(factors))) = f32s {
                    // In one pass, where both can be read as they are.
                    out.iter_mut().zip(values).zip(factors).for_each(|((out, value), factor)| *out = value * factor);
                } else {
                    x.scaled((row, in_slot), in_pool, depth.start, out);
                }
            }
        },
    );
}
