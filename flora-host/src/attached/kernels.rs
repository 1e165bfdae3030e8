//! The innermost loops: low-rank sums of a tile of rows, and products with scales.
//!
//! Each sum runs over its vectors lane by lane in rising order, whether its row is computed alone or in a tile, so that its bits
//! don't depend on that.

use pulp::{Simd, WithSimd};

use super::batch::TILE_ROWS;
use super::placed::Floats;
use super::rows::FloatRows;
use crate::shrink::horizontal_sum;
use crate::vectorise::vectorised;

/// Vectors that a row is multiplied by together.
const TILE_VECTORS: usize = 4;

/// Rows with one adapter: [`TILE_ROWS`] of them, or one.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) x: FloatRows<'a>,
    pub(super) shrink: Floats<'a>,
    pub(super) expand: Floats<'a>,
    pub(super) rank: usize,
    pub(super) rows: usize,
}

/// `sums[row] += Σ_q (x[row] · shrink_q) expand_q`, the sums `pitch` apart.
pub(super) struct AddLowRank<'a> {
    pub(super) tile: Tile<'a>,
    /// Room for the shrunk rows, `[rows, rank]`.
    pub(super) hidden: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
    pub(super) pitch: usize,
}

impl WithSimd for AddLowRank<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.tile.rows {
            TILE_ROWS => self.run::<S, TILE_ROWS>(simd),
            _ => self.run::<S, 1>(simd),
        }
    }
}

impl AddLowRank<'_> {
    #[inline(always)]
    fn run<S: Simd, const ROWS: usize>(self, simd: S) {
        let Self { tile, hidden, sums, pitch } = self;
        let rank = tile.rank;
        let mut first = 0;
        while first + TILE_VECTORS <= rank {
            let products = dots::<S, ROWS, TILE_VECTORS>(simd, &tile, first);
            put(hidden, rank, first, products);
            first += TILE_VECTORS;
        }
        while first < rank {
            let products = dots::<S, ROWS, 1>(simd, &tile, first);
            put(hidden, rank, first, products);
            first += 1;
        }
        expand::<S, ROWS>(simd, &tile, hidden, sums, pitch);
    }
}

#[inline(always)]
fn put<const ROWS: usize, const VECTORS: usize>(
    hidden: &mut [f32],
    rank: usize,
    first: usize,
    products: [[f32; VECTORS]; ROWS],
) {
    for (row, products) in products.into_iter().enumerate() {
        hidden[row * rank + first..][..VECTORS].copy_from_slice(&products);
    }
}

/// Products of each row with each of some shrink vectors.
#[inline(always)]
fn dots<S: Simd, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    tile: &Tile<'_>,
    first: usize,
) -> [[f32; VECTORS]; ROWS] {
    let x = |row: usize| S::as_simd_f32s(&tile.x.values[row * tile.x.pitch..][..tile.x.width]);
    let vector = |at: usize| S::as_simd_f32s(tile.shrink.vector(first + at));
    let steps = tile.x.width / S::F32_LANES;
    let rows: [&[S::f32s]; ROWS] = std::array::from_fn(|row| &x(row).0[..steps]);
    let vectors: [&[S::f32s]; VECTORS] = std::array::from_fn(|at| &vector(at).0[..steps]);
    let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
    for at in 0..steps {
        for (row, sums) in rows.iter().zip(&mut sums) {
            for (vector, sum) in vectors.iter().zip(sums) {
                *sum = simd.mul_add_e_f32s(row[at], vector[at], *sum);
            }
        }
    }
    if steps * S::F32_LANES < tile.x.width {
        for (row, sums) in sums.iter_mut().enumerate() {
            let x = simd.partial_load_f32s(x(row).1);
            for (at, sum) in sums.iter_mut().enumerate() {
                *sum = simd.mul_add_e_f32s(x, simd.partial_load_f32s(vector(at).1), *sum);
            }
        }
    }
    sums.map(|sums| sums.map(horizontal_sum::<S>))
}

/// Adds the shrunk rows' sums.
#[inline(always)]
fn expand<S: Simd, const ROWS: usize>(simd: S, tile: &Tile<'_>, hidden: &[f32], sums: &mut [f32], pitch: usize) {
    let Tile { expand, rank, .. } = *tile;
    let mut rows = sums.chunks_mut(pitch.max(1));
    let mut rows: [(&mut [S::f32s], &mut [f32]); ROWS] =
        std::array::from_fn(|_| S::as_mut_simd_f32s(&mut rows.next().unwrap_or_default()[..expand.width]));
    for at in 0..expand.width / S::F32_LANES {
        let mut out: [S::f32s; ROWS] = std::array::from_fn(|row| rows[row].0[at]);
        for vector in 0..rank {
            let values = S::as_simd_f32s(expand.vector(vector)).0[at];
            for (row, out) in out.iter_mut().enumerate() {
                *out = simd.mul_add_e_f32s(simd.splat_f32s(hidden[row * rank + vector]), values, *out);
            }
        }
        for (row, out) in rows.iter_mut().zip(out) {
            row.0[at] = out;
        }
    }
    for (row, (_, rest)) in rows.iter_mut().enumerate().filter(|(_, (_, rest))| !rest.is_empty()) {
        let mut out = simd.partial_load_f32s(rest);
        for vector in 0..rank {
            let values = simd.partial_load_f32s(S::as_simd_f32s(expand.vector(vector)).1);
            out = simd.mul_add_e_f32s(simd.splat_f32s(hidden[row * rank + vector]), values, out);
        }
        simd.partial_store_f32s(rest, out);
    }
}

/// `values *= scale`
pub(super) struct Scale<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) scale: &'a [f32],
}

impl WithSimd for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { values, scale } = self;
        vectorised(
            simd,
            #[inline(always)]
            || values.iter_mut().zip(scale).for_each(|(value, scale)| *value *= scale),
        );
    }
}

/// `sums += scale ∘ values`; `None`: ones.
pub(super) struct AddScaled<'a> {
    pub(super) sums: &'a mut [f32],
    pub(super) values: &'a [f32],
    pub(super) scale: Option<&'a [f32]>,
}

impl WithSimd for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sums, values, scale } = self;
        vectorised(
            simd,
            #[inline(always)]
            || match scale {
                None => sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                Some(scale) => {
                    let products = values.iter().zip(scale).map(|(value, scale)| value * scale);
                    sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
                }
            },
        );
    }
}
