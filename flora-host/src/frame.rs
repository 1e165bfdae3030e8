//! A panel of columns, and the adapters' vectors within it.

use std::ops::Range;

use flora_plan::schedule::Scale;
use pulp::Simd;
use rayon::prelude::*;

use crate::kernel::{Compose, X_PITCH, strip_columns};
use crate::pack::Vectors;
use crate::workspace::Buffer;

/// Columns of a panel: with a slice's depth half of a second-level cache of 1 MiB. Rows of x are packed once for every panel, and
/// the longer the runs of the weight's rows are, the less a slice waits for memory; more columns would leave two threads without a
/// panel to take over where one of them is held up.
pub(crate) const PANEL_COLUMNS: usize = 512;

/// Fewer multiply-adds than this are done before other threads would have woken up.
pub(crate) const PARALLEL_MACS: u64 = 1 << 18;

/// Does `work` for every panel of `k` columns, at most `widest` each, on all threads where there is enough to do.
pub(crate) fn panels<S: Simd>(k: usize, widest: usize, macs: u64, work: impl Fn(Range<usize>) + Sync) {
    // Whole strips, and as many panels for every thread as for the others.
    let count = k.div_ceil(widest).next_multiple_of(rayon::current_num_threads());
    let panel = k.div_ceil(count).max(1).next_multiple_of(strip_columns::<S>());
    let task = |at: usize| work(at * panel..((at + 1) * panel).min(k));
    if macs < PARALLEL_MACS {
        (0..k.div_ceil(panel)).for_each(task);
    } else {
        (0..k.div_ceil(panel)).into_par_iter().for_each(task);
    }
}

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
    /// Columns, rounded up to strips: floats from one row of sums to the next.
    pub(crate) fn width(&self) -> usize {
        self.columns.len().next_multiple_of(strip_columns::<S>())
    }

    pub(crate) fn strips(&self) -> usize {
        self.columns.len().div_ceil(strip_columns::<S>())
    }

    /// The panel's part of an out-vector, ones for slot 0; slots count from 1.
    pub(crate) fn out_vector(&self, slot: u32, out: &mut [f32]) {
        let (own, padding) = out.split_at_mut(self.columns.len());
        match slot.checked_sub(1) {
            Some(slot) => self.out_pool.widen(slot as usize, self.columns.start, own),
            None => own.fill(1.0),
        }
        padding.fill(0.0);
    }

    /// Asks for an out-vector of slot 1 or more.
    pub(crate) fn fetch_out_vector(&self, slot: u32) {
        if let Some(slot) = slot.checked_sub(1) {
            self.out_pool.fetch(slot as usize, self.columns.start, self.columns.len());
        }
    }

    /// Gathers the factors of Σ_v in_v out_vᵀ within the panel and a slice of the depth.
    pub(crate) fn factors<'b>(
        &self,
        scales: impl Iterator<Item = Scale> + Clone,
        depth: Range<usize>,
        (inner, outer, row): (&'b mut Buffer, &'b mut Buffer, &mut Buffer),
    ) -> Factors<'b> {
        let is_scaled = |scale: &Scale| scale.in_slot > 0 || scale.out_slot > 0;
        let terms = scales.clone().filter(is_scaled).count();
        let offset = (scales.clone().count() - terms) as f32;
        let inner = inner.floats(terms * X_PITCH);
        let outer = outer.floats(self.strips() * terms * strip_columns::<S>());
        let row = row.floats(self.width());
        for ((at, scale), inner) in scales.filter(is_scaled).enumerate().zip(inner.chunks_exact_mut(X_PITCH)) {
            let inner = &mut inner[..depth.len()];
            match scale.in_slot.checked_sub(1) {
                Some(slot) => self.in_pool.widen(slot as usize, depth.start, inner),
                None => inner.fill(1.0),
            }
            self.out_vector(scale.out_slot, row);
            scatter::<S>(row, at, terms, outer);
        }
        Factors { inner, outer, terms, offset }
    }
}

/// offset + Σ_v in_v out_vᵀ.
pub(crate) struct Factors<'a> {
    inner: &'a [f32],
    outer: &'a [f32],
    terms: usize,
    /// The number of terms without scales.
    offset: f32,
}

impl Factors<'_> {
    /// One strip, by the weight's strip or added to what is there.
    pub(crate) fn compose<S: Simd>(&self, simd: S, strip_at: usize, weight: Option<&[f32]>, out: &mut [f32]) {
        let outer = &self.outer[strip_at * self.terms * strip_columns::<S>()..];
        Compose { inner: self.inner, outer, terms: self.terms, offset: self.offset, weight, out }.run(simd);
    }
}

/// Vector `at` of `count` to the strips of `out`.
pub(crate) fn scatter<S: Simd>(row: &[f32], at: usize, count: usize, out: &mut [f32]) {
    let strip = strip_columns::<S>();
    for (row, out) in row.chunks_exact(strip).zip(out.chunks_exact_mut(count * strip)) {
        out[at * strip..(at + 1) * strip].copy_from_slice(row);
    }
}

/// Ranges of at most `most` that differ in length by one at most.
pub(crate) fn even_tiles(count: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    even_parts(count, count.div_ceil(most))
}

/// The rows of a block. With a panel's columns their outputs are as large as a second-level cache of 1 MiB, but a tile touches
/// its own alone, once for every slice; fewer rows would have W0 packed more often.
const BLOCK_ROWS: usize = 512;

/// Rows in blocks of about [`BLOCK_ROWS`], up to half as many more: a few rows in a block of their own would have the whole of W0
/// packed once more for them.
pub(crate) fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    even_parts(rows, ((rows + BLOCK_ROWS / 2) / BLOCK_ROWS).max(1))
}

fn even_parts(count: usize, parts: usize) -> impl Iterator<Item = Range<usize>> {
    (0..parts).map(move |part| part * count / parts..(part + 1) * count / parts)
}
