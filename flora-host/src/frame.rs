//! A panel of columns, and the adapters' vectors within it.

use std::ops::Range;

use pulp::Simd;

use crate::layout::STRIP;
use crate::pack::Vectors;
use crate::vectorise::vectorised;

/// A panel of columns.
pub(crate) struct Frame<'a, S> {
    pub(crate) simd: S,
    /// `[slots, d]`
    pub(crate) in_pool: Vectors<'a>,
    /// `[slots, k]`
    pub(crate) out_pool: Vectors<'a>,
    pub(crate) columns: Range<usize>,
}

impl<S: Simd> Frame<'_, S> {
    /// Columns, rounded up to strips.
    pub(crate) fn width(&self) -> usize {
        self.columns.len().next_multiple_of(STRIP)
    }

    /// Floats from one row of sums to the next: not a multiple of the cache's period.
    pub(crate) fn pitch(&self) -> usize {
        self.width() + 16
    }

    pub(crate) fn strips(&self) -> usize {
        self.columns.len().div_ceil(STRIP)
    }

    /// The panel's part of an out-vector, ones for slot 0; slots count from 1.
    pub(crate) fn out_vector(&self, slot: u32, out: &mut [f32]) {
        let (vector, padding) = out.split_at_mut(self.columns.len());
        match slot.checked_sub(1) {
            Some(slot) => vectorised(
                self.simd,
                #[inline(always)]
                || self.out_pool.widen(slot as usize, self.columns.start, vector),
            ),
            None => vector.fill(1.0),
        }
        padding.fill(0.0);
    }
}
