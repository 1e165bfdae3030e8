//! x @ b for one *shrink task*: up to 16 rows of one segment by up to 16 of its adapter's shrink vectors. The same code is a
//! kernel of `segmented` and the first cubes of `fused`.
//!
//! A task is short of work for the time that memory takes to answer, so by fragments two stages of d are fetched at a time,
//! while the stage before them is multiplied.
//!
//! MACs: 256·d. Bytes: the task's rows and vectors once. Sums are made in an order that depends on d alone, whatever cube does
//! the task.

use cubecl::prelude::*;

use super::blueprint::{
    ALIGNMENT, Multiply, PAD, SHRINK_DEPTH as DEPTH, SHRINK_STRIP as STRIP, SHRINK_STRIPS as STRIPS, SegmentedBlueprint,
};
use super::tables::{TASK_SIDE, shrink_task};
use super::units::{plane, staged_at, staged_column, staged_row, stages};
use super::words::{from_words, to_words, word_count};

const SIDE: usize = TASK_SIDE as usize;
/// Units that share a sum (without fragments).
const LANES: u32 = 16;

/// Stages that are fetched at a time. Devices with small fragments expand each into scalars, and would compile for seconds.
fn stages_fetched(k: usize) -> u32 {
    if k >= 16 { 2 } else { 1 }
}

/// The products of the task at word `task` of `tables`, row by row, `[16, 16]`.
#[cube]
pub(crate) fn shrink_products<X: Float, A: Float, S: Float, M: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    task: u32,
    d: u32,
    #[comptime] multiply: Multiply,
    #[comptime] units: u32,
    #[comptime] planes: u32,
) -> SharedMemory<f32> {
    if comptime!(matches!(multiply, Multiply::Fma)) {
        by_units::<X, A, M>(x, in_pool, tables, task, d, units)
    } else {
        by_fragments::<X, A, S, M>(x, in_pool, tables, task, d, multiply, units, planes)
    }
}

#[cube]
fn by_units<X: Float, A: Float, M: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    task: u32,
    d: u32,
    #[comptime] units: u32,
) -> SharedMemory<f32> {
    let width = x.vector_size();
    let width = comptime!(width as u32);
    let vectors = d / width;
    let first_row = shrink_task::first_row(tables, task);
    let rows = shrink_task::rows(tables, task);
    let slot = shrink_task::shrink(tables, task);
    let ranks = shrink_task::ranks(tables, task);
    let mut parts = SharedMemory::<f32>::new(comptime!(units as usize));
    let mut result = SharedMemory::<f32>::new(comptime!(SIDE * SIDE));
    let lane = UNIT_POS_X % LANES;
    let at_once = comptime!(units / LANES);
    for pass in 0..comptime!((TASK_SIDE * TASK_SIDE).div_ceil(units / LANES)) {
        let pair = pass * at_once + UNIT_POS_X / LANES;
        let row = pair / TASK_SIDE;
        let rank = pair % TASK_SIDE;
        let mut sums = Vector::<f32, M>::new(0.0);
        if row < rows && rank < ranks {
            let mut depth = lane;
            while depth < vectors {
                let value = Vector::<f32, M>::cast_from(x[((first_row + row) * vectors + depth) as usize]);
                let scale = Vector::<f32, M>::cast_from(in_pool[((slot + rank) * vectors + depth) as usize]);
                sums = fma(value, scale, sums);
                depth += LANES;
            }
        }
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..width {
            sum += sums[part as usize];
        }
        parts[UNIT_POS_X as usize] = sum;
        sync_cube();
        if lane == 0 && pair < comptime!(TASK_SIDE * TASK_SIDE) {
            let mut total = 0.0f32;
            for part in 0..LANES {
                total += parts[(UNIT_POS_X + part) as usize];
            }
            result[pair as usize] = total;
        }
        sync_cube();
    }
    result
}

