//! Attention of all sequences of a step in one launch, over keys and values where a pool has them.
//!
//! A cube has a *tile* of queries of one sequence and one key-value head: those of neighbouring rows and of all query heads that share
//! it, so that a key is loaded once for all of them. It goes through the keys in blocks of the pool; the blocks of [`SPLIT`] positions
//! make a *split*, over which softmax is made on the fly in rising order of positions. Splits are then folded into one another in
//! rising order: by the cube that has made all of them, or by [`super::merge_splits`], where each had a cube of its own. Both are the same
//! operations, and a key that a row doesn't see is an exact nothing. So a row's bits depend on its sequence up to itself alone: not on
//! its tile, on how a prompt is cut, or on whether it was a prompt's at all.
//!
//! MACs: 2·size for each query and key that it sees, in f32 by units. Bytes: a block's keys and values once for each tile; of a row
//! that is decoded alone, all of them once for each key-value head, which is the least there is.

use cubecl::prelude::*;
use flora_runtime::decoding::BLOCK_TOKENS;

use super::tables::attention_item;

/// Keys of a block.
const KEYS: u32 = BLOCK_TOKENS as u32;
/// Positions whose weights are summed apart, a multiple of a block. Fixed, because a row's bits depend on it.
pub(crate) const SPLIT: u32 = 8 * KEYS;
/// Units of a cube.
pub(crate) const UNITS: u32 = 128;
/// Units that share the softmax of a query.
const PARTS: u32 = 4;
/// Numbers between lines of a staged tile, so that neighbouring lines lie in other banks.
const PAD: u32 = 16;
/// The score of a key that a query doesn't see. No sum of products that a model makes is as small.
pub(crate) const HIDDEN: f32 = -3.0e38;

/// The comptime key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionBlueprint {
    /// Queries of a tile: a power of two, from 4 to 32.
    pub queries: u32,
    /// Numbers of a head.
    pub size: u32,
    /// Numbers of a key or value that are staged at a time; divides `size`.
    pub chunk: u32,
    /// Whether a cube goes through all splits. Otherwise it has one, and writes what is to be merged where there are more.
    pub folds: bool,
    /// Whether queries are turned.
    pub rotates: bool,
}

impl AttentionBlueprint {
    /// Units along the keys of a block, and scores of a unit along queries and keys.
    fn scores(self) -> (u32, u32, u32) {
        let of_unit = (self.queries * KEYS / UNITS).max(1);
        let along_queries = if of_unit >= 8 { 2 } else { 1 };
        let along_keys = of_unit / along_queries;
        (KEYS / along_keys, along_queries, along_keys)
    }

    /// Queries whose sums a unit has, and how many times as many vectors of a chunk as there are units.
    fn sums(self, lanes: u32) -> (u32, u32) {
        let vectors = self.chunk / lanes;
        let most = (self.queries * vectors / UNITS).clamp(1, 4);
        let queries = if most >= 4 {
            4
        } else if most >= 2 {
            2
        } else {
            1
        };
        (queries, (self.queries / queries * vectors).div_ceil(UNITS))
    }

    /// Bytes of shared memory, where keys and values are staged by elements of so many bytes.
    pub(crate) fn shared_bytes(self, element: u64) -> usize {
        let queries = self.queries * (self.size + PAD);
        let weights = self.queries * (KEYS + PARTS);
        let floats = queries + weights + self.queries * (PARTS + 2);
        4 * floats as usize + KEYS as usize * (self.chunk + PAD) as usize * element as usize
    }
}

/// Where the parts of attention's tables start, in words, and what its arrays are.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct AttentionLayout {
    /// First word of the tiles.
    pub(crate) items: u32,
    /// Key-value heads.
    pub(crate) key_heads: u32,
    /// Query heads of a key-value head.
    pub(crate) group: u32,
    /// Numbers of a row of queries, and the first of them.
    pub(crate) query_width: u32,
    pub(crate) query_first: u32,
    /// Tokens that a token sees.
    pub(crate) window: u32,
    /// Vectors of a chunk: as the blueprint says, in a form that keeps CUDA's compiler from unrolling a loop over them into spills.
    pub(crate) vectors: u32,
}

