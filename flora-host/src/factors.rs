//! The factors of W_i = W0 ∘ Σ_v in_v out_vᵀ within a panel, gathered so that strips of W_i can be made of them.

use std::ops::Range;

use flora_plan::schedule::Scale;
use pulp::Simd;

use crate::buffer::Buffer;
use crate::frame::Frame;
use crate::kernel::Compose;
use crate::layout::{STRIP, X_PITCH};
use crate::terms::{Terms, is_scaled};

/// Vectors of terms.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    /// in_v along a slice, [`X_PITCH`] apart.
    inner: &'a [f32],
    /// out_v, `[strips, count, STRIP]`.
    outer: &'a [f32],
    count: usize,
}

impl<'a> Factors<'a> {
    /// Gathers the `count` scaled terms among `scales`, within a slice of the depth.
    pub(crate) fn gather<S: Simd>(
        frame: &Frame<'_, S>,
        scales: impl Iterator<Item = Scale>,
        count: usize,
        depth: Range<usize>,
        (inner, outer, row): (&'a mut Buffer, &'a mut Buffer, &mut Buffer),
    ) -> Self {
        let inner = inner.floats(count * X_PITCH);
        let outer = outer.floats(frame.strips() * count * STRIP);
        let row = row.floats(frame.width());
        for ((at, scale), inner) in scales.filter(is_scaled).enumerate().zip(inner.chunks_exact_mut(X_PITCH)) {
            let inner = &mut inner[..depth.len()];
            match scale.in_slot.checked_sub(1) {
                Some(slot) => frame.in_pool.widen(slot as usize, depth.start, inner),
                None => inner.fill(1.0),
            }
            frame.out_vector(scale.out_slot, row);
            scatter(row, at, count, outer);
        }
        Self { inner, outer, count }
    }

    /// A strip of inputs `depth` of the slice to `out` `[depth, STRIP]`: by W0's, or added to what is there.
    pub(crate) fn compose<S: Simd>(
        &self,
        simd: S,
        terms: &Terms,
        (strip, depth): (usize, Range<usize>),
        weight: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let Terms { range, offset } = terms;
        let inner = self.inner.get(range.start * X_PITCH + depth.start..).unwrap_or_default();
        let outer = &self.outer[(strip * self.count + range.start) * STRIP..];
        Compose { inner, pitch: X_PITCH, outer, terms: range.len(), offset: *offset, weight, out }.run(simd);
    }
}

/// Vector `at` of `count` to the strips of `out`.
pub(crate) fn scatter(row: &[f32], at: usize, count: usize, out: &mut [f32]) {
    for (row, out) in row.chunks_exact(STRIP).zip(out.chunks_exact_mut((count * STRIP).max(1))) {
        out[at * STRIP..(at + 1) * STRIP].copy_from_slice(row);
    }
}