#[cube]
fn by_fragments<X: Float, A: Float, S: Float, M: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    task: u32,
    d: u32,
    #[comptime] multiply: Multiply,
    #[comptime] units: u32,
    #[comptime] planes: u32,
) -> SharedMemory<f32> {
    let (m, n, k) = comptime!(multiply.fragment().unwrap_or((1, 1, 1)));
    let (m, n, k) = comptime!((m as usize, n as usize, k as usize));
    let width = x.vector_size();
    let width = comptime!(width as u32);
    let vectors = d / width;
    let first_row = shrink_task::first_row(tables, task);
    let rows = shrink_task::rows(tables, task);
    let slot = shrink_task::shrink(tables, task);
    let ranks = shrink_task::ranks(tables, task);
    let pitch = comptime!(DEPTH + PAD);
    let line = comptime!(DEPTH / width);
    let mut left =
        SharedMemory::<Vector<S, M>>::new_aligned(comptime!((TASK_SIDE * pitch / width) as usize), ALIGNMENT);
    let mut right =
        SharedMemory::<Vector<S, M>>::new_aligned(comptime!((TASK_SIDE * pitch / width) as usize), ALIGNMENT);
    let mut parts = SharedMemory::<f32>::new_aligned(comptime!((STRIPS as usize) * SIDE * SIDE), ALIGNMENT);
    let mut result = SharedMemory::<f32>::new(comptime!(SIDE * SIDE));

    // The strips of a plane; planes beyond the strips have none.
    let own = comptime!(STRIPS.div_ceil(planes));
    let (down, across) = comptime!((SIDE / m, SIDE / n));
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(own as usize * down * across) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            m,
            n,
            k,
            cmma::MatrixLayout::Undefined,
            0.0,
        ));
    }
    let x_bytes = X::type_size();
    let a_bytes = A::type_size();
    let size!(XW) = comptime!(word_count(width as usize, x_bytes));
    let size!(AW) = comptime!(word_count(width as usize, a_bytes));
    let together = comptime!(stages_fetched(k));
    let passes = comptime!((TASK_SIDE * line).div_ceil(units));
    let mut inputs = Array::<Vector<u32, XW>>::new(comptime!((together * passes) as usize));
    let mut shrinks = Array::<Vector<u32, AW>>::new(comptime!((together * passes) as usize));
    let mut depth0 = 0u32;
    fetch_lines::<X, M, XW>(x, &mut inputs, first_row, rows, depth0, vectors, together, units);
    fetch_lines::<A, M, AW>(in_pool, &mut shrinks, slot, ranks, depth0, vectors, together, units);
    while depth0 < vectors {
        #[unroll]
        for stage in 0..together {
            stage_lines::<X, S, M, XW>(&inputs, &mut left, stage, units);
            stage_lines::<A, S, M, AW>(&shrinks, &mut right, stage, units);
            sync_cube();
            if comptime!(stage + 1 == together) {
                depth0 += comptime!(together * line);
                if depth0 < vectors {
                    fetch_lines::<X, M, XW>(x, &mut inputs, first_row, rows, depth0, vectors, together, units);
                    fetch_lines::<A, M, AW>(in_pool, &mut shrinks, slot, ranks, depth0, vectors, together, units);
                }
            }
            if plane(units, planes) < STRIPS {
                #[unroll]
                for strip in 0..own {
                    #[unroll]
                    for step in 0..comptime!(STRIP as usize / k) {
                        let start = plane(units, planes) * comptime!(STRIP / width);
                        let along = comptime!(strip * planes * STRIP + (step * k) as u32);
                        #[unroll]
                        for i in 0..down {
                            let at = start + comptime!((along + (i * m) as u32 * pitch) / width);
                            let a = cmma::Matrix::<Vector<S, M>>::from_slice(
                                cmma::MatrixIdent::A,
                                m,
                                n,
                                k,
                                cmma::MatrixLayout::RowMajor,
                                &left.slice(at as usize, left.len()),
                                pitch,
                            );
                            #[unroll]
                            for j in 0..across {
                                let at = start + comptime!((along + (j * n) as u32 * pitch) / width);
                                let b = cmma::Matrix::<Vector<S, M>>::from_slice(
                                    cmma::MatrixIdent::B,
                                    m,
                                    n,
                                    k,
                                    cmma::MatrixLayout::ColMajor,
                                    &right.slice(at as usize, right.len()),
                                    pitch,
                                );
                                let sum = sums.index(comptime!((strip as usize * down + i) * across + j));
                                cmma::execute(&a, &b, sum, sum);
                            }
                        }
                    }
                }
            }
            sync_cube();
        }
    }
    if plane(units, planes) < STRIPS {
        #[unroll]
        for strip in 0..own {
            #[unroll]
            for i in 0..down {
                #[unroll]
                for j in 0..across {
                    let at = plane(units, planes) * comptime!(TASK_SIDE * TASK_SIDE)
                        + comptime!(strip * planes * TASK_SIDE * TASK_SIDE + (i * m * SIDE + j * n) as u32);
                    let end = parts.len();
                    let sum = sums.index(comptime!((strip as usize * down + i) * across + j));
                    cmma::store(&mut parts.slice_mut(at as usize, end), sum, TASK_SIDE, cmma::MatrixLayout::RowMajor);
                }
            }
        }
    }
    sync_cube();
    let mut pair = UNIT_POS_X;
    while pair < comptime!(TASK_SIDE * TASK_SIDE) {
        let mut total = 0.0f32;
        #[unroll]
        for strip in 0..STRIPS {
            total += parts[(comptime!(strip * TASK_SIDE * TASK_SIDE) + pair) as usize];
        }
        result[pair as usize] = total;
        pair += units;
    }
    sync_cube();
    result
}