/// What the units of a cube know of their tile.
#[derive(CubeType, Clone, Copy)]
struct TilePlace {
    /// The first row of the sequence.
    first_row: u32,
    /// The first query of the tile: row · group + head.
    first_query: u32,
    /// Queries.
    count: u32,
    /// The position of the sequence's first row.
    first_position: u32,
    /// The key-value head.
    head: u32,
}

/// queries `[rows, query_width]`, rotary `[rows, 2, size / 2]`, pool `[blocks, 2, key_heads, KEYS, size]`, tables: blocks of the
/// sequences, tiles; y `[rows, query heads, size]`, partial `[queries to merge, splits, key_heads, size]`, softmax as partial, with the
/// largest score and the sum of a split in place of `size`.
#[cube(launch_unchecked)]
pub(crate) fn attend<E: Float, N: Size>(
    queries: &Array<E>,
    rotary: &Array<f32>,
    pool: &Array<Vector<E, N>>,
    tables: &Array<u32>,
    y: &mut Array<Vector<E, N>>,
    partial: &mut Array<Vector<f32, N>>,
    softmax: &mut Array<f32>,
    layout: AttentionLayout,
    #[comptime] blueprint: AttentionBlueprint,
    #[define(E)] _element: StorageType,
) {
    let lanes = N::value();
    let lanes = comptime!(lanes as u32);
    let query_pitch = comptime!((blueprint.size + PAD) / lanes);
    let key_pitch = comptime!((blueprint.chunk + PAD) / lanes);
    let mut staged_queries = SharedMemory::<Vector<f32, N>>::new(comptime!((blueprint.queries * query_pitch) as usize));
    let mut staged = SharedMemory::<Vector<E, N>>::new(comptime!((KEYS * key_pitch) as usize));
    let mut weights = SharedMemory::<f32>::new(comptime!((blueprint.queries * (KEYS + PARTS)) as usize));
    let mut exchanged = SharedMemory::<f32>::new(comptime!((blueprint.queries * PARTS) as usize));
    let mut corrections = SharedMemory::<f32>::new(comptime!((2 * blueprint.queries) as usize));

    let item = layout.items + CUBE_POS_X * attention_item::WORDS;
    let place = TilePlace {
        first_row: attention_item::first_row(tables, item),
        first_query: attention_item::first_query(tables, item),
        count: attention_item::queries(tables, item),
        first_position: attention_item::first_position(tables, item),
        head: CUBE_POS_Y,
    };
    let blocks = attention_item::blocks(tables, item);
    let end = attention_item::end(tables, item);
    stage_queries::<E, N>(queries, rotary, &mut staged_queries, place, layout, blueprint);

    let (sum_queries, passes) = comptime!(blueprint.sums(lanes));
    let chunks = comptime!(blueprint.size / blueprint.chunk);
    let sum_count = comptime!((chunks * passes * sum_queries) as usize);
    let folded_count = comptime!(if blueprint.folds { sum_count } else { 1 });
    let mut sums = Array::<Vector<f32, N>>::new(sum_count);
    let mut folded = Array::<Vector<f32, N>>::new(folded_count);
    #[unroll]
    for at in 0..folded_count {
        folded[at] = Vector::new(0.0);
    }
    // Of the query whose softmax the unit shares.
    let part_of_query = UNIT_POS_X % PARTS;
    let mut all_largest = HIDDEN.runtime();
    let mut all_sum = 0.0f32.runtime();
    let mut largest = HIDDEN.runtime();
    let mut sum = 0.0f32.runtime();

    let mut start = attention_item::start(tables, item);
    while start < end {
        let split_end = min((start / SPLIT + 1) * SPLIT, end);
        largest = HIDDEN;
        sum = 0.0f32;
        #[unroll]
        for at in 0..sum_count {
            sums[at] = Vector::new(0.0);
        }
        while start < split_end {
            let block = tables[(blocks + start / KEYS) as usize] * 2;
            score::<E, N>(
                pool,
                &staged_queries,
                &mut staged,
                &mut weights,
                place,
                layout,
                block,
                start,
                end,
                blueprint,
            );
            // The softmax of the block: units of one query share its keys.
            let query = UNIT_POS_X / PARTS;
            let line = query * comptime!(KEYS + PARTS) + UNIT_POS_X % PARTS * comptime!(KEYS / PARTS);
            if query < comptime!(blueprint.queries) {
                let mut own = HIDDEN.runtime();
                #[unroll]
                for key in 0..comptime!(KEYS / PARTS) {
                    own = max(own, weights[(line + key) as usize]);
                }
                exchanged[UNIT_POS_X as usize] = own;
            }
            sync_cube();
            if query < comptime!(blueprint.queries) {
                let mut next = largest;
                #[unroll]
                for part in 0..PARTS {
                    next = max(next, exchanged[(query * PARTS + part) as usize]);
                }
                let correction = f32::exp(largest - next);
                sum *= correction;
                #[unroll]
                for key in 0..comptime!(KEYS / PARTS) {
                    let value = weights[(line + key) as usize];
                    // Not the exponential of a difference, which would be 1 where no key is seen.
                    let weight = select(value == HIDDEN, 0.0f32, f32::exp(value - next));
                    sum += weight;
                    weights[(line + key) as usize] = weight;
                }
                largest = next;
                if part_of_query == 0 {
                    corrections[query as usize] = correction;
                }
            }
            add_values::<E, N>(
                pool,
                &mut staged,
                &weights,
                &corrections,
                &mut sums,
                layout,
                place,
                block,
                start,
                end,
                blueprint,
            );
            start += KEYS;
        }
        // The sum of the split: parts in a fixed order.
        let query = UNIT_POS_X / PARTS;
        if query < comptime!(blueprint.queries) {
            exchanged[UNIT_POS_X as usize] = sum;
        }
        sync_cube();
        if query < comptime!(blueprint.queries) {
            let at = (query * PARTS) as usize;
            sum = (exchanged[at] + exchanged[at + 1]) + (exchanged[at + 2] + exchanged[at + 3]);
        }
        if comptime!(blueprint.folds) {
            if query < comptime!(blueprint.queries) {
                let (next, next_sum, before, now) = fold_sums(all_largest, all_sum, largest, sum);
                all_largest = next;
                all_sum = next_sum;
                if part_of_query == 0 {
                    corrections[(2 * query) as usize] = before;
                    corrections[(2 * query + 1) as usize] = now;
                }
            }
            sync_cube();
            #[unroll]
            for pass in 0..passes {
                let task = UNIT_POS_X + pass * UNITS;
                let first = first_query(task, lanes, sum_queries, blueprint);
                #[unroll]
                for own in 0..sum_queries {
                    let before = corrections[(2 * (first + own)) as usize];
                    let now = corrections[(2 * (first + own) + 1) as usize];
                    #[unroll]
                    for chunk in 0..chunks {
                        let at = comptime!(((chunk * passes + pass) * sum_queries + own) as usize);
                        folded[at] = fold(folded[at], before, sums[at], now);
                    }
                }
            }
            sync_cube();
        }
    }

    // Sums and the largest score where all units find them.
    let query = UNIT_POS_X / PARTS;
    if query < comptime!(blueprint.queries) && part_of_query == 0 {
        if comptime!(blueprint.folds) {
            corrections[(2 * query) as usize] = all_largest;
            corrections[(2 * query + 1) as usize] = all_sum;
        } else {
            corrections[(2 * query) as usize] = largest;
            corrections[(2 * query + 1) as usize] = sum;
        }
    }
    sync_cube();
    let splits = attention_item::splits(tables, item);
    let first_partial = attention_item::partial(tables, item);
    let split = attention_item::split(tables, item);
    #[unroll]
    for pass in 0..passes {
        let task = UNIT_POS_X + pass * UNITS;
        let first = first_query(task, lanes, sum_queries, blueprint);
        let column = task % comptime!(blueprint.chunk / lanes);
        #[unroll]
        for own in 0..sum_queries {
            let query = first + own;
            let is_own = task < comptime!(blueprint.queries / sum_queries * (blueprint.chunk / lanes));
            if is_own && query < place.count {
                let largest = corrections[(2 * query) as usize];
                let sum = corrections[(2 * query + 1) as usize];
                let (row, head) = row_and_head(place, layout, query);
                let line = (row * (layout.group * layout.key_heads) + head) * comptime!(blueprint.size / lanes);
                let part = (first_partial + query * splits + split) * layout.key_heads + place.head;
                #[unroll]
                for chunk in 0..chunks {
                    let at = comptime!(((chunk * passes + pass) * sum_queries + own) as usize);
                    let own_column = column + comptime!(chunk * blueprint.chunk / lanes);
                    if comptime!(blueprint.folds) {
                        y[(line + own_column) as usize] = Vector::cast_from(folded[at] / Vector::new(sum));
                    } else if splits == 1 {
                        let only = fold(Vector::<f32, N>::new(0.0), 0.0f32, sums[at], 1.0f32);
                        y[(line + own_column) as usize] = Vector::cast_from(only / Vector::new(sum));
                    } else {
                        partial[(part * comptime!(blueprint.size / lanes) + own_column) as usize] = sums[at];
                        if column == 0 {
                            softmax[(2 * part) as usize] = largest;
                            softmax[(2 * part + 1) as usize] = sum;
                        }
                    }
                }
            }
        }
    }
}

