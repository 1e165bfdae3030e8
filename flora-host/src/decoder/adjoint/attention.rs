//! Attention backwards. With p the weights of one row and dₚ[key] = g · value[key], the gradient of a score is p ∘ (dₚ − Σ p dₚ), where
//! Σ p dₚ is g · (what the row attended to). From there it is three products: with the keys for the queries, with the queries for the
//! keys, and p with g for the values.
//!
//! Weights are made again, a block of keys at a time, as exp(score − log-sum), so that a matrix `[tokens, tokens]` is nowhere. A
//! task has some of the query heads that read one key-value head in one segment: nothing is shared between tasks, and sums over
//! keys and over rows are in rising order. What several tasks give a key-value head is added in the order of its query heads.

use std::ops::Range;

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::attention::Attention;
use crate::decoder::cache::KEYS;
use crate::decoder::error::OperationError;
use crate::finish::exp;
use crate::layout::STRIP;
use crate::matmul::{Left, MatMulAdd, Right};
use crate::partition::{PARALLEL_MACS, even_part};
use crate::values::Shared;
use crate::vectorise::vectorised;
use flora_runtime::decoding::Heads;

/// What attention's backward pass reads: segments that begin at position 0, as in training.
#[derive(Clone, Copy, Debug)]
pub struct AttentionAdjoint<'a> {
    /// What the forward pass read.
    pub attention: Attention<'a>,
    /// The rows of each segment; they follow one another.
    pub segments: &'a [Range<usize>],
    /// What the forward pass wrote, `[rows, query heads · size]`.
    pub attended: &'a [f32],
    /// As [`HostEngine::attend_with_log_sums`] gave them, `[rows, query heads]`.
    pub log_sums: &'a [f32],
    /// The gradient of `attended`.
    pub g: &'a [f32],
}

/// The most query heads of a task: as many as pay for packing the keys. Fixed, because sums are cut by it.
const TASK_HEADS: usize = 4;

/// Rows of a task that are taken through a block of keys together: their scores, queries and gradients stay in the second-level cache.
const ROWS: usize = 84;

impl HostEngine {
    /// The gradients of queries, keys and values as they were before rotations. A row of `out` has its queries', then its keys',
    /// then its values': `[rows, (query heads + 2 · key-value heads) · size]`.
    ///
    /// # Errors
    /// Operands that don't belong together; nothing is written then.
    pub fn attend_adjoint(&self, adjoint: &AttentionAdjoint<'_>, out: &mut [f32]) -> Result<(), OperationError> {
        adjoint.check(out.len())?;
        self.arch().dispatch(Step { adjoint, out });
        Ok(())
    }
}

impl AttentionAdjoint<'_> {
    fn check(&self, out: usize) -> Result<(), OperationError> {
        self.attention.check()?;
        let Heads { queries, keys, size } = self.attention.heads;
        let rows = self.attention.queries.rows();
        OperationError::length("what was attended to", self.attended.len(), rows * queries * size)?;
        OperationError::length("the gradient of attention", self.g.len(), rows * queries * size)?;
        OperationError::length("attention's sums", self.log_sums.len(), rows * queries)?;
        OperationError::length("the gradients of attention's inputs", out, rows * (queries + 2 * keys) * size)?;
        let mut next = 0;
        for Range { start, end } in self.segments {
            if *start != next || end < start {
                return Err(OperationError::WrongSegment { expected: next, found: *start });
            }
            next = *end;
        }
        if next == rows { Ok(()) } else { Err(OperationError::WrongSegment { expected: next, found: rows }) }
    }
}

