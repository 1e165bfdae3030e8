//! Attention of one step: every segment over its own sequence's keys and values, in pieces whose shapes depend on that sequence
//! alone. A row's numbers are then the same to the bit whatever else is in the batch.

use std::ops::Range;

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Tensor, TensorData};
use flora_burn::FloraBackend;
use rayon::prelude::*;

use crate::cache::LayerCache;

/// Heads of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heads {
    /// Query heads, a multiple of the key-value heads.
    pub(crate) queries: usize,
    /// Key-value heads.
    pub(crate) keys: usize,
    /// Numbers of a head.
    pub(crate) size: usize,
}

/// The rows of one segment.
#[derive(Clone, Debug)]
pub(crate) struct SegmentRows {
    /// Its rows in the batch.
    pub(crate) rows: Range<usize>,
    /// The position of the first.
    pub(crate) first_position: usize,
    /// How many of them are a prompt's; they attend together. Each of the others attends by itself, as it did or will when it is
    /// the last token of its sequence.
    pub(crate) prompt_rows: usize,
}

impl SegmentRows {
    /// The runs of rows that attend together, counted from the segment's first.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let (prompt, rows) = (self.prompt_rows, self.rows.len());
        let prompt_piece = (prompt > 0).then_some(0..prompt);
        prompt_piece.into_iter().chain((prompt..rows).map(|row| row..row + 1))
    }
}

/// Queries `[rows, query heads, size]`, keys and values `[rows, key-value heads, size]` of the batch; the keys and values are
/// appended to the segments' caches. The result is `[rows, query heads · size]`.
pub(crate) fn attend<B: FloraBackend>(
    heads: Heads,
    [queries, keys, values]: [Tensor<B, 3>; 3],
    segments: &[SegmentRows],
    caches: &mut [&mut LayerCache<B>],
    block_tokens: usize,
) -> Tensor<B, 2> {
    let one = |(segment, cache): (&SegmentRows, &mut &mut LayerCache<B>)| {
        let rows = |tensor: &Tensor<B, 3>, heads: usize| {
            tensor.clone().slice([segment.rows.clone(), 0..heads, 0..tensor.dims()[2]])
        };
        // [1, heads, tokens, size]
        let by_head = |tensor: Tensor<B, 3>| tensor.swap_dims(0, 1).unsqueeze::<4>();
        let (keys, values) = (by_head(rows(&keys, heads.keys)), by_head(rows(&values, heads.keys)));
        cache.append(keys, values, segment.first_position, block_tokens);
        let queries = rows(&queries, heads.queries);
        let pieces = segment.pieces().filter_map(|piece| {
            let length = segment.first_position + piece.end;
            let alone = piece.len() == 1;
            let queries = queries.clone().slice([piece, 0..heads.queries, 0..heads.size]);
            let held = if alone && B::COPIES_PARTS { length.next_multiple_of(block_tokens) } else { length };
            let (keys, values) = cache.first(held)?;
            Some(if alone {
                token_attention(heads, queries, keys, values, length)
            } else {
                piece_attention(heads, queries, keys, values)
            })
        });
        join(pieces.collect())
    };
    let segments = segments.iter().zip(caches.iter_mut());
    let outputs = if B::CONCURRENT {
        segments.collect::<Vec<_>>().into_par_iter().map(one).collect()
    } else {
        segments.map(one).collect()
    };
    join(outputs)
}

fn join<B: FloraBackend>(mut parts: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) }
}

/// The queries `[1, query heads, size]` of one token, which see the first `length` of the keys `[1, key-value heads, held, size]`.
fn token_attention<B: FloraBackend>(
    Heads { queries: query_heads, keys: key_heads, size }: Heads,
    queries: Tensor<B, 3>,
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
    length: usize,
) -> Tensor<B, 2> {
    let (group, held) = (query_heads / key_heads, keys.dims()[2]);
    let hidden = (length < held).then(|| {
        let hidden: Vec<bool> = (0..group).flat_map(|_| (0..held).map(|at| at >= length)).collect();
        Tensor::from_data(TensorData::new(hidden, [1, 1, group, held]), &keys.device())
    });
    // A key head's queries see the same keys: rows of one product.
    let queries = queries.reshape([1, key_heads, group, size]);
    let options = AttentionModuleOptions::default();
    attention(queries, keys, values, hidden, None, options).reshape([1, query_heads * size])
}

/// Queries `[tokens, query heads, size]`, the last of which is the last of the keys `[1, key-value heads, length, size]`.
fn piece_attention<B: FloraBackend>(
    Heads { queries: query_heads, keys: key_heads, size }: Heads,
    queries: Tensor<B, 3>,
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
) -> Tensor<B, 2> {
    let (tokens, length) = (queries.dims()[0], keys.dims()[2]);
    let group = query_heads / key_heads;
    let options = AttentionModuleOptions { is_causal: true, ..AttentionModuleOptions::default() };
    let for_each_query = |tensor: Tensor<B, 4>| {
        tensor.reshape([1, key_heads, 1, length, size]).expand([1, key_heads, group, length, size]).reshape([
            1,
            query_heads,
            length,
            size,
        ])
    };
    let queries = queries.swap_dims(0, 1).reshape([1, query_heads, tokens, size]);
    let attended = attention(queries, for_each_query(keys), for_each_query(values), None, None, options);
    attended.reshape([query_heads, tokens, size]).swap_dims(0, 1).reshape([tokens, query_heads * size])
}