/// The largest score and the sum of two runs of keys, and by what the sums of either are multiplied.
#[cube]
pub(crate) fn fold_sums(all_largest: f32, all_sum: f32, largest: f32, sum: f32) -> (f32, f32, f32, f32) {
    let next = max(all_largest, largest);
    let before = f32::exp(all_largest - next);
    let now = f32::exp(largest - next);
    (next, fma(sum, now, all_sum * before), before, now)
}

/// The weighted values of two runs of keys.
#[cube]
pub(crate) fn fold<N: Size>(all: Vector<f32, N>, before: f32, sums: Vector<f32, N>, now: f32) -> Vector<f32, N> {
    fma(sums, Vector::new(now), all * Vector::new(before))
}

/// The row of the batch and the query head of a query of a tile.
#[cube]
fn row_and_head(place: TilePlace, layout: AttentionLayout, query: u32) -> (u32, u32) {
    let of_sequence = place.first_query + query;
    (place.first_row + of_sequence / layout.group, place.head * layout.group + of_sequence % layout.group)
}

/// The first query of those whose sums a unit has. Where there are more units than sums, some have those of another, and write none.
#[cube]
fn first_query(
    task: u32,
    #[comptime] lanes: u32,
    #[comptime] sum_queries: u32,
    #[comptime] blueprint: AttentionBlueprint,
) -> u32 {
    task / comptime!(blueprint.chunk / lanes) % comptime!(blueprint.queries / sum_queries) * sum_queries
}

