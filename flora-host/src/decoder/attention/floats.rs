//! Attention in floats: a tile's rows go through a span of keys with their scores and sums in registers.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::decoder::attention::{BLOCKS, SPAN, Task};
use crate::decoder::cache::KEYS;
use crate::decoder::softmax::Softmax;
use crate::kernel::{MOST_TILE_ROWS, Operand, accumulate, load, store, tile_columns, tile_rows, with_rows};
use crate::layout::STRIP;
use crate::products::Floats;
use crate::vectorise::vectorised;

/// What a thread computes with.
#[derive(Default)]
pub(super) struct Memory {
    /// `[rows, size]`
    queries: Vec<f32>,
    /// Scores of a span of keys, then their weights, `[rows, SPAN]`.
    scores: Vec<f32>,
    /// A span's keys and values, where they aren't f32.
    wide: [Vec<f32>; BLOCKS],
}

impl Memory {
    /// Writes the weighed values of all rows of a task, `[rows, pitch]`, and what is to divide them.
    pub(super) fn run<S: Simd>(&mut self, simd: S, task: &Task<'_>, sums: &mut [f32], softmaxes: &mut [Softmax]) {
        let layout = task.cache.layout();
        let (size, pitch, rows) = (layout.size, layout.pitch(), task.rows.len());
        let Memory { queries, scores, wide } = self;
        queries.resize(rows * size, 0.0);
        scores.resize(rows * SPAN, 0.0);
        sums.fill(0.0);
        softmaxes.fill(Softmax::NONE);
        vectorised(
            simd,
            #[inline(always)]
            || queries.chunks_exact_mut(size).enumerate().for_each(|(at, query)| task.query(at, query)),
        );
        for (start, blocks) in task.spans() {
            let mut held: [&[f32]; BLOCKS] = [&[]; BLOCKS];
            for ((held, block), wide) in held.iter_mut().zip(blocks.clone()).zip(&mut *wide) {
                *held = task.cache.head(simd, block, task.head, wide);
            }
            let held = &held[..blocks.len()];
            for tile in task.tiles(start, tile_rows::<S>()) {
                let mut bounds = [[0; 2]; MOST_TILE_ROWS];
                let bounds = &mut bounds[..tile.len()];
                bounds.iter_mut().zip(tile.clone()).for_each(|(bounds, row)| *bounds = task.seen(row, start));
                let work = Tile {
                    seen: bounds,
                    queries: &queries[tile.start * size..tile.end * size],
                    scores: &mut scores[tile.start * SPAN..tile.end * SPAN],
                    sums: &mut sums[tile.start * pitch..tile.end * pitch],
                    softmaxes: &mut softmaxes[tile],
                    held,
                    size,
                    pitch,
                };
                work.run(simd);
            }
        }
    }
}

/// A span of keys and values for a tile of rows.
struct Tile<'a> {
    /// The first of the span's keys that each row sees, and the end of those that it does, both rising; it sees at least one.
    seen: &'a [[usize; 2]],
    /// `[rows, size]`
    queries: &'a [f32],
    /// `[rows, SPAN]`
    scores: &'a mut [f32],
    /// `[rows, pitch]`
    sums: &'a mut [f32],
    /// `[rows]`
    softmaxes: &'a mut [Softmax],
    /// Block by block, keys `[size, KEYS]` and values `[strips, KEYS, STRIP]`.
    held: &'a [&'a [f32]],
    size: usize,
    pitch: usize,
}

impl Tile<'_> {
    /// Runs it.
    ///
    /// # Panics
    /// Where a slice is shorter than its extents say, or the tile has too many rows.
    fn run<S: Simd>(self, simd: S) {
        let rows = self.seen.len();
        assert!(rows <= tile_rows::<S>() && self.softmaxes.len() == rows);
        assert!(self.queries.len() == rows * self.size && self.pitch.is_multiple_of(tile_columns::<S>()));
        assert!(self.scores.len() == rows * SPAN && self.sums.len() == rows * self.pitch);
        assert!(self.held.iter().all(|held| held.len() == (self.size + self.pitch) * KEYS));
        assert!(self.seen.iter().all(|[first, end]| first < end && *end <= self.held.len() * KEYS));
        assert!(self.seen.is_sorted_by(|one, next| one[0] <= next[0] && one[1] <= next[1]));
        with_rows!(rows, attend, simd, self)
    }
}