/// Operands that have been checked.
struct Step<'a> {
    adjoint: &'a AttentionAdjoint<'a>,
    out: &'a mut [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { adjoint, out } = self;
        let Heads { queries, keys, size } = adjoint.attention.heads;
        let (rows, group) = (adjoint.attention.queries.rows(), queries / keys);
        let parts = group.div_ceil(TASK_HEADS);
        // What each part of a group gives its key and value, `[rows, key-value heads, parts, 2 · size]`.
        let mut given = vec![0.0; rows * keys * parts * 2 * size];
        let sinks = Sinks { out: Shared::new(out), given: Shared::new(&mut given) };

        let mut tasks = Vec::new();
        for rows in adjoint.segments.iter().filter(|rows| !rows.is_empty()) {
            for (head, part) in (0..keys).flat_map(|head| (0..parts).map(move |part| (head, part))) {
                let own = even_part(group, parts, part);
                let queries = head * group + own.start..head * group + own.end;
                tasks.push(Task { adjoint, rows: rows.clone(), head, queries, at: head * parts + part });
            }
        }
        // The longest first, so that none of them is left for the end.
        tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len()));
        let products: u64 = adjoint.segments.iter().map(|rows| (rows.len() * rows.len()) as u64).sum();
        let run = |memory: &mut Memory, task: &Task<'_>| task.run(simd, memory, sinks);
        let add = |row: usize| adjoint.add_given(row, parts, sinks);
        if 5 * products * (queries * size) as u64 / 2 >= PARALLEL_MACS {
            tasks.par_iter().with_max_len(1).for_each_init(Memory::default, run);
            (0..rows).into_par_iter().for_each(add);
        } else {
            let mut memory = Memory::default();
            tasks.iter().for_each(|task| run(&mut memory, task));
            (0..rows).for_each(add);
        }
    }
}

/// Where gradients are written.
#[derive(Clone, Copy)]
struct Sinks {
    out: Shared<f32>,
    /// What tasks give keys and values.
    given: Shared<f32>,
}

impl AttentionAdjoint<'_> {
    /// Adds what the parts of a group give the keys and values of a row, and turns the keys' back.
    fn add_given(&self, row: usize, parts: usize, Sinks { out, given }: Sinks) {
        let Heads { queries, keys, size } = self.attention.heads;
        let width = (queries + 2 * keys) * size;
        for head in 0..keys {
            let own = row * width + (queries + head) * size;
            // SAFETY: the outputs outlive the step, a row's head is one call's, and all tasks are done.
            let (key, value, given) = unsafe {
                let given = given.slice((row * keys + head) * parts * 2 * size, parts * 2 * size);
                (out.slice(own, size), out.slice(own + keys * size, size), given)
            };
            for (part, given) in given.chunks_exact(2 * size).enumerate() {
                let (of_key, of_value) = given.split_at(size);
                if part == 0 {
                    key.copy_from_slice(of_key);
                    value.copy_from_slice(of_value);
                } else {
                    key.iter_mut().zip(of_key).for_each(|(sum, given)| *sum += given);
                    value.iter_mut().zip(of_value).for_each(|(sum, given)| *sum += given);
                }
            }
            if let Some(rotary) = self.attention.rotary {
                rotary.rotate_adjoint(row, key);
            }
        }
    }
}

/// What a thread computes tasks with. Rows are `pitch` apart, which is the size of a head in whole strips; what is beyond it is 0.
#[derive(Default)]
struct Memory {
    /// Rotated queries by 1 / √size, `[rows, pitch]`.
    queries: Vec<f32>,
    /// The gradients of what the rows attended to, `[rows, pitch]`.
    g: Vec<f32>,
    /// g · (what the row attended to), `[rows]`.
    means: Vec<f32>,
    /// `[rows]`
    log_sums: Vec<f32>,
    /// Gradients of the queries, `[rows, pitch]`.
    query_gradients: Vec<f32>,
    block: Block,
}

/// A block of keys and values, and what some rows make of it.
#[derive(Default)]
struct Block {
    /// Rotated keys, `[KEYS, pitch]`.
    keys: Vec<f32>,
    /// The same, `[size, KEYS]`.
    keys_transposed: Vec<f32>,
    /// `[size, KEYS]`
    values_transposed: Vec<f32>,
    /// `[KEYS, pitch]`
    key_gradients: Vec<f32>,
    /// `[KEYS, pitch]`
    value_gradients: Vec<f32>,
    /// Scores, then weights, `[ROWS, KEYS]`.
    weights: Vec<f32>,
    /// g · value, then the gradients of the scores, `[ROWS, KEYS]`.
    score_gradients: Vec<f32>,
}

/// Some query heads of one key-value head in one segment. Row r is its query head r mod their number, at position r / their number of
/// the segment.
struct Task<'a> {
    adjoint: &'a AttentionAdjoint<'a>,
    rows: Range<usize>,
    head: usize,
    queries: Range<usize>,
    /// Where what it gives lies among that of a row's tasks.
    at: usize,
}

/// So many zeros.
fn zeros(memory: &mut Vec<f32>, count: usize) {
    memory.clear();
    memory.resize(count, 0.0);
}