/// Queries in f32, turned and divided by √size; zeros beyond the last.
#[cube]
fn stage_queries<E: Float, N: Size>(
    queries: &Array<E>,
    rotary: &Array<f32>,
    staged: &mut SharedMemory<Vector<f32, N>>,
    place: TilePlace,
    layout: AttentionLayout,
    #[comptime] blueprint: AttentionBlueprint,
) {
    let lanes = N::value();
    let lanes = comptime!(lanes as u32);
    let line = comptime!(blueprint.size / lanes);
    let scale = comptime!(1.0 / (blueprint.size as f32).sqrt());
    let mut at = UNIT_POS_X;
    while at < comptime!(blueprint.queries * line) {
        let query = at / line;
        let mut value = Vector::<f32, N>::new(0.0);
        if query < place.count {
            let (row, head) = row_and_head(place, layout, query);
            let first = row * layout.query_width + layout.query_first + head * blueprint.size;
            #[unroll]
            for lane in 0..lanes {
                let number = at % line * lanes + lane;
                let turned = turned::<E>(queries, rotary, first, row, number, blueprint.size, blueprint.rotates);
                value[lane as usize] = turned * scale;
            }
        }
        staged[(query * comptime!((blueprint.size + PAD) / lanes) + at % line) as usize] = value;
        at += UNITS;
    }
}

