//! The low-rank sum, y += (x @ b) @ a. The shrink, h = x @ b, is dot products along contiguous vectors; the expand adds h @ a to
//! outputs, within the pass over the base weight where it is fused, and after it where it isn't.

use std::ops::Range;

use flora_plan::schedule::LowRankRows;
use flora_runtime::RankGates;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::factors::scatter;
use crate::fetch::Pieces;
use crate::frame::Frame;
use crate::kernel::{Columns, Form, tile_rows};
use crate::layout::{SLICE, STRIP, X_PITCH};
use crate::pack::Vectors;
use crate::partition::{PANEL_COLUMNS, PARALLEL_MACS, even_tiles, panels};
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::tiles::{StripPart, Tiles};
use crate::values::{Shared, Values};
use crate::vectorise::vectorised;

/// Rows that are shrunk at a time, each with [`TILE_VECTORS`] vectors: as many sums as stay in the registers.
const TILE_ROWS: usize = 4;
const TILE_VECTORS: usize = 4;

/// Rows of a task.
const TASK_ROWS: usize = 16;

/// Rows whose outputs are fetched, added to and put back at a time, and that share the expand vectors' strips.
const EXPANDED_ROWS: usize = 256;

/// Inputs that products are summed over at a time: two tiles of vectors are a first-level cache's share. Fixed, because a row's
/// bits depend on it.
const DOT: usize = 256;

/// Floats from one packed vector to the next: not a multiple of the cache's period.
const DOT_PITCH: usize = DOT + 16;

/// Rows that one task shrinks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shrink {
    first_row: usize,
    rows: usize,
    shrink: usize,
    rank: usize,
    /// Where their h begins.
    offset: usize,
}

/// Cuts runs into tasks; the h of a run follows that of the one before it. Returns the length of all h.
pub(crate) fn tasks(runs: &[LowRankRows], tasks: &mut Vec<Shrink>) -> usize {
    tasks.clear();
    let mut offset = 0;
    for run in runs {
        let rank = run.rank as usize;
        if rank == 0 {
            continue;
        }
        for first in (0..run.rows as usize).step_by(TASK_ROWS) {
            let rows = TASK_ROWS.min(run.rows as usize - first);
            let first_row = run.first_row as usize + first;
            tasks.push(Shrink { first_row, rows, shrink: run.shrink as usize, rank, offset });
            offset += rows * rank;
        }
    }
    offset
}

/// Computes h for every task, times the gates of its rows.
pub(crate) fn shrink<S: Simd>(
    simd: S,
    (x, gates): (Vectors<'_>, Option<RankGates<'_>>),
    in_pool: Vectors<'_>,
    tasks: &[Shrink],
    hidden: &mut [f32],
    scratches: &Pool<Scratch>,
) {
    let macs = hidden.len() as u64 * x.width as u64;
    let hidden = Shared::new(hidden);
    let run = |task: &Shrink| {
        // SAFETY: the places of a task follow those of the one before it.
        let hidden = unsafe { hidden.slice(task.offset, task.rows * task.rank) };
        scratches.lend(|scratch| shrink_rows(simd, x, in_pool, task, hidden, scratch));
        if let Some(RankGates { width, values }) = gates {
            let of_rows = values.chunks_exact(width.max(1)).skip(task.first_row);
            for (hidden, gates) in hidden.chunks_exact_mut(task.rank).zip(of_rows) {
                for (hidden, gate) in hidden.iter_mut().zip(gates) {
                    *hidden *= gate;
                }
            }
        }
    };
    if macs < PARALLEL_MACS { tasks.iter().for_each(run) } else { tasks.par_iter().for_each(run) }
}

