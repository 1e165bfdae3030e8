//! Attention of one step: every segment over its own sequence's keys and values, in pieces whose shapes depend on that sequence
//! alone. A row's numbers are then the same to the bit whatever else is in the batch.

use std::ops::Range;

use burn::tensor::Tensor;
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use flora_burn::FloraBackend;
use flora_host::decoder::Heads;

use crate::on_burn::cache::LayerCache;
use crate::operations::SegmentRows;

/// The runs of rows that attend together, counted from the segment's first.
fn pieces(segment: &SegmentRows) -> impl Iterator<Item = Range<usize>> {
    let (prompt, rows) = (segment.prompt_rows, segment.rows.len());
    let prompt_piece = (prompt > 0).then_some(0..prompt);
    prompt_piece.into_iter().chain((prompt..rows).map(|row| row..row + 1))
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
        let pieces = pieces(segment).filter_map(|piece| {
            let length = segment.first_position + piece.end;
            let alone = piece.len() == 1;
            let queries = queries.clone().slice([piece, 0..heads.queries, 0..heads.size]);
            let (keys, values) = cache.first(length)?;
            Some(if alone {
                token_attention(heads, queries, keys, values)
            } else {
                piece_attention(heads, queries, keys, values)
            })
        });
        join(pieces.collect())
    };
    join(segments.iter().zip(caches.iter_mut()).map(one).collect())
}

fn join<B: FloraBackend>(mut parts: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    if parts.len() == 1 { parts.swap_remove(0) } else { Tensor::cat(parts, 0) }
}

/// The queries `[1, query heads, size]` of one token, which see all keys `[1, key-value heads, length, size]`.
fn token_attention<B: FloraBackend>(
    Heads { queries: query_heads, keys: key_heads, size }: Heads,
    queries: Tensor<B, 3>,
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
) -> Tensor<B, 2> {
    // A key head's queries see the same keys: rows of one product.
    let queries = queries.reshape([1, key_heads, query_heads / key_heads, size]);
    let options = AttentionModuleOptions::default();
    attention(queries, keys, values, None, None, options).reshape([1, query_heads * size])
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