/// Number `number` of the head whose first number is `first`, turned by its row's angles: (a, b) becomes (a · cos − b · sin,
/// b · cos + a · sin).
#[cube]
pub(crate) fn turned<E: Float>(
    x: &Array<E>,
    rotary: &Array<f32>,
    first: u32,
    row: u32,
    number: u32,
    #[comptime] size: u32,
    #[comptime] rotates: bool,
) -> f32 {
    let mut value = f32::cast_from(x[(first + number) as usize]);
    if comptime!(rotates) {
        let pairs = comptime!(size / 2);
        let pair = number % pairs;
        let cosine = rotary[(row * size + pair) as usize];
        let sine = rotary[(row * size + pairs + pair) as usize];
        let is_second = number >= pairs;
        let partner = f32::cast_from(x[(first + select(is_second, pair, pair + pairs)) as usize]);
        value = fma(partner, select(is_second, sine, -sine), value * cosine);
    }
    value
}

/// Numbers `chunk` of the keys or values of a block, `[KEYS, chunk + PAD]`; zeros of positions that aren't the sequence's, because
/// what lies there is anything.
#[cube]
fn stage_block<E: Float, N: Size>(
    pool: &Array<Vector<E, N>>,
    staged: &mut SharedMemory<Vector<E, N>>,
    first: u32,
    keys: u32,
    #[comptime] chunk: u32,
    #[comptime] blueprint: AttentionBlueprint,
) {
    let lanes = N::value();
    let lanes = comptime!(lanes as u32);
    let line = comptime!(blueprint.chunk / lanes);
    let mut at = UNIT_POS_X;
    while at < comptime!(KEYS * line) {
        let key = at / line;
        let mut value = Vector::<E, N>::new(E::new(0.0));
        if key < keys {
            let from = (first + key) * comptime!(blueprint.size / lanes) + comptime!(chunk * line) + at % line;
            value = pool[from as usize];
        }
        staged[(key * comptime!((blueprint.chunk + PAD) / lanes) + at % line) as usize] = value;
        at += UNITS;
    }
}