#[inline(always)]
fn attend<S: Simd, const ROWS: usize>(simd: S, tile: Tile<'_>) {
    struct Work<'a, const ROWS: usize>(Tile<'a>);
    impl<const ROWS: usize> WithSimd for Work<'_, ROWS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Tile { seen, queries, scores, sums, softmaxes, held, size, pitch } = self.0;
            // Keys from the first that any row sees to the last: whole blocks of them.
            let blocks = seen[0][0] / KEYS..seen[ROWS - 1][1].div_ceil(KEYS);
            for block in blocks.clone() {
                for column in (0..KEYS).step_by(tile_columns::<S>()) {
                    // SAFETY: `Tile::run` has compared every extent with its slice.
                    unsafe {
                        let zero = [[simd.splat_f32s(0.0); 2]; ROWS];
                        let right = Operand { values: held.get_unchecked(block).as_ptr().add(column), pitch: KEYS };
                        let own =
                            accumulate::<S, Floats, ROWS, false>(simd, zero, queries.as_ptr(), size, 1, right, size);
                        for (row, own) in own.into_iter().enumerate() {
                            let at = scores.as_mut_ptr().add(row * SPAN + block * KEYS + column);
                            store::<S>(at, own[0]);
                            store::<S>(at.add(S::F32_LANES), own[1]);
                        }
                    }
                }
            }
            let (scores, _) = scores.as_chunks_mut::<KEYS>();
            let rows = scores.chunks_exact_mut(BLOCKS).zip(&mut *softmaxes).zip(seen).zip(sums.chunks_exact_mut(pitch));
            for (((scores, softmax), [first, end]), sums) in rows {
                let before = blocks.start * KEYS;
                let scale = softmax.add::<S>(&mut scores[blocks.clone()], *first - before..*end - before);
                if scale != 1.0 {
                    sums.iter_mut().for_each(|sum| *sum *= scale);
                }
            }
            // Keys up to the first row's last, then those that a row sees alone: a row adds in rising order either way. Those before a
            // row's first have a weight of 0, so that they add nothing.
            let shared = seen[0][1];
            let values = Values { held, first: size * KEYS, pitch };
            for column in (0..pitch).step_by(tile_columns::<S>()) {
                // SAFETY: as above, and no count is beyond the span.
                unsafe {
                    let weights = scores.as_flattened().as_ptr();
                    let sums = sums.as_mut_ptr().add(column);
                    values.add::<S, ROWS>(simd, sums, weights, column, blocks.start * KEYS..shared);
                    for (row, [_, end]) in seen.iter().enumerate() {
                        let (sums, weights) = (sums.add(row * pitch), weights.add(row * SPAN));
                        values.add::<S, 1>(simd, sums, weights, column, shared..*end);
                    }
                }
            }
        }
    }
    simd.vectorize(Work::<ROWS>(tile));
}

/// Values of a span.
#[derive(Clone, Copy)]
struct Values<'a> {
    /// Block by block.
    held: &'a [&'a [f32]],
    /// Where a block's values `[strips, KEYS, STRIP]` begin.
    first: usize,
    /// Numbers of a row's sums.
    pitch: usize,
}

impl Values<'_> {
    /// `sums[row] += Σ_key weights[row][key] · values[key]` over `keys`, for two vectors of every row from `column` on.
    ///
    /// # Safety
    /// `sums` holds ROWS rows of that pitch with two vectors in each, `weights` ROWS rows of [`SPAN`]; the keys are in `held`,
    /// with two vectors from `column` on.
    #[inline(always)]
    unsafe fn add<S: Simd, const ROWS: usize>(
        self,
        simd: S,
        sums: *mut f32,
        weights: *const f32,
        column: usize,
        keys: Range<usize>,
    ) {
        let Self { held, first, pitch } = self;
        if keys.is_empty() {
            return;
        }
        // SAFETY: by the caller's promise.
        unsafe {
            let mut own = [[simd.splat_f32s(0.0); 2]; ROWS];
            for (row, own) in own.iter_mut().enumerate() {
                let at = sums.add(row * pitch);
                *own = [load::<S>(at), load::<S>(at.add(S::F32_LANES))];
            }
            let mut key = keys.start;
            while key < keys.end {
                let (block, at) = (key / KEYS, key % KEYS);
                let count = (KEYS - at).min(keys.end - key);
                let strip = column / STRIP * KEYS * STRIP + column % STRIP;
                let values = held.get_unchecked(block).as_ptr().add(first + strip + at * STRIP);
                let right = Operand { values, pitch: STRIP };
                own = accumulate::<S, Floats, ROWS, false>(simd, own, weights.add(key), SPAN, 1, right, count);
                key += count;
            }
            for (row, own) in own.into_iter().enumerate() {
                let at = sums.add(row * pitch);
                store::<S>(at, own[0]);
                store::<S>(at.add(S::F32_LANES), own[1]);
            }
        }
    }
}