/// Fetches the first `count` of up to 16 lines from line `first`, a unit's part of each of `together` stages.
#[cube]
fn fetch_lines<T: Float, M: Size, P: Size>(
    lines: &Array<Vector<T, M>>,
    fetched: &mut Array<Vector<u32, P>>,
    first: u32,
    count: u32,
    depth0: u32,
    vectors: u32,
    #[comptime] together: u32,
    #[comptime] units: u32,
) {
    let width = M::value();
    let line = comptime!(DEPTH / width as u32);
    let passes = comptime!((TASK_SIDE * line).div_ceil(units));
    #[unroll]
    for stage in 0..together {
        #[unroll]
        for pass in 0..passes {
            let depth = depth0 + staged_column(pass, line, units) + comptime!(stage * line);
            let inside =
                stages(pass, line, TASK_SIDE, units) && staged_row(0u32, pass, line, units) < count && depth < vectors;
            let mut words = Vector::<u32, P>::new(0u32);
            if inside {
                words = to_words::<T, M, P>(lines[(staged_row(first, pass, line, units) * vectors + depth) as usize]);
            }
            fetched[comptime!((stage * passes + pass) as usize)] = words;
        }
    }
}

/// Stages one of the stages that were fetched, `[16, DEPTH + PAD]`.
#[cube]
fn stage_lines<T: Float, S: Float, M: Size, P: Size>(
    fetched: &Array<Vector<u32, P>>,
    tile: &mut SharedMemory<Vector<S, M>>,
    #[comptime] stage: u32,
    #[comptime] units: u32,
) {
    let width = M::value();
    let width = comptime!(width as u32);
    let line = comptime!(DEPTH / width);
    let passes = comptime!((TASK_SIDE * line).div_ceil(units));
    #[unroll]
    for pass in 0..passes {
        if stages(pass, line, TASK_SIDE, units) {
            let at = staged_at(pass, line, comptime!((DEPTH + PAD) / width), units) as usize;
            let words = fetched[comptime!((stage * passes + pass) as usize)];
            tile[at] = Vector::cast_from(from_words::<T, M, P>(words));
        }
    }
}

/// x `[t, d]`, in_pool `[slots, d]`, tasks at the start of `tables`, one a cube; h as the tasks say.
#[cube(launch_unchecked)]
pub(crate) fn shrink<X: Float, A: Float, S: Float, M: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    h: &mut Array<f32>,
    d: u32,
    #[comptime] blueprint: SegmentedBlueprint,
    #[define(X, A, S)] _types: [StorageType; 3],
) {
    let units = comptime!(blueprint.units());
    let task = (CUBE_POS as u32) * shrink_task::WORDS;
    let result = shrink_products::<X, A, S, M>(
        x,
        in_pool,
        tables,
        task,
        d,
        comptime!(blueprint.multiply),
        units,
        comptime!(blueprint.planes()),
    );
    let mut pair = UNIT_POS_X;
    while pair < comptime!(TASK_SIDE * TASK_SIDE) {
        let row = pair / TASK_SIDE;
        let rank = pair % TASK_SIDE;
        if row < shrink_task::rows(tables, task) && rank < shrink_task::ranks(tables, task) {
            let at = shrink_task::hidden(tables, task) + row * shrink_task::pitch(tables, task) + rank;
            h[at as usize] = result[pair as usize];
        }
        pair += units;
    }
}