/// The products of a tile's queries and a block's keys, `[queries, KEYS + PARTS]`; HIDDEN where a query doesn't see a key.
#[cube]
fn score<E: Float, N: Size>(
    pool: &Array<Vector<E, N>>,
    queries: &SharedMemory<Vector<f32, N>>,
    staged: &mut SharedMemory<Vector<E, N>>,
    scores: &mut SharedMemory<f32>,
    place: TilePlace,
    layout: AttentionLayout,
    block: u32,
    start: u32,
    end: u32,
    #[comptime] blueprint: AttentionBlueprint,
) {
    let lanes = N::value();
    let lanes = comptime!(lanes as u32);
    let (across, along_queries, along_keys) = comptime!(blueprint.scores());
    let query_pitch = comptime!((blueprint.size + PAD) / lanes);
    let key_pitch = comptime!((blueprint.chunk + PAD) / lanes);
    let first_query = UNIT_POS_X / across * along_queries;
    let first_key = UNIT_POS_X % across;
    let line = comptime!(blueprint.chunk / lanes);
    let mut products = Array::<f32>::new(comptime!((along_queries * along_keys) as usize));
    #[unroll]
    for at in 0..comptime!((along_queries * along_keys) as usize) {
        products[at] = 0.0f32;
    }
    let first = (block * layout.key_heads + place.head) * KEYS;
    #[unroll]
    for chunk in 0..comptime!(blueprint.size / blueprint.chunk) {
        // Whoever reads what was staged before has to be done.
        sync_cube();
        stage_block::<E, N>(pool, staged, first, end - start, chunk, blueprint);
        sync_cube();
        for step in 0..layout.vectors {
            let mut own = Array::<Vector<f32, N>>::new(comptime!(along_queries as usize));
            #[unroll]
            for query in 0..along_queries {
                let at = (first_query + query) * query_pitch + comptime!(chunk * line) + step;
                own[query as usize] = queries[at as usize];
            }
            #[unroll]
            for key in 0..along_keys {
                let at = (first_key + comptime!(key * across)) * key_pitch + step;
                let value = Vector::<f32, N>::cast_from(staged[at as usize]);
                #[unroll]
                for query in 0..along_queries {
                    let at = comptime!((query * along_keys + key) as usize);
                    let mut product = products[at];
                    #[unroll]
                    for lane in 0..comptime!(lanes as usize) {
                        product = fma(own[query as usize][lane], value[lane], product);
                    }
                    products[at] = product;
                }
            }
        }
    }
    #[unroll]
    for query in 0..along_queries {
        let own = first_query + query;
        let position = place.first_position + (place.first_query + own) / layout.group;
        #[unroll]
        for key in 0..along_keys {
            let own_key = first_key + comptime!(key * across);
            let at = start + own_key;
            let mut seen = own < place.count && at <= position;
            if seen {
                seen = position - at < layout.window;
            }
            let product = products[comptime!((query * along_keys + key) as usize)];
            scores[(own * comptime!(KEYS + PARTS) + own_key) as usize] = select(seen, product, HIDDEN);
        }
    }
    sync_cube();
}

/// sums · correction + weights @ values
#[cube]
fn add_values<E: Float, N: Size>(
    pool: &Array<Vector<E, N>>,
    staged: &mut SharedMemory<Vector<E, N>>,
    weights: &SharedMemory<f32>,
    corrections: &SharedMemory<f32>,
    sums: &mut Array<Vector<f32, N>>,
    layout: AttentionLayout,
    place: TilePlace,
    block: u32,
    start: u32,
    end: u32,
    #[comptime] blueprint: AttentionBlueprint,
) {
    let lanes = N::value();
    let lanes = comptime!(lanes as u32);
    let (sum_queries, passes) = comptime!(blueprint.sums(lanes));
    let pitch = comptime!((blueprint.chunk + PAD) / lanes);
    let line = comptime!(blueprint.chunk / lanes);
    let first_value = ((block + 1) * layout.key_heads + place.head) * KEYS;
    #[unroll]
    for chunk in 0..comptime!(blueprint.size / blueprint.chunk) {
        if comptime!(chunk > 0) {
            sync_cube();
        }
        // Keys were read before the last barrier.
        stage_block::<E, N>(pool, staged, first_value, end - start, chunk, blueprint);
        sync_cube();
        #[unroll]
        for pass in 0..passes {
            let task = UNIT_POS_X + pass * UNITS;
            let first = first_query(task, lanes, sum_queries, blueprint);
            let column = task % line;
            #[unroll]
            for own in 0..sum_queries {
                let at = comptime!(((chunk * passes + pass) * sum_queries + own) as usize);
                sums[at] = sums[at] * Vector::new(corrections[(first + own) as usize]);
            }
            // All of a block: see `AttentionLayout::vectors`.
            let keys = CUBE_DIM / comptime!(UNITS / KEYS);
            for key in 0..keys {
                let value = Vector::<f32, N>::cast_from(staged[(key * pitch + column) as usize]);
                #[unroll]
                for own in 0..sum_queries {
                    let at = comptime!(((chunk * passes + pass) * sum_queries + own) as usize);
                    let weight = weights[((first + own) * comptime!(KEYS + PARTS) + key) as usize];
                    // A value that isn't seen may be anything, and times 0 it would be NaN where it is no number.
                    if weight != 0.0f32 {
                        sums[at] = fma(Vector::new(weight), value, sums[at]);
                    }
                }
            }
        }
    }
}
