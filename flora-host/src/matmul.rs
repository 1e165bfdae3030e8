//! Small products of matrices that lie in cache, of attention's backward pass: `out += left @ right`, where left may be read by its
//! columns, so that a transposed matrix needs no copy.

use pulp::{Simd, WithSimd};

use crate::kernel::{MOST_TILE_ROWS, Operand, accumulate, load, store, tile_columns, tile_rows, with_rows};
use crate::partition::even_tiles;
use crate::products::Floats;

/// A matrix that is read number by number.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) values: &'a [f32],
    /// Floats from one row of the product to the next.
    pub(crate) row_pitch: usize,
    /// Floats from one step of a sum to the next.
    pub(crate) step_pitch: usize,
}

/// A matrix `[steps, columns]` that is read by vectors.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) pitch: usize,
}

/// `out[row][column] += Σ_step left[row][step] · right[step][column]`, one fused multiply-add after the other in rising order of
/// the steps: a number's bits don't depend on what it is computed with.
pub(crate) struct MatMulAdd<'a> {
    pub(crate) left: Left<'a>,
    pub(crate) right: Right<'a>,
    /// `[rows, columns]`, rows `out_pitch` apart.
    pub(crate) out: &'a mut [f32],
    pub(crate) out_pitch: usize,
    pub(crate) rows: usize,
    /// A multiple of a tile's.
    pub(crate) columns: usize,
    pub(crate) steps: usize,
}

impl MatMulAdd<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say.
    pub(crate) fn run<S: Simd>(self, simd: S) {
        let Self { left, right, rows, columns, steps, .. } = self;
        if rows == 0 || columns == 0 || steps == 0 {
            return;
        }
        assert!(left.values.len() > (rows - 1) * left.row_pitch + (steps - 1) * left.step_pitch);
        assert!(right.values.len() >= (steps - 1) * right.pitch + columns);
        assert!(self.out.len() >= (rows - 1) * self.out_pitch + columns);
        assert!(columns.is_multiple_of(tile_columns::<S>()) && tile_rows::<S>() <= MOST_TILE_ROWS);
        for tile in even_tiles(rows, tile_rows::<S>()) {
            let strip = Tile {
                left: Left { values: &left.values[tile.start * left.row_pitch..], ..left },
                right,
                out: &mut self.out[tile.start * self.out_pitch..],
                out_pitch: self.out_pitch,
                columns,
                steps,
            };
            with_rows!(tile.len(), multiply, simd, strip);
        }
    }
}

/// Some rows of a product; its extents have been compared with its slices.
struct Tile<'a> {
    left: Left<'a>,
    right: Right<'a>,
    out: &'a mut [f32],
    out_pitch: usize,
    columns: usize,
    steps: usize,
}

#[inline(always)]
fn multiply<S: Simd, const ROWS: usize>(simd: S, tile: Tile<'_>) {
    struct Work<'a, const ROWS: usize>(Tile<'a>);
    impl<const ROWS: usize> WithSimd for Work<'_, ROWS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Tile { left, right, out, out_pitch, columns, steps } = self.0;
            for column in (0..columns).step_by(tile_columns::<S>()) {
                // SAFETY: `MatMulAdd::run` has compared every extent with its slice.
                unsafe {
                    let out = out.as_mut_ptr().add(column);
                    let mut sums = [[simd.splat_f32s(0.0); 2]; ROWS];
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let at = out.add(row * out_pitch);
                        *sums = [load::<S>(at), load::<S>(at.add(S::F32_LANES))];
                    }
                    let (numbers, Left { row_pitch, step_pitch, .. }) = (left.values.as_ptr(), left);
                    let right = Operand { values: right.values.as_ptr().add(column), pitch: right.pitch };
                    let sums =
                        accumulate::<S, Floats, ROWS, false>(simd, sums, numbers, row_pitch, step_pitch, right, steps);
                    for (row, sums) in sums.into_iter().enumerate() {
                        let at = out.add(row * out_pitch);
                        store::<S>(at, sums[0]);
                        store::<S>(at.add(S::F32_LANES), sums[1]);
                    }
                }
            }
        }
    }
    simd.vectorize(Work::<ROWS>(tile));
}
