//! Attention of one step: every row over the keys and values of its own sequence, up to its own token, in some models only over the
//! last so many. The rows of a key-value
//! head are queries of the same keys, whichever query head they are of, so that no key or value is ever repeated.
//!
//! A row goes through its keys in spans of [`SPAN`] from position 0 on, those apart of which it sees none, and sums over a span in
//! rising order. So its bits are the same whatever other rows it is computed with: those of its prompt, however that is cut, or none.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::cache::{KEYS, KeyValueCache, Layout};
use crate::decoder::error::OperationError;
use crate::decoder::heads::Heads;
use crate::decoder::matrix::Matrix;
use crate::decoder::rotary::RotaryRows;
use crate::decoder::softmax::Softmax;
use crate::kernel::{MOST_TILE_ROWS, Operand, accumulate, load, store, tile_columns, tile_rows, with_rows};
use crate::partition::{PARALLEL_MACS, even_part, even_tiles};
use crate::products::Floats;
use crate::values::{Shared, Sink, ValuesMut};
use crate::vectorise::vectorised;

/// What attention reads, apart from the caches.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Heads.
    pub heads: Heads,
    /// `[rows, query heads · size]`
    pub queries: Matrix<'a>,
    /// `[rows, key-value heads · size]`
    pub keys: Matrix<'a>,
    /// `[rows, key-value heads · size]`
    pub values: Matrix<'a>,
    /// What each row's queries and keys are turned by; `None` where positions are in the embedding.
    pub rotary: Option<&'a RotaryRows>,
    /// How many tokens a token sees, itself and those before it; `None`: all.
    pub window: Option<usize>,
}

/// The rows of one sequence.
#[derive(Debug)]
pub struct AttentionSegment<'a> {
    /// Its rows. The first follows the cache's last token.
    pub rows: Range<usize>,
    /// The tokens before; the rows' keys and values are appended.
    pub cache: &'a mut KeyValueCache,
}

/// Keys whose scores are turned into weights together: what that costs a row doesn't grow with its keys as their products do. Fixed,
/// because a row's bits depend on it.
const SPAN: usize = 4 * KEYS;

/// Blocks of a span.
const BLOCKS: usize = SPAN / KEYS;

/// The most rows that share a pass over the keys: as many queries and sums as stay in the first-level cache beside a block, and
/// whole tiles.
const TASK_ROWS: usize = 42;

impl HostEngine {
    /// Appends keys and values to the segments' caches and writes what every row attends to, `[rows, query heads · size]`: the sum
    /// of the values that it sees, weighed by the softmax of query · key / √size.
    ///
    /// # Errors
    /// Operands that don't belong together; nothing is written or appended then.
    pub fn attend(
        &self,
        attention: &Attention<'_>,
        segments: &mut [AttentionSegment<'_>],
        mut out: ValuesMut<'_>,
    ) -> Result<(), OperationError> {
        check(attention, segments, out.len())?;
        let out = Outputs { attended: Sink::new(&mut out), log_sums: None };
        self.arch().dispatch(Step { attention, segments, out });
        Ok(())
    }

    /// The same, and ln Σ exp(query · key / √size) of every row and query head, `[rows, query heads]`: what
    /// [`HostEngine::attend_adjoint`] makes the weights of again.
    ///
    /// # Errors
    /// As [`HostEngine::attend`].
    pub fn attend_with_log_sums(
        &self,
        attention: &Attention<'_>,
        segments: &mut [AttentionSegment<'_>],
        mut out: ValuesMut<'_>,
        log_sums: &mut [f32],
    ) -> Result<(), OperationError> {
        check(attention, segments, out.len())?;
        OperationError::length("attention's sums", log_sums.len(), attention.queries.rows() * attention.heads.queries)?;
        let out = Outputs { attended: Sink::new(&mut out), log_sums: Some(Shared::new(log_sums)) };
        self.arch().dispatch(Step { attention, segments, out });
        Ok(())
    }
}

/// What a step writes.
#[derive(Clone, Copy)]
struct Outputs {
    attended: Sink,
    log_sums: Option<Shared<f32>>,
}

impl Attention<'_> {
    /// Whether the operands belong together.
    pub(super) fn check(&self) -> Result<(), OperationError> {
        let Attention { heads, queries, keys, values, rotary, window } = self;
        let Heads { queries: query_heads, keys: key_heads, size } = *heads;
        if size == 0 || query_heads == 0 || query_heads.checked_rem(key_heads) != Some(0) {
            return Err(self.wrong_heads(Layout { heads: key_heads, size }));
        }
        let rows = queries.rows();
        OperationError::length("a row of queries", queries.columns(), query_heads * size)?;
        for (what, matrix) in [("the keys", keys), ("the values", values)] {
            OperationError::length(what, matrix.rows() * matrix.columns(), rows * key_heads * size)?;
            OperationError::length(what, matrix.columns(), key_heads * size)?;
        }
        if *window == Some(0) {
            return Err(OperationError::EmptyWindow);
        }
        match rotary {
            Some(rotary) => rotary.check(size, rows),
            None => Ok(()),
        }
    }

    fn wrong_heads(&self, cached: Layout) -> OperationError {
        let Heads { queries, keys, size } = self.heads;
        OperationError::WrongHeads { queries, keys, size, cached_keys: cached.heads, cached_size: cached.size }
    }
}

fn check(attention: &Attention<'_>, segments: &[AttentionSegment<'_>], out: usize) -> Result<(), OperationError> {
    attention.check()?;
    let Attention { heads: Heads { queries: query_heads, keys: key_heads, size }, keys, values, .. } = attention;
    let rows = attention.queries.rows();
    OperationError::length("attention's result", out, rows * query_heads * size)?;
    let mut next = 0;
    for AttentionSegment { rows, cache } in segments {
        if rows.start != next || rows.end < rows.start {
            return Err(OperationError::WrongSegment { expected: next, found: rows.start });
        }
        next = rows.end;
        let layout = cache.layout();
        if layout != (Layout { heads: *key_heads, size: *size }) {
            return Err(attention.wrong_heads(layout));
        }
        for found in [keys.element(), values.element()] {
            if found != cache.element() {
                return Err(OperationError::WrongElement { expected: cache.element(), found });
            }
        }
    }
    if next == rows { Ok(()) } else { Err(OperationError::WrongSegment { expected: next, found: rows }) }
}