impl Task<'_> {
    fn run<S: Simd>(&self, simd: S, memory: &mut Memory, Sinks { out, given }: Sinks) {
        let Heads { queries: query_heads, keys: key_heads, size } = self.adjoint.attention.heads;
        let width = (query_heads + 2 * key_heads) * size;
        let (tokens, pitch) = (self.rows.len(), self.pitch());
        self.pack(simd, memory);
        zeros(&mut memory.query_gradients, tokens * self.queries.len() * pitch);
        let row_tasks = key_heads * (query_heads / key_heads).div_ceil(TASK_HEADS);
        for first in (0..tokens).step_by(KEYS) {
            let keys = first..tokens.min(first + KEYS);
            self.pack_block(simd, keys.clone(), &mut memory.block);
            self.block(simd, keys.clone(), memory);
            let block = &memory.block;
            let gradients = block.key_gradients.chunks_exact(pitch).zip(block.value_gradients.chunks_exact(pitch));
            for (token, (key, value)) in keys.zip(gradients) {
                let own = ((self.rows.start + token) * row_tasks + self.at) * 2 * size;
                // SAFETY: the output outlives the step, and no other task has this place.
                let given = unsafe { given.slice(own, 2 * size) };
                given[..size].copy_from_slice(&key[..size]);
                given[size..].copy_from_slice(&value[..size]);
            }
        }
        let scale = 1.0 / (size as f32).sqrt();
        for (at, query) in memory.query_gradients.chunks_exact_mut(pitch).enumerate() {
            let (row, head) = self.place(at);
            let query = &mut query[..size];
            query.iter_mut().for_each(|number| *number *= scale);
            if let Some(rotary) = self.adjoint.attention.rotary {
                rotary.rotate_adjoint(row, query);
            }
            // SAFETY: as above; a row's head is one task's.
            unsafe { out.slice(row * width + head * size, size).copy_from_slice(query) };
        }
    }

    fn pitch(&self) -> usize {
        self.adjoint.attention.heads.size.next_multiple_of(STRIP)
    }

    /// The row of the batch and the query head of the task's row `at`.
    fn place(&self, at: usize) -> (usize, usize) {
        (self.rows.start + at / self.queries.len(), self.queries.start + at % self.queries.len())
    }

    /// Queries, gradients and what is known of the rows' weights.
    fn pack<S: Simd>(&self, simd: S, memory: &mut Memory) {
        let Attention { heads: Heads { queries: query_heads, size, .. }, queries, rotary, .. } = self.adjoint.attention;
        let (rows, pitch) = (self.rows.len() * self.queries.len(), self.pitch());
        let Memory { queries: packed, g: packed_g, means, log_sums, .. } = memory;
        zeros(packed, rows * pitch);
        zeros(packed_g, rows * pitch);
        means.clear();
        log_sums.clear();
        let scale = 1.0 / (size as f32).sqrt();
        vectorised(
            simd,
            #[inline(always)]
            || {
                let rows = packed.chunks_exact_mut(pitch).zip(packed_g.chunks_exact_mut(pitch)).enumerate();
                for (at, (query, packed_g)) in rows {
                    let (row, head) = self.place(at);
                    let query = &mut query[..size];
                    queries.widen(row, head * size, query);
                    if let Some(rotary) = rotary {
                        rotary.rotate(row, query);
                    }
                    query.iter_mut().for_each(|number| *number *= scale);
                    let own = (row * query_heads + head) * size;
                    let (g, attended) = (&self.adjoint.g[own..own + size], &self.adjoint.attended[own..own + size]);
                    packed_g[..size].copy_from_slice(g);
                    means.push(g.iter().zip(attended).map(|(g, attended)| g * attended).sum());
                    log_sums.push(self.adjoint.log_sums[row * query_heads + head]);
                }
            },
        );
    }

    fn pack_block<S: Simd>(&self, simd: S, tokens: Range<usize>, block: &mut Block) {
        let Attention { heads: Heads { size, .. }, keys, values, rotary, .. } = self.adjoint.attention;
        let pitch = self.pitch();
        let Block { keys: packed, keys_transposed, values_transposed, key_gradients, value_gradients, .. } = block;
        for rows in [&mut *packed, key_gradients, value_gradients] {
            zeros(rows, KEYS * pitch);
        }
        for transposed in [&mut *keys_transposed, &mut *values_transposed] {
            zeros(transposed, size * KEYS);
        }
        let mut value = vec![0.0; size];
        vectorised(
            simd,
            #[inline(always)]
            || {
                for ((at, token), key) in tokens.enumerate().zip(packed.chunks_exact_mut(pitch)) {
                    let (row, key) = (self.rows.start + token, &mut key[..size]);
                    keys.widen(row, self.head * size, key);
                    if let Some(rotary) = rotary {
                        rotary.rotate(row, key);
                    }
                    values.widen(row, self.head * size, &mut value);
                    keys_transposed.iter_mut().skip(at).step_by(KEYS).zip(&*key).for_each(|(place, key)| *place = *key);
                    values_transposed.iter_mut().skip(at).step_by(KEYS).zip(&value).for_each(|(place, v)| *place = *v);
                }
            },
        );
    }

    /// Takes the rows that see some of these keys through their block.
    fn block<S: Simd>(&self, simd: S, keys: Range<usize>, memory: &mut Memory) {
        let size = self.adjoint.attention.heads.size;
        let pitch = self.pitch();
        let window = self.adjoint.attention.window.unwrap_or(usize::MAX);
        let end = (keys.end - 1).saturating_add(window).min(self.rows.len());
        let Memory { queries, g, means, log_sums, query_gradients, block } = memory;
        let group = self.queries.len();
        let (first_row, end_row) = (keys.start * group, end * group);
        for first in (first_row..end_row).step_by(ROWS) {
            let rows = first..end_row.min(first + ROWS);
            let own = rows.start * pitch..rows.end * pitch;
            let (queries, g) = (&queries[own.clone()], &g[own.clone()]);
            let by_row = |values| Left { values, row_pitch: pitch, step_pitch: 1 };
            let transposed = |values| Right { values, pitch: KEYS };
            let scores = [
                (&mut block.weights, queries, &block.keys_transposed),
                (&mut block.score_gradients, g, &block.values_transposed),
            ];
            for (out, left, right) in scores {
                zeros(out, rows.len() * KEYS);
                let (left, right) = (by_row(left), transposed(right));
                MatMulAdd { left, right, out, out_pitch: KEYS, rows: rows.len(), columns: KEYS, steps: size }.run(simd);
            }
            let known = means[rows.clone()].iter().zip(&log_sums[rows.clone()]);
            let seen = |row: usize| {
                let position = row / group;
                let (first, end) = ((position + 1).saturating_sub(window), position + 1);
                first.saturating_sub(keys.start).min(KEYS)..end.min(keys.end) - keys.start
            };
            block.weigh(simd, rows.clone().map(seen), known);

            let of_keys = [
                (&block.weights, g, &mut block.value_gradients),
                (&block.score_gradients, queries, &mut block.key_gradients),
            ];
            for (left, right, out) in of_keys {
                let (left, right) =
                    (Left { values: left, row_pitch: 1, step_pitch: KEYS }, Right { values: right, pitch });
                MatMulAdd { left, right, out, out_pitch: pitch, rows: KEYS, columns: pitch, steps: rows.len() }
                    .run(simd);
            }
            let left = Left { values: &block.score_gradients, row_pitch: KEYS, step_pitch: 1 };
            let (right, out) = (Right { values: &block.keys, pitch }, &mut query_gradients[own]);
            MatMulAdd { left, right, out, out_pitch: pitch, rows: rows.len(), columns: pitch, steps: KEYS }.run(simd);
        }
    }
}

impl Block {
    /// Makes weights of scores, and gradients of scores of those of weights. What a row doesn't see has neither.
    fn weigh<'a, S: Simd>(
        &mut self,
        simd: S,
        seen: impl Iterator<Item = Range<usize>>,
        known: impl Iterator<Item = (&'a f32, &'a f32)>,
    ) {
        let (weights, gradients) = (&mut self.weights, &mut self.score_gradients);
        vectorised(
            simd,
            #[inline(always)]
            || {
                let rows = weights.as_chunks_mut::<KEYS>().0.iter_mut().zip(gradients.as_chunks_mut::<KEYS>().0);
                for (((weights, gradients), seen), (mean, log_sum)) in rows.zip(seen).zip(known) {
                    for (weight, gradient) in weights.iter_mut().zip(&mut *gradients) {
                        *weight = exp::<S>(*weight - log_sum);
                        *gradient = *weight * (*gradient - mean);
                    }
                    for unseen in [0..seen.start, seen.end.max(seen.start)..KEYS] {
                        weights[unseen.clone()].fill(0.0);
                        gradients[unseen].fill(0.0);
                    }
                }
            },
        );
    }
}
