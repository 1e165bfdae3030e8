//! Attention in pairs of bf16. A span's scores are made for a tile of rows, turned into weights in floats, and the weights, rounded to
//! bf16, multiply the span's values; sums over spans are floats.
//!
//! All rows of a tile multiply the keys that any of them sees, with weights of 0 where they don't see one. That adds nothing, but for
//! values that aren't finite: rows that come to such a number are computed again one by one, of what each sees alone.

use pulp::Simd;

use crate::decoder::attention::{BLOCKS, SPAN, Task};
use crate::decoder::cache::KEYS;
use crate::decoder::softmax::Softmax;
use crate::kernel::tile_rows;
use crate::layout::{MOST_PIECES, STRIP};
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS};
use crate::pairs::numbers_of;
use crate::pieces::PairedProducts;
use crate::products::Pairs;
use crate::vectorise::vectorised;
use crate::widen::round_all;

/// What a thread computes with. Rows are those of a task or a tile, with room for a tile of the matrix unit after them.
#[derive(Default)]
pub(super) struct Memory {
    /// A query in floats.
    query: Vec<f32>,
    /// In pairs, `[rows, Pairs::padded(size)]`.
    queries: Vec<u32>,
    /// Scores of a span of keys, then their weights, `[rows, SPAN]`.
    scores: Vec<f32>,
    /// The weights in pairs, `[rows, SPAN / 2]`.
    weights: Vec<u32>,
    /// The weighed values of a span, `[rows, pitch]`.
    weighed: Vec<f32>,
    /// Values of a span without those that a row doesn't see, block by block.
    masked: Vec<u32>,
}

/// Whether heads of this size are multiplied so.
pub(super) fn serves(size: usize) -> bool {
    Pairs::padded(size) / Pairs::STEP <= MOST_PIECES
}

/// Pairs of a piece of keys or values.
const PIECE: usize = Pairs::STEP * STRIP;
const _: () = assert!(KEYS == STRIP && KEYS == 2 * Pairs::STEP && BLOCKS <= MOST_PIECES);

impl Memory {
    /// Writes the weighed values of all rows of a task, `[rows, pitch]`, and what is to divide them.
    pub(super) fn run<S: Simd>(
        &mut self,
        simd: S,
        task: &Task<'_>,
        unit: Option<MatrixUnit>,
        sums: &mut [f32],
        softmaxes: &mut [Softmax],
    ) {
        let layout = task.cache.layout();
        let (words, rows) = (Pairs::padded(layout.size), task.rows.len() + UNIT_ROWS);
        self.query.resize(layout.size, 0.0);
        self.queries.resize(rows * words, 0);
        self.scores.resize(UNIT_ROWS * SPAN, 0.0);
        self.weights.resize(UNIT_ROWS * SPAN / 2, 0);
        self.weighed.resize(UNIT_ROWS * layout.pitch(), 0.0);
        let (queries, query) = (&mut self.queries[..task.rows.len() * words], &mut self.query);
        vectorised(
            simd,
            #[inline(always)]
            || {
                for (at, pairs) in queries.chunks_exact_mut(words).enumerate() {
                    task.query(at, query);
                    let (numbers, rest) = numbers_of(pairs).split_at_mut(query.len());
                    round_all(query, numbers);
                    rest.fill(half::bf16::ZERO);
                }
            },
        );
        self.attend(simd, task, unit, false, sums, softmaxes);
        if !sums.iter().fold(true, |finite, sum| finite & sum.is_finite()) {
            self.attend(simd, task, unit, true, sums, softmaxes);
        }
    }