/// A step that has been checked.
struct Step<'a, 's> {
    attention: &'a Attention<'a>,
    segments: &'a mut [AttentionSegment<'s>],
    out: Outputs,
}

impl WithSimd for Step<'_, '_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Step { attention, segments, out } = self;
        let first_positions: Vec<_> = segments.iter().map(|segment| segment.cache.tokens()).collect();
        let append = |segment: &mut AttentionSegment<'_>| append(simd, attention, segment);
        let sums = |(segment, first): (&AttentionSegment<'_>, &usize)| {
            segment.rows.len() as u64 * (first + segment.rows.len()) as u64
        };
        let Heads { queries, keys, size } = attention.heads;
        let products: u64 = segments.iter().zip(&first_positions).map(sums).sum();
        let parallel = 2 * products * (queries * size) as u64 >= PARALLEL_MACS;
        if parallel {
            segments.par_iter_mut().for_each(append)
        } else {
            segments.iter_mut().for_each(append)
        }

        // A row's bits don't depend on how tasks are cut: there are enough of them for all threads.
        let group = queries / keys;
        let all_rows: usize = segments.iter().map(|segment| segment.rows.len() * queries).sum();
        let most = TASK_ROWS.min(all_rows.div_ceil(rayon::current_num_threads()));
        let mut tasks = Vec::new();
        for (segment, first_position) in segments.iter().zip(first_positions) {
            let rows = segment.rows.len() * group;
            let parts = rows.div_ceil(most.max(1));
            for (head, part) in (0..keys).flat_map(|head| (0..parts).map(move |part| (head, part))) {
                let rows = even_part(rows, parts, part);
                let (cache, first_row) = (&*segment.cache, segment.rows.start);
                tasks.push(Task { attention, cache, first_row, first_position, head, group, rows });
            }
        }
        let run = |memory: &mut Memory, task: &Task<'_>| task.run(simd, memory, out);
        if parallel {
            tasks.par_iter().with_max_len(1).for_each_init(Memory::default, run);
        } else {
            let mut memory = Memory::default();
            tasks.iter().for_each(|task| run(&mut memory, task));
        }
    }
}

/// Appends the keys, rotated, and values of a segment's rows to its cache.
fn append<S: Simd>(simd: S, attention: &Attention<'_>, segment: &mut AttentionSegment<'_>) {
    let (size, first) = (attention.heads.size, segment.rows.start);
    segment.cache.extend(segment.rows.len(), |at, keys, values| {
        let row = first + at;
        vectorised(
            simd,
            #[inline(always)]
            || {
                attention.keys.widen(row, 0, keys);
                attention.values.widen(row, 0, values);
                if let Some(rotary) = attention.rotary {
                    keys.chunks_exact_mut(size).for_each(|head| rotary.rotate(row, head));
                }
            },
        );
    });
}

/// What a thread computes tasks with.
#[derive(Default)]
struct Memory {
    /// Rotated queries by 1 / √size, `[rows, size]`.
    queries: Vec<f32>,
    /// Scores of a span of keys, then their weights, `[rows, SPAN]`.
    scores: Vec<f32>,
    /// Weighed values, `[rows, pitch]`.
    sums: Vec<f32>,
    softmaxes: Vec<Softmax>,
    /// A span's keys and values, where they aren't f32.
    wide: [Vec<f32>; BLOCKS],
}

/// Some rows of one segment and one key-value head. Row r is query head r mod `group` of the head's, at position r / `group` of
/// the segment.
struct Task<'a> {
    attention: &'a Attention<'a>,
    cache: &'a KeyValueCache,
    first_row: usize,
    first_position: usize,
    head: usize,
    group: usize,
    rows: Range<usize>,
}

