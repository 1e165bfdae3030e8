//! Attention of one step: every segment over its own sequence's keys and values, in pieces whose shapes depend on that sequence
//! alone. A row's numbers are then the same to the bit whatever else is in the batch.

use std::ops::Range;

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Int, Tensor, TensorData};
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

/// How a layer attends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) heads: Heads,
    /// How many tokens a token sees, itself and those before it; `None`: all.
    pub(crate) window: Option<usize>,
    /// Tokens by which caches grow.
    pub(crate) block_tokens: usize,
}

impl Sizes {
    /// The first position that a token at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Queries `[rows, query heads, size]`, keys and values `[rows, key-value heads, size]` of the batch; the keys and values are
/// appended to the segments' caches. The result is `[rows, query heads · size]`.
pub(crate) fn attend<B: FloraBackend>(
    sizes: Sizes,
    [queries, keys, values]: [Tensor<B, 3>; 3],
    segments: &[SegmentRows],
    caches: &mut [&mut LayerCache<B>],
) -> Tensor<B, 2> {
    let heads = sizes.heads;
    let one = |(segment, cache): (&SegmentRows, &mut &mut LayerCache<B>)| {
        let rows = |tensor: &Tensor<B, 3>, heads: usize| {
            tensor.clone().slice([segment.rows.clone(), 0..heads, 0..tensor.dims()[2]])
        };
        // [1, heads, tokens, size]
        let by_head = |tensor: Tensor<B, 3>| tensor.swap_dims(0, 1).unsqueeze::<4>();
        let (keys, values) = (by_head(rows(&keys, heads.keys)), by_head(rows(&values, heads.keys)));
        cache.append(keys, values, segment.first_position, sizes.block_tokens);
        let queries = rows(&queries, heads.queries);
        let device = queries.device();
        let pieces = pieces(segment).filter_map(|piece| {
            let positions = segment.first_position + piece.start..segment.first_position + piece.end;
            let queries = queries.clone().slice([piece, 0..heads.queries, 0..heads.size]);
            let (keys, values) = cache.at(sizes.first_key(positions.start)..positions.end)?;
            Some(if positions.len() == 1 {
                token_attention(heads, queries, keys, values)
            } else {
                piece_attention(heads, queries, keys, values, out_of_window(sizes, positions, &device))
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

/// Which keys the tokens at these positions don't see though they come before them, `[1, query heads, tokens, keys]`, the keys being
/// those that the first token sees and all after; `None` where there are none.
fn out_of_window<B: FloraBackend>(
    sizes: Sizes,
    positions: Range<usize>,
    device: &B::Device,
) -> Option<Tensor<B, 4, Bool>> {
    let (first, last) = (sizes.first_key(positions.start), sizes.first_key(positions.end - 1));
    if first == last {
        return None;
    }
    // The first key that each token sees, counted from the first of all; before the window is full it stays 0.
    let seen: Vec<i32> = positions.clone().map(|position| (sizes.first_key(position) - first) as i32).collect();
    let (tokens, keys) = (positions.len(), positions.end - first);
    let seen = Tensor::<B, 1, Int>::from_data(TensorData::from(&seen[..]), device).reshape([tokens, 1]);
    let keys_at = Tensor::<B, 1, Int>::arange(0..keys as i64, device).reshape([1, keys]);
    let hidden = keys_at.expand([tokens, keys]).lower(seen.expand([tokens, keys]));
    Some(hidden.reshape([1, 1, tokens, keys]).expand([1, sizes.heads.queries, tokens, keys]))
}

/// Queries `[tokens, query heads, size]`, the last of which is the last of the keys `[1, key-value heads, length, size]`; they don't
/// see what `hidden` says beside what comes after them.
fn piece_attention<B: FloraBackend>(
    Heads { queries: query_heads, keys: key_heads, size }: Heads,
    queries: Tensor<B, 3>,
    keys: Tensor<B, 4>,
    values: Tensor<B, 4>,
    hidden: Option<Tensor<B, 4, Bool>>,
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
    let attended = attention(queries, for_each_query(keys), for_each_query(values), hidden, None, options);
    attended.reshape([query_heads, tokens, size]).swap_dims(0, 1).reshape([tokens, query_heads * size])
}