/// Adds h @ a to `rows` rows of sums, [`Frame::pitch`] apart. `hidden` begins with the first row's.
pub(crate) fn expand<S: Simd>(
    frame: &Frame<'_, S>,
    run: &LowRankRows,
    rows: usize,
    hidden: &[f32],
    sums: &mut [f32],
    Scratch { x, outer, row, places, .. }: &mut Scratch,
) {
    let rank = run.rank as usize;
    places.clear();
    places.extend((0..rows).map(|row| row * frame.pitch()));
    let x = x.floats(rows * X_PITCH);
    for first in (0..rank).step_by(SLICE) {
        let ranks = first..(first + SLICE).min(rank);
        for (x, hidden) in x.chunks_exact_mut(X_PITCH).zip(hidden.chunks_exact(rank)) {
            x[..ranks.len()].copy_from_slice(&hidden[ranks.clone()]);
        }
        let tiles = Tiles { x, form: Form::Floats, depth: ranks.len(), places, scales: None };
        let slot = (run.expand as usize + first) * frame.out_pool.width;
        // Vectors that a single tile needs are read where they lie, but for the strip that isn't whole.
        let (in_place, whole) = match frame.out_pool.values {
            Values::F32(values) if rows <= tile_rows::<S>() => {
                (values.get(slot + frame.columns.start..).unwrap_or_default(), frame.columns.len() / STRIP)
            }
            _ => (&[][..], 0),
        };
        let packed = outer.floats((frame.strips() - whole) * ranks.len() * STRIP);
        if whole < frame.strips() {
            let row = row.floats(frame.width());
            for (at, slot) in ranks.clone().enumerate() {
                frame.out_vector(run.expand + slot as u32 + 1, row);
                scatter(&row[whole * STRIP..], at, ranks.len(), packed);
            }
        }
        for strip in 0..frame.strips() {
            let weight = match strip.checked_sub(whole) {
                None => Columns { values: &in_place[strip * STRIP..], pitch: frame.out_pool.width },
                Some(at) => Columns { values: &packed[at * ranks.len() * STRIP..], pitch: STRIP },
            };
            let strip = StripPart { weight, depth: 0..ranks.len(), column: strip * STRIP, ahead: Pieces::default() };
            tiles.multiply(frame.simd, &strip, &mut [], sums);
        }
    }
}

/// Adds h @ a to outputs `[tokens, k]` that are in memory already; `hidden` holds the h of one run after the other's.
pub(crate) fn expand_all<S: Simd>(
    simd: S,
    (in_pool, out_pool): (Vectors<'_>, Vectors<'_>),
    runs: &[LowRankRows],
    hidden: &[f32],
    outputs: &mut [f32],
    scratches: &Pool<Scratch>,
) {
    let k = out_pool.width;
    let outputs = Shared::new(outputs);
    panels((k, PANEL_COLUMNS), 1, hidden.len() as u64 * k as u64, |columns, _| {
        let frame = Frame { simd, in_pool, out_pool, columns: columns.clone() };
        scratches.lend(|scratch| {
            let mut buffer = std::mem::take(&mut scratch.sums);
            let mut hidden = hidden;
            for run in runs {
                let (run_hidden, rest) = hidden.split_at(run.rows as usize * run.rank as usize);
                hidden = rest;
                for Range { start: first, end } in even_tiles(run.rows as usize, EXPANDED_ROWS) {
                    let rows = end - first;
                    let sums = buffer.floats(rows * frame.pitch());
                    // SAFETY: the outputs outlive the call, and no other task has these columns.
                    let output = |row: usize| unsafe {
                        outputs.slice((run.first_row as usize + first + row) * k + columns.start, columns.len())
                    };
                    for (at, sums) in sums.chunks_exact_mut(frame.pitch()).enumerate() {
                        sums[..columns.len()].copy_from_slice(output(at));
                    }
                    let rows_hidden = &run_hidden[first * run.rank as usize..];
                    expand(&frame, run, rows, rows_hidden, sums, scratch);
                    for (at, sums) in sums.chunks_exact(frame.pitch()).enumerate() {
                        output(at).copy_from_slice(&sums[..columns.len()]);
                    }
                }
            }
            scratch.sums = buffer;
        });
    });
}

