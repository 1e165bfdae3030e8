//! A tile of rows that are read where they lie, times a strip of columns. Packing rows costs a tenth of the products of a long prompt;
//! what it would gain, addresses that the compiler knows, is had by a few pointers that stand for all rows.
//!
//! Sums are those of [`crate::kernel`], to the bit.

use pulp::{Simd, WithSimd};

use crate::fetch::{Ahead, Pieces, fetch_near};
use crate::kernel::{MOST_TILE_ROWS, NEAR, TURN, load, store, tile_columns, tile_rows, with_rows};
use crate::layout::{SLICE, STRIP};

/// `out = x @ weight`, the sum of the slices of the depth one after the other.
pub(crate) struct UnpackedTile<'a> {
    /// From the first row's first number on.
    pub(crate) x: &'a [f32],
    /// Floats from one row to the next.
    pub(crate) x_pitch: usize,
    /// `[depth, STRIP]`
    pub(crate) weight: &'a [f32],
    /// What will be needed next.
    pub(crate) ahead: Pieces<'a>,
    /// As many rows as the tile has, at most [`tile_rows`]; what they held doesn't matter.
    pub(crate) out: &'a mut [[f32; STRIP]],
}

impl UnpackedTile<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say, or the tile has too many rows.
    #[inline]
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let (rows, depth) = (self.out.len(), self.weight.len() / STRIP);
        if rows == 0 || depth == 0 {
            return self.out.as_flattened_mut().fill(0.0);
        }
        assert!(rows <= tile_rows::<S>() && self.x.len() >= (rows - 1) * self.x_pitch + depth);
        with_rows!(rows, multiply, simd, self);
    }
}

#[inline(always)]
fn multiply<S: Simd, const ROWS: usize>(simd: S, tile: UnpackedTile<'_>) {
    simd.vectorize(Work::<ROWS>(tile));
}

/// A tile of so many rows.
struct Work<'a, const ROWS: usize>(UnpackedTile<'a>);

impl<const ROWS: usize> WithSimd for Work<'_, ROWS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let UnpackedTile { x, x_pitch, weight, ahead, out } = self.0;
        let depth = weight.len() / STRIP;
        // The first tile of the strip's columns fetches for all.
        let mut ahead = Ahead::new(ahead, depth / TURN);
        for column in (0..STRIP).step_by(tile_columns::<S>()) {
            for first in (0..depth).step_by(SLICE) {
                let steps = SLICE.min(depth - first);
                // SAFETY: `UnpackedTile::run` has compared every extent with its slice.
                unsafe {
                    let mut rows = RowPointers::new(x.as_ptr().add(first), x_pitch);
                    let mut weights = weight.as_ptr().add(first * STRIP + column);
                    let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
                    for _ in 0..steps / TURN {
                        ahead.fetch();
                        sums = accumulate::<S, ROWS, TURN>(simd, sums, rows, weights);
                        weights = weights.wrapping_add(TURN * STRIP);
                        rows = rows.ahead(TURN);
                    }
                    for _ in 0..steps % TURN {
                        sums = accumulate::<S, ROWS, 1>(simd, sums, rows, weights);
                        weights = weights.wrapping_add(STRIP);
                        rows = rows.ahead(1);
                    }
                    for (out, sums) in out.iter_mut().zip(sums) {
                        for (half, sum) in sums.into_iter().enumerate() {
                            let place = out.as_mut_ptr().add(column + half * S::F32_LANES);
                            let before = if first == 0 { simd.splat_f32s(0.0) } else { load::<S>(place) };
                            store::<S>(place, simd.add_f32s(before, sum));
                        }
                    }
                }
            }
        }
    }
}

/// Rows whose addresses one pointer gives: a processor adds one or two pitches to it as it loads.
const ROWS_OF_POINTER: usize = 3;

/// Pointers to every third row. With one for each row there would be more of them than registers.
#[derive(Clone, Copy)]
struct RowPointers {
    every_third: [*const f32; MOST_TILE_ROWS.div_ceil(ROWS_OF_POINTER)],
    pitch: usize,
}

impl RowPointers {
    #[inline(always)]
    fn new(first: *const f32, pitch: usize) -> Self {
        let every_third = std::array::from_fn(|at| first.wrapping_add(ROWS_OF_POINTER * at * pitch));
        // The compiler would find out what they are, and keep a pointer for each row.
        Self { every_third: std::hint::black_box(every_third), pitch }
    }

    /// So many steps further.
    #[inline(always)]
    fn ahead(self, steps: usize) -> Self {
        Self { every_third: self.every_third.map(|row| row.wrapping_add(steps)), ..self }
    }
}

/// `sums[i] += Σ_step x[i][step] · weights[step]`, in rising order of the steps.
///
/// # Safety
/// So many rows have as many steps, and so have the weights, with two vectors each.
#[inline(always)]
unsafe fn accumulate<S: Simd, const ROWS: usize, const STEPS: usize>(
    simd: S,
    mut sums: [[S::f32s; 2]; ROWS],
    RowPointers { every_third, pitch }: RowPointers,
    weights: *const f32,
) -> [[S::f32s; 2]; ROWS] {
    for step in 0..STEPS {
        // SAFETY: by the caller's promise.
        unsafe {
            let weights = weights.add(step * STRIP);
            fetch_near(weights.wrapping_add(NEAR * STRIP));
            fetch_near(weights.wrapping_add(NEAR * STRIP + S::F32_LANES));
            let (first, second) = (load::<S>(weights), load::<S>(weights.add(S::F32_LANES)));
            for (sums, row) in sums.chunks_mut(ROWS_OF_POINTER).zip(every_third) {
                for (at, sums) in sums.iter_mut().enumerate() {
                    let x = simd.splat_f32s(*row.wrapping_add(at * pitch + step));
                    sums[0] = simd.mul_add_e_f32s(x, first, sums[0]);
                    sums[1] = simd.mul_add_e_f32s(x, second, sums[1]);
                }
            }
        }
    }
    sums
}
