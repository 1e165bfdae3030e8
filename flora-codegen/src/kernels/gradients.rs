//! What gradients of vectors are made of beside tiles of G ∘ w0: the sum of a scale's parts, and those of low-rank pairs,
//!
//! ```text
//! expand_q = (x · shrink_q)ᵀ g        shrink_q = (g · expand_q)ᵀ x
//! ```
//!
//! whose h = x · shrink is `shrink`'s.

use cubecl::prelude::*;

use super::tables::low_rank_gradient;

/// Ranks of a unit: as many sums, each of a vector of columns.
pub(crate) const GRADIENT_RANKS: u32 = 4;

/// gradients\[target\[i\]\] = Σ_parts parts\[part, i\], in order. parts `[parts, count, width]`, gradients `[_, width]`.
///
/// Bytes: the parts once.
#[cube(launch_unchecked)]
pub(crate) fn sum_parts<N: Size>(
    parts: &Array<Vector<f32, N>>,
    targets: &Array<u32>,
    gradients: &mut Array<Vector<f32, N>>,
    part_count: u32,
    count: u32,
    width: u32,
) {
    let lanes = parts.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < count * vectors {
        let mut sum = Vector::<f32, N>::new(0.0);
        for part in 0..part_count {
            sum += parts[(part * count * vectors + at) as usize];
        }
        let target = targets[(at / vectors) as usize];
        gradients[(target * vectors + at % vectors) as usize] = sum;
    }
}

/// gradients\[target + q\] = Σ_rows h\[row, q\] others\[row\] of each adapter, in the order of its rows. h `[rows, rank]` of each
/// adapter, others `[t, width]`, gradients `[_, width]`; tables: adapters, then from word `rows` on their rows.
///
/// MACs: t·r·width. Bytes: the other rows once for each [`GRADIENT_RANKS`] ranks.
#[cube(launch_unchecked)]
pub(crate) fn low_rank_gradients<X: Float, N: Size>(
    h: &Array<f32>,
    others: &Array<Vector<X, N>>,
    tables: &Array<u32>,
    gradients: &mut Array<Vector<f32, N>>,
    rows: u32,
    width: u32,
    #[define(X)] _type: StorageType,
) {
    let lanes = others.vector_size();
    let vectors = width / comptime!(lanes as u32);
    let column = ABSOLUTE_POS_X;
    let adapter = CUBE_POS_Z * low_rank_gradient::WORDS;
    let rank = low_rank_gradient::rank(tables, adapter);
    let rank0 = CUBE_POS_Y * GRADIENT_RANKS;
    if column < vectors && rank0 < rank {
        let mut sums = Array::<Vector<f32, N>>::new(comptime!(GRADIENT_RANKS as usize));
        #[unroll]
        for own in 0..comptime!(GRADIENT_RANKS as usize) {
            sums[own] = Vector::new(0.0);
        }
        let first = rows + low_rank_gradient::first_row(tables, adapter);
        let hidden = low_rank_gradient::hidden(tables, adapter);
        for row in 0..low_rank_gradient::rows(tables, adapter) {
            let token = tables[(first + row) as usize];
            let value = Vector::<f32, N>::cast_from(others[(token * vectors + column) as usize]);
            #[unroll]
            for own in 0..GRADIENT_RANKS {
                // Sums of ranks that aren't there are not written.
                let at = hidden + row * rank + min(rank0 + own, rank - 1);
                sums[own as usize] = fma(Vector::new(h[at as usize]), value, sums[own as usize]);
            }
        }
        let target = low_rank_gradient::target(tables, adapter) + rank0;
        #[unroll]
        for own in 0..GRADIENT_RANKS {
            if rank0 + own < rank {
                gradients[((target + own) * vectors + column) as usize] = sums[own as usize];
            }
        }
    }
}
