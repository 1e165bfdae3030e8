//! The first half of the low-rank sum y += (x @ b) @ a: h = x @ b, dot products along contiguous vectors.

use std::ops::Range;

use flora_plan::schedule::LowRankRows;
use flora_runtime::RankGates;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::buffer::Buffer;
use crate::fetch::Ahead;
use crate::pack::Vectors;
use crate::partition::PARALLEL_MACS;
use crate::pool::Pool;
use crate::scratch::Scratch;
use crate::values::Shared;
use crate::vectorise::vectorised;

/// Rows that are shrunk at a time, each with [`TILE_VECTORS`] vectors: as many sums as stay in the registers.
const TILE_ROWS: usize = 4;
const TILE_VECTORS: usize = 4;

/// Rows of a task.
const TASK_ROWS: usize = 16;

/// The next task's vectors that are asked for while one is at work. Where every row has vectors of its own, most of the time is spent
/// waiting for them.
const FETCHED_VECTORS: usize = 8;

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
    let run = |(at, task): (usize, &Shrink)| {
        if let Some(next) = tasks.get(at + 1).filter(|next| next.shrink != task.shrink) {
            let slots = next.shrink..next.shrink + next.rank.min(FETCHED_VECTORS);
            Ahead::new(in_pool.pieces(slots, 0..in_pool.width), 1).fetch();
        }
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
    if macs < PARALLEL_MACS {
        tasks.iter().enumerate().for_each(run)
    } else {
        tasks.par_iter().enumerate().for_each(run)
    }
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
    for first in (0..x.width).step_by(DOT) {
        let depth = first..(first + DOT).min(x.width);
        let rows = Parts::new(simd, x, (task.first_row, task.rows), depth.clone(), &mut scratch.x);
        for vector in (0..task.rank).step_by(TILE_VECTORS) {
            let vectors = vector..task.rank.min(vector + TILE_VECTORS);
            let slots = (task.shrink + vector, vectors.len());
            let inner = Parts::new(simd, in_pool, slots, depth.clone(), &mut scratch.inner);
            for first in (0..task.rows).step_by(TILE_ROWS) {
                let tile = first..task.rows.min(first + TILE_ROWS);
                let hidden = hidden[tile.start * task.rank..tile.end * task.rank].chunks_exact_mut(task.rank);
                let hidden = hidden.map(|hidden| &mut hidden[vectors.clone()]);
                match tile.len() {
                    1 => dot::<S, 1>(simd, &rows, first, (&inner, vectors.len()), hidden),
                    2 => dot::<S, 2>(simd, &rows, first, (&inner, vectors.len()), hidden),
                    3 => dot::<S, 3>(simd, &rows, first, (&inner, vectors.len()), hidden),
                    _ => dot::<S, TILE_ROWS>(simd, &rows, first, (&inner, vectors.len()), hidden),
                }
            }
        }
    }
}

/// Parts of vectors that are as long as whole vectors of the processor's.
enum Parts<'a> {
    /// Where they lie.
    InPlace(Vectors<'a>, usize, Range<usize>),
    /// [`DOT_PITCH`] apart, with zeros after them.
    Packed(&'a [f32], usize),
}

impl<'a> Parts<'a> {
    /// Numbers `depth` of `count` vectors from `first` on.
    fn new<S: Simd>(
        simd: S,
        vectors: Vectors<'a>,
        (first, count): (usize, usize),
        depth: Range<usize>,
        buffer: &'a mut Buffer,
    ) -> Self {
        let is_whole = depth.len().is_multiple_of(S::F32_LANES);
        if is_whole && (first..first + count).all(|slot| vectors.f32s(slot, depth.clone()).is_some()) {
            return Self::InPlace(vectors, first, depth);
        }
        let len = depth.len().next_multiple_of(S::F32_LANES);
        let packed = buffer.floats(count * DOT_PITCH);
        vectorised(
            simd,
            #[inline(always)]
            || {
                for (at, out) in packed.chunks_exact_mut(DOT_PITCH).enumerate() {
                    let (numbers, padding) = out[..len].split_at_mut(depth.len());
                    vectors.widen(first + at, depth.start, numbers);
                    padding.fill(0.0);
                }
            },
        );
        Self::Packed(packed, len)
    }

    /// Vector `at`.
    fn get(&self, at: usize) -> &'a [f32] {
        match self {
            Self::InPlace(vectors, first, depth) => vectors.f32s(first + at, depth.clone()).unwrap_or_default(),
            Self::Packed(packed, len) => &packed[at * DOT_PITCH..][..*len],
        }
    }
}

/// Adds the products of rows from `first` on with every vector to their h.
fn dot<'h, S: Simd, const ROWS: usize>(
    simd: S,
    rows: &Parts<'_>,
    first: usize,
    (vectors, count): (&Parts<'_>, usize),
    hidden: impl Iterator<Item = &'h mut [f32]>,
) {
    let rows = std::array::from_fn(|row| rows.get(first + row));
    // Where there are fewer vectors, the last one stands for those that nobody asks for.
    let vectors = std::array::from_fn(|at| vectors.get(at.min(count - 1)));
    let products = simd.vectorize(Dot::<ROWS> { rows, vectors });
    for (hidden, products) in hidden.zip(products) {
        hidden.iter_mut().zip(products).for_each(|(hidden, product)| *hidden += product);
    }
}

/// Products of every row with every vector.
struct Dot<'a, const ROWS: usize> {
    rows: [&'a [f32]; ROWS],
    vectors: [&'a [f32]; TILE_VECTORS],
}

impl<const ROWS: usize> WithSimd for Dot<'_, ROWS> {
    type Output = [[f32; TILE_VECTORS]; ROWS];

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let steps = self.rows[0].len() / S::F32_LANES;
        let rows = self.rows.map(|row| &S::as_simd_f32s(row).0[..steps]);
        let vectors = self.vectors.map(|vector| &S::as_simd_f32s(vector).0[..steps]);
        let mut sums = [[simd.splat_f32s(0.0); TILE_VECTORS]; ROWS];
        for at in 0..steps {
            for (row, sums) in rows.iter().zip(&mut sums) {
                for (vector, sum) in vectors.iter().zip(sums) {
                    *sum = simd.mul_add_e_f32s(row[at], vector[at], *sum);
                }
            }
        }
        sums.map(|sums| sums.map(horizontal_sum::<S>))
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
