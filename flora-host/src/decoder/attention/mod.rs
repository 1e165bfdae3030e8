//! Attention of one step: every row over the keys and values of its own sequence, up to its own token, in some models only over the
//! last so many. The rows of a key-value head are queries of the same keys, whichever query head they are of, so that no key or value
//! is ever repeated.
//!
//! A row goes through its keys in spans of [`SPAN`] from position 0 on, those apart of which it sees none, and sums over a span in
//! rising order. So its bits are the same whatever other rows it is computed with: those of its prompt, however that is cut, or none.
//!
//! In bf16 queries, keys, weights and values are multiplied in pairs where the processor can, with sums in f32.

mod floats;
mod paired;

use std::ops::Range;

use flora_plan::layer::Element;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::cache::{KEYS, KeyValueCache, Layout};
use crate::decoder::error::OperationError;
use crate::decoder::matrix::Matrix;
use crate::decoder::rotary::RotaryRows;
use crate::decoder::softmax::Softmax;
use crate::kernel::Form;
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS};
use crate::partition::{PARALLEL_MACS, even_part, even_tiles};
use crate::products::Pairs;
use crate::values::{Shared, Sink, ValuesMut};
use crate::vectorise::vectorised;
use flora_runtime::decoding::Heads;

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

/// The same where the matrix unit multiplies: its tiles, and what they need takes half the room.
const UNIT_TASK_ROWS: usize = 3 * UNIT_ROWS;

/// The form in which a cache's keys and values are multiplied.
fn form<S: Simd>(layout: Layout, unit: Option<MatrixUnit>) -> Form {
    let multiplied = unit.is_some() || Pairs::are_multiplied::<S>();
    let pairs = layout.element == Element::Bf16 && multiplied && paired::serves(layout.size);
    if pairs { Form::Pairs(unit) } else { Form::Floats }
}

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
        self.arch().dispatch(Step { attention, segments, unit: self.unit(), out });
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
        self.arch().dispatch(Step { attention, segments, unit: self.unit(), out });
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
            return Err(self.wrong_heads(Layout { heads: key_heads, size, element: self.keys.element() }));
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
        if (layout.heads, layout.size) != (*key_heads, *size) {
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
    unit: Option<MatrixUnit>,
    out: Outputs,
}

impl WithSimd for Step<'_, '_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Step { attention, segments, unit, out } = self;
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
        let most = if unit.is_some() { UNIT_TASK_ROWS } else { TASK_ROWS };
        let most = most.min(all_rows.div_ceil(rayon::current_num_threads()));
        let mut tasks = Vec::new();
        for (segment, first_position) in segments.iter().zip(first_positions) {
            let rows = segment.rows.len() * group;
            let parts = rows.div_ceil(most.max(1));
            for (head, part) in (0..keys).flat_map(|head| (0..parts).map(move |part| (head, part))) {
                let rows = even_part(rows, parts, part);
                let (cache, first_row) = (&*segment.cache, segment.rows.start);
                let form = form::<S>(cache.layout(), unit);
                tasks.push(Task { attention, cache, form, first_row, first_position, head, group, rows });
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
    /// Weighed values, `[rows, pitch]`.
    sums: Vec<f32>,
    softmaxes: Vec<Softmax>,
    floats: floats::Memory,
    paired: paired::Memory,
}

/// Some rows of one segment and one key-value head. Row r is query head r mod `group` of the head's, at position r / `group` of
/// the segment.
struct Task<'a> {
    attention: &'a Attention<'a>,
    cache: &'a KeyValueCache,
    form: Form,
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
        let Memory { sums, softmaxes, floats, paired } = memory;
        sums.resize(rows * pitch, 0.0);
        softmaxes.resize(rows, Softmax::NONE);
        match self.form {
            // Keys and values are never bytes.
            Form::Floats | Form::Bytes(_) => floats.run(simd, self, sums, softmaxes),
            Form::Pairs(unit) => paired.run(simd, self, unit, sums, softmaxes),
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

    /// The spans of keys that the rows see, with their first keys and blocks.
    fn spans(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let last = self.position(self.rows.len() - 1);
        (self.first_key(0) / SPAN..=last / SPAN).map(move |span| {
            let start = span * SPAN;
            (start, start / KEYS..(last.min(start + SPAN - 1) / KEYS) + 1)
        })
    }

    /// The rows that see keys of the span from `start` on, in tiles of at most `most`.
    fn tiles(&self, start: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
        let rows = self.rows.len();
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
        even_tiles(end.saturating_sub(first), most).map(move |tile| first + tile.start..first + tile.end)
    }

    /// The first of the keys of the span from `start` on that a row sees, and the end of those.
    fn seen(&self, row: usize, start: usize) -> [usize; 2] {
        let first = self.first_key(row).saturating_sub(start);
        [first, (self.position(row) + 1 - start).min(SPAN)]
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

    /// The rotated query of row `at` by 1 / √size.
    #[inline(always)]
    fn query(&self, at: usize, query: &mut [f32]) {
        let size = self.attention.heads.size;
        let scale = 1.0 / (size as f32).sqrt();
        let (row, head) = self.place(at);
        self.attention.queries.widen(row, head * size, query);
        if let Some(rotary) = self.attention.rotary {
            rotary.rotate(row, query);
        }
        query.iter_mut().for_each(|number| *number *= scale);
    }
}