    fn attend<S: Simd>(
        &mut self,
        simd: S,
        task: &Task<'_>,
        unit: Option<MatrixUnit>,
        one_by_one: bool,
        sums: &mut [f32],
        softmaxes: &mut [Softmax],
    ) {
        let layout = task.cache.layout();
        let (pitch, words) = (layout.pitch(), Pairs::padded(layout.size));
        let most = match (one_by_one, unit) {
            (true, _) => 1,
            (false, Some(_)) => UNIT_ROWS,
            (false, None) => tile_rows::<S>(),
        };
        let Memory { queries, scores, weights, weighed, masked, .. } = self;
        sums.fill(0.0);
        softmaxes.fill(Softmax::NONE);
        for (start, span) in task.spans() {
            let mut held: [&[f32]; BLOCKS] = [&[]; BLOCKS];
            held.iter_mut().zip(span).for_each(|(held, block)| *held = task.cache.head_in_pairs(block, task.head));
            for tile in task.tiles(start, most) {
                // Keys from the first that any row sees to the last: whole blocks of them.
                let [first, _] = task.seen(tile.start, start);
                let [_, end] = task.seen(tile.end - 1, start);
                let blocks = first / KEYS..end.div_ceil(KEYS);
                let seen = &held[blocks.clone()];
                let products = PairedProducts {
                    x: bytemuck::cast_slice(&queries[tile.start * words..]),
                    x_pitch: words,
                    rows: tile.len(),
                    strips: seen.len(),
                    steps: words / Pairs::STEP,
                    out: &mut scores[blocks.start * KEYS..],
                    out_pitch: SPAN,
                };
                products.run(
                    simd,
                    unit,
                    #[inline(always)]
                    |block, step| &seen[block][step * PIECE..][..PIECE],
                );

                let rows = scores.chunks_exact_mut(SPAN).zip(weights.chunks_exact_mut(SPAN / 2));
                let rows = rows.zip(&mut softmaxes[tile.clone()]);
                vectorised(
                    simd,
                    #[inline(always)]
                    || {
                        for ((row, ((scores, weights), softmax)), sums) in
                            tile.clone().zip(rows).zip(sums[tile.start * pitch..].chunks_exact_mut(pitch))
                        {
                            let [first, end] = task.seen(row, start);
                            let before = blocks.start * KEYS;
                            let (scores, _) = scores.as_chunks_mut::<KEYS>();
                            let scores = &mut scores[blocks.clone()];
                            let scale = softmax.add::<S>(scores, first - before..end - before);
                            if scale != 1.0 {
                                sums.iter_mut().for_each(|sum| *sum *= scale);
                            }
                            round_all(scores.as_flattened(), numbers_of(&mut weights[..scores.len() * KEYS / 2]));
                        }
                    },
                );

                let own_values = pitch * KEYS / 2;
                if one_by_one {
                    masked.clear();
                    for held in seen {
                        masked.extend_from_slice(bytemuck::cast_slice(&held[layout.keys()..][..own_values]));
                    }
                    hide(masked, own_values, first - blocks.start * KEYS..end - blocks.start * KEYS);
                }
                let masked: &[f32] = bytemuck::cast_slice(masked);
                let products = PairedProducts {
                    x: bytemuck::cast_slice(weights),
                    x_pitch: SPAN / 2,
                    rows: tile.len(),
                    strips: pitch / STRIP,
                    steps: seen.len(),
                    out: weighed,
                    out_pitch: pitch,
                };
                products.run(
                    simd,
                    unit,
                    #[inline(always)]
                    |strip, block| match one_by_one {
                        true => &masked[block * own_values + strip * PIECE..][..PIECE],
                        false => &seen[block][layout.keys() + strip * PIECE..][..PIECE],
                    },
                );
                let rows = tile.start * pitch..tile.end * pitch;
                vectorised(
                    simd,
                    #[inline(always)]
                    || sums[rows].iter_mut().zip(&*weighed).for_each(|(sum, weighed)| *sum += weighed),
                );
            }
        }
    }
}

/// Puts zeros in the places of the tokens that aren't `seen`, counted over all blocks.
fn hide(values: &mut [u32], of_block: usize, seen: std::ops::Range<usize>) {
    for (block, values) in values.chunks_exact_mut(of_block).enumerate() {
        for (row, pairs) in values.chunks_exact_mut(STRIP).enumerate() {
            let first = block * KEYS + 2 * (row % Pairs::STEP);
            let kept = [(first, 0xffff), (first + 1, 0xffff_0000)];
            let mask =
                kept.into_iter().filter(|(token, _)| seen.contains(token)).fold(0, |mask, (_, bits)| mask | bits);
            pairs.iter_mut().for_each(|pair| *pair &= mask);
        }
    }
}