impl Task<'_> {
    fn run<S: Simd>(&self, simd: S, memory: &mut Memory, out: Outputs) {
        let layout = self.cache.layout();
        let (size, pitch, rows) = (layout.size, layout.pitch(), self.rows.len());
        let Memory { queries, scores, sums, softmaxes, wide } = memory;
        queries.resize(rows * size, 0.0);
        scores.resize(rows * SPAN, 0.0);
        sums.clear();
        sums.resize(rows * pitch, 0.0);
        softmaxes.clear();
        softmaxes.resize(rows, Softmax::NONE);
        self.pack(simd, queries);

        let last = self.position(rows - 1);
        for span in self.first_key(0) / SPAN..=last / SPAN {
            let start = span * SPAN;
            let blocks = start / KEYS..(last.min(start + SPAN - 1) / KEYS) + 1;
            let mut held: [&[f32]; BLOCKS] = [&[]; BLOCKS];
            for ((held, block), wide) in held.iter_mut().zip(blocks.clone()).zip(&mut *wide) {
                *held = self.cache.head(simd, block, self.head, wide);
            }
            let held = &held[..blocks.len()];
            // Rows before the first one end in a span before, and the windows of those after the last one begin in a span after.
            let before = start.saturating_sub(self.first_position) * self.group;
            let first = before.saturating_sub(self.rows.start).min(rows);
            let end = match self.attention.window {
                None => rows,
                Some(window) => {
                    let end = (start + SPAN - 1).saturating_add(window);
                    let positions = end.saturating_sub(self.first_position);
                    positions.saturating_mul(self.group).saturating_sub(self.rows.start).min(rows)
                }
            };
            for tile in even_tiles(end.saturating_sub(first), tile_rows::<S>()) {
                let tile = first + tile.start..first + tile.end;
                let seen = |row: usize| {
                    let first = self.first_key(row).saturating_sub(start);
                    [first, (self.position(row) + 1 - start).min(SPAN)]
                };
                let mut bounds = [[0; 2]; MOST_TILE_ROWS];
                let bounds = &mut bounds[..tile.len()];
                bounds.iter_mut().zip(tile.clone()).for_each(|(bounds, row)| *bounds = seen(row));
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
        let width = self.attention.heads.queries * size;
        vectorised(
            simd,
            #[inline(always)]
            || {
                for (sums, softmax) in sums.chunks_exact_mut(pitch).zip(&*softmaxes) {
                    let weights = softmax.sum();
                    sums.iter_mut().for_each(|sum| *sum /= weights);
                }
            },
        );
        for (at, (sums, softmax)) in memory.sums.chunks_exact(pitch).zip(&memory.softmaxes).enumerate() {
            let (row, query_head) = self.place(at);
            // SAFETY: the outputs outlive the step, and a row's head is one task's.
            unsafe {
                out.attended.write(simd, row * width + query_head * size, &sums[..size]);
                if let Some(log_sums) = &out.log_sums {
                    log_sums.slice(row * self.attention.heads.queries + query_head, 1)[0] = softmax.log_sum();
                }
            }
        }
    }

    /// The position in its sequence of the task's row `at`.
    fn position(&self, at: usize) -> usize {
        self.first_position + (self.rows.start + at) / self.group
    }

    /// The position of the first key that the task's row `at` sees.
    fn first_key(&self, at: usize) -> usize {
        let position = self.position(at);
        self.attention.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The row of the batch and the query head of the task's row `at`.
    fn place(&self, at: usize) -> (usize, usize) {
        let row = self.rows.start + at;
        (self.first_row + row / self.group, self.head * self.group + row % self.group)
    }

    fn pack<S: Simd>(&self, simd: S, queries: &mut [f32]) {
        let size = self.attention.heads.size;
        let scale = 1.0 / (size as f32).sqrt();
        vectorised(
            simd,
            #[inline(always)]
            || {
                for (at, query) in queries.chunks_exact_mut(size).enumerate() {
                    let (row, head) = self.place(at);
                    self.attention.queries.widen(row, head * size, query);
                    if let Some(rotary) = self.attention.rotary {
                        rotary.rotate(row, query);
                    }
                    query.iter_mut().for_each(|number| *number *= scale);
                }
            },
        );
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
    /// Block by block, keys `[size, KEYS]` and values `[KEYS, pitch]`.
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
                let scale = softmax.add(&mut scores[blocks.clone()], *first - before..*end - before);
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
    /// Where a block's values `[KEYS, pitch]` begin.
    first: usize,
    pitch: usize,
}

impl Values<'_> {
    /// `sums[row] += Σ_key weights[row][key] · values[key]` over `keys`, for two vectors of every row from `column` on.
    ///
    /// # Safety
    /// `sums` holds ROWS rows of the values' pitch with two vectors in each, `weights` ROWS rows of [`SPAN`]; the keys are in `held`,
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
                let values = held.get_unchecked(block).as_ptr().add(first + at * pitch + column);
                let right = Operand { values, pitch };
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
