//! The second half of attention where the splits of a query had a cube each: folds them in rising order, by what a cube that has all of
//! them does.
//!
//! Bytes: the splits once, y once.

use cubecl::prelude::*;

use super::attention::{HIDDEN, fold, fold_sums};
use super::tables::merged_query;

/// Folds the splits of queries that had a cube for each, one unit a vector of a query's output. Tables: from word `queries` on which,
/// `query_count` of them; the rest as [`super::attention::attend`].
#[cube(launch_unchecked)]
pub(crate) fn merge_splits<E: Float, N: Size>(
    partial: &Array<Vector<f32, N>>,
    softmax: &Array<f32>,
    tables: &Array<u32>,
    y: &mut Array<Vector<E, N>>,
    queries: u32,
    query_count: u32,
    key_heads: u32,
    group: u32,
    size: u32,
    #[define(E)] _element: StorageType,
) {
    let lanes = N::value();
    let line = size / comptime!(lanes as u32);
    let at = ABSOLUTE_POS as u32;
    if at < query_count * key_heads * line {
        let column = at % line;
        let head = at / line % key_heads;
        let query = queries + at / line / key_heads * merged_query::WORDS;
        let first = merged_query::partial(tables, query);
        let mut all_largest = HIDDEN.runtime();
        let mut all_sum = 0.0f32.runtime();
        let mut all = Vector::<f32, N>::new(0.0);
        for split in 0..merged_query::splits(tables, query) {
            let part = (first + split) * key_heads + head;
            let (next, next_sum, before, now) =
                fold_sums(all_largest, all_sum, softmax[(2 * part) as usize], softmax[(2 * part + 1) as usize]);
            all = fold(all, before, partial[(part * line + column) as usize], now);
            all_largest = next;
            all_sum = next_sum;
        }
        let row = merged_query::row(tables, query);
        let own_head = head * group + merged_query::head(tables, query);
        let output = (row * (group * key_heads) + own_head) * line + column;
        y[output as usize] = Vector::cast_from(all / Vector::new(all_sum));
    }
}
