//! W_i in global memory, for `bmm` and `merged`: w0 ∘ Σ_v in_v out_vᵀ + Σ_q shrink_q expand_qᵀ, one dense `[d, k]` an adapter.
//!
//! MACs: (V + r + 1)·d·k an adapter. Bytes: w0 read and W_i written once.

use cubecl::prelude::*;
use flora_plan::layer::Quantisation;

use super::decode::{
    MAGIC, level, lower_row, minimum, nested, scale, scale_word, super_word, upper_bits, upper_from, upper_row,
};
use super::tables::{self, materialised_adapter};

/// weight `[d, k]` or its words, in_pool `[slots, d]`, out_pool `[slots, k]`, tables: adapters, then from word
/// `scales` on their virtual rows' scales; made `[s, d, k]`. One cube a depth and adapter.
#[cube(launch_unchecked)]
pub(crate) fn materialise<W: Numeric, A: Float, Y: Float, N: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<A>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    made: &mut Array<Vector<Y, N>>,
    scales: u32,
    d: u32,
    k: u32,
    #[comptime] quantisation: Option<Quantisation>,
    #[define(W, A, Y)] _types: [StorageType; 3],
) {
    let width = weight.vector_size();
    let columns = k / comptime!(width as u32);
    let column = ABSOLUTE_POS_X;
    let depth = CUBE_POS_Y;
    let entry = CUBE_POS_Z * materialised_adapter::WORDS;
    if column < columns {
        let mut factor = Vector::<f32, N>::new(0.0);
        let first = materialised_adapter::first_scale(tables, entry);
        let end = materialised_adapter::end_scale(tables, entry);
        for v in first..end {
            let in_slot = tables::scale::in_slot(tables, scales + v * tables::scale::WORDS);
            let out_slot = tables::scale::out_slot(tables, scales + v * tables::scale::WORDS);
            let mut term = Vector::<f32, N>::new(1.0);
            if in_slot > 0 {
                term = Vector::new(f32::cast_from(in_pool[((in_slot - 1) * d + depth) as usize]));
            }
            if out_slot > 0 {
                term *= Vector::cast_from(out_pool[((out_slot - 1) * columns + column) as usize]);
            }
            factor += term;
        }
        let base = base_value::<W, N>(weight, weight_scales, depth, column, columns, quantisation);
        let mut value = base * factor;
        let in_slot = materialised_adapter::shrink(tables, entry);
        let out_slot = materialised_adapter::expand(tables, entry);
        for q in 0..materialised_adapter::rank(tables, entry) {
            let shrink = Vector::<f32, N>::new(f32::cast_from(in_pool[((in_slot + q) * d + depth) as usize]));
            let expand = Vector::cast_from(out_pool[((out_slot + q) * columns + column) as usize]);
            value = fma(shrink, expand, value);
        }
        made[((CUBE_POS_Z * d + depth) * columns + column) as usize] = Vector::cast_from(value);
    }
}

/// One vector of w0, decoded.
#[cube]
pub(crate) fn base_value<W: Numeric, N: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    depth: u32,
    column: u32,
    columns: u32,
    #[comptime] quantisation: Option<Quantisation>,
) -> Vector<f32, N> {
    if comptime!(quantisation.is_none()) {
        Vector::cast_from(weight[(depth * columns + column) as usize])
    } else {
        let quantisation = comptime!(quantisation.unwrap());
        let per_word = comptime!(quantisation.per_word());
        let line = lower_row(depth / per_word, quantisation);
        let words = Vector::<u32, N>::cast_from(weight[(line * columns + column) as usize]);
        let shifted = words >> Vector::new(depth % per_word * comptime!(quantisation.planes().0));
        let mut upper = Vector::<u32, N>::new(0u32);
        if comptime!(upper_bits(quantisation) > 0) {
            let line = upper_row(depth, quantisation);
            let word = Vector::<u32, N>::cast_from(weight[(line * columns + column) as usize]);
            upper = upper_from::<N>(word, depth, quantisation);
        }
        let scales = scale_word::<N>(weight_scales, depth, column, columns, quantisation);
        let mut of_all = Vector::<u32, N>::new(0u32);
        if comptime!(nested(quantisation).is_some()) {
            let nested = comptime!(nested(quantisation).unwrap());
            of_all = super_word::<N>(weight_scales, depth, column, columns, nested);
        }
        let slope = scale::<N>(scales, of_all, depth, quantisation, false);
        slope * level::<N>(shifted, upper, MAGIC.runtime(), 0u32, quantisation)
            + minimum::<N>(scales, of_all, depth, quantisation, false)
    }
}