fn shrink_rows<S: Simd>(
    simd: S,
    x: Vectors<'_>,
    in_pool: Vectors<'_>,
    task: &Shrink,
    hidden: &mut [f32],
    scratch: &mut Scratch,
) {
    hidden.fill(0.0);
    let pack = |vectors: Vectors<'_>, first: usize, count: usize, depth: Range<usize>, out: &mut [f32]| {
        vectorised(
            simd,
            #[inline(always)]
            || {
                for (at, out) in out.chunks_exact_mut(DOT_PITCH).take(count).enumerate() {
                    let (numbers, padding) = out.split_at_mut(depth.len());
                    vectors.widen(first + at, depth.start, numbers);
                    padding.fill(0.0);
                }
            },
        );
    };
    for first in (0..x.width).step_by(DOT) {
        let depth = first..(first + DOT).min(x.width);
        let rows = scratch.x.floats(task.rows.next_multiple_of(TILE_ROWS) * DOT_PITCH);
        pack(x, task.first_row, task.rows, depth.clone(), rows);
        for vector in (0..task.rank).step_by(TILE_VECTORS) {
            let vectors = TILE_VECTORS.min(task.rank - vector);
            let inner = scratch.inner.floats(TILE_VECTORS * DOT_PITCH);
            pack(in_pool, task.shrink + vector, vectors, depth.clone(), inner);
            for (tile, rows) in rows.chunks_exact(TILE_ROWS * DOT_PITCH).enumerate() {
                let products = Dot { rows, vectors: inner, depth: depth.len() }.run(simd);
                let tile_hidden = hidden[tile * TILE_ROWS * task.rank..].chunks_mut(task.rank);
                for (hidden, products) in tile_hidden.zip(products) {
                    let hidden = &mut hidden[vector..vector + vectors];
                    hidden.iter_mut().zip(products).for_each(|(hidden, product)| *hidden += product);
                }
            }
        }
    }
}

/// Products of every row with every vector, [`DOT_PITCH`] apart and padded with zeros to it.
struct Dot<'a> {
    rows: &'a [f32],
    vectors: &'a [f32],
    depth: usize,
}

impl Dot<'_> {
    fn run<S: Simd>(self, simd: S) -> [[f32; TILE_VECTORS]; TILE_ROWS] {
        assert!(self.depth <= DOT);
        assert!(self.rows.len() >= TILE_ROWS * DOT_PITCH && self.vectors.len() >= TILE_VECTORS * DOT_PITCH);
        simd.vectorize(self)
    }
}

impl WithSimd for Dot<'_> {
    type Output = [[f32; TILE_VECTORS]; TILE_ROWS];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        // The padding completes the last vector.
        let steps = self.depth.div_ceil(S::F32_LANES);
        let rows: [&[S::f32s]; TILE_ROWS] = std::array::from_fn(|at| row_of::<S>(self.rows, at, steps));
        let vectors: [&[S::f32s]; TILE_VECTORS] = std::array::from_fn(|at| row_of::<S>(self.vectors, at, steps));
        let mut sums = [[simd.splat_f32s(0.0); TILE_VECTORS]; TILE_ROWS];
        for at in 0..steps {
            for (row, sums) in rows.iter().zip(&mut sums) {
                for (vector, sum) in vectors.iter().zip(sums) {
                    *sum = simd.mul_add_e_f32s(row[at], vector[at], *sum);
                }
            }
        }
        let mut products = [[0.0; TILE_VECTORS]; TILE_ROWS];
        for (products, sums) in products.iter_mut().zip(sums) {
            for (product, sum) in products.iter_mut().zip(sums) {
                *product = horizontal_sum::<S>(sum);
            }
        }
        products
    }
}

/// The lanes' sum, halves on halves. In the open, because the library's is not compiled for the instruction set here.
#[inline(always)]
pub(crate) fn horizontal_sum<S: Simd>(vector: S::f32s) -> f32 {
    let mut lanes = [0.0f32; MOST_LANES];
    lanes[..S::F32_LANES].copy_from_slice(bytemuck::cast_slice(std::slice::from_ref(&vector)));
    let mut half = S::F32_LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// Lanes of the longest vectors.
const MOST_LANES: usize = 16;

#[inline(always)]
fn row_of<S: Simd>(values: &[f32], at: usize, steps: usize) -> &[S::f32s] {
    &S::as_simd_f32s(&values[at * DOT_PITCH..(at + 1) * DOT_PITCH]).0[..steps]
}
