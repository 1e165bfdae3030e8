//! The second half of `segmented`: y += h @ a, by segment, ranks not padded.
//!
//! MACs: t·r·k. Bytes: y read and written once, the expand vectors once for each 16 rows of a segment.

use cubecl::prelude::*;

use super::blueprint::{ALIGNMENT, Multiply, PAD, SegmentedBlueprint};
use super::tables::{TASK_SIDE, expand_item};
use super::units::{plane, staged_at, staged_column, staged_row, stages};

/// Columns of a cube with fragments, one fragment of 16 a plane.
const SIDE: usize = TASK_SIDE as usize;
/// Ranks that are staged at once.
const CHUNK: u32 = 16;

impl SegmentedBlueprint {
    /// Columns that a cube of `expand` writes, where a vector has `width` of them.
    pub(crate) fn expand_columns(&self, width: u32) -> u32 {
        match self.multiply {
            Multiply::Fma => self.units() / TASK_SIDE * width,
            Multiply::Cmma { .. } | Multiply::Mma => self.planes() * TASK_SIDE,
        }
    }
}

/// h as `shrink` wrote it, out_pool `[slots, k]`, items at word `items` of `tables`, y `[t, k]`: y += h @ a.
#[cube(launch_unchecked)]
pub(crate) fn expand<A: Float, S: Float, Y: Float, N: Size>(
    h: &Array<f32>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    y: &mut Array<Vector<Y, N>>,
    items: u32,
    k: u32,
    #[comptime] blueprint: SegmentedBlueprint,
    #[define(A, S, Y)] _types: [StorageType; 3],
) {
    let item = items + CUBE_POS_Y * expand_item::WORDS;
    if comptime!(matches!(blueprint.multiply, Multiply::Fma)) {
        by_units::<A, Y, N>(h, out_pool, tables, y, item, k, blueprint);
    } else {
        by_fragments::<A, S, Y, N>(h, out_pool, tables, y, item, k, blueprint);
    }
}

#[cube]
fn by_units<A: Float, Y: Float, N: Size>(
    h: &Array<f32>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    y: &mut Array<Vector<Y, N>>,
    item: u32,
    k: u32,
    #[comptime] blueprint: SegmentedBlueprint,
) {
    let width = y.vector_size();
    let k_vectors = k / comptime!(width as u32);
    let columns = comptime!(blueprint.units() / TASK_SIDE);
    let unit = UNIT_POS_X;
    let row = unit / columns;
    let column = CUBE_POS_X * columns + unit % columns;
    let rank = expand_item::rank(tables, item);
    if row < expand_item::rows(tables, item) && column < k_vectors {
        let mut sum = Vector::<f32, N>::new(0.0);
        let own = expand_item::hidden(tables, item) + row * rank;
        let slot = expand_item::expand(tables, item);
        for q in 0..rank {
            let value = Vector::<f32, N>::new(h[(own + q) as usize]);
            sum = fma(value, Vector::cast_from(out_pool[((slot + q) * k_vectors + column) as usize]), sum);
        }
        let at = ((expand_item::first_row(tables, item) + row) * k_vectors + column) as usize;
        y[at] = Vector::cast_from(Vector::<f32, N>::cast_from(y[at]) + sum);
    }
}

#[cube]
fn by_fragments<A: Float, S: Float, Y: Float, N: Size>(
    h: &Array<f32>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    y: &mut Array<Vector<Y, N>>,
    item: u32,
    k: u32,
    #[comptime] blueprint: SegmentedBlueprint,
) {
    let (m, n, depth) = comptime!(blueprint.multiply.fragment().unwrap_or((1, 1, 1)));
    let (m, n, depth) = comptime!((m as usize, n as usize, depth as usize));
    let width = y.vector_size();
    let width = comptime!(width as u32);
    let k_vectors = k / width;
    let units = comptime!(blueprint.units());
    let columns = comptime!(blueprint.planes() * TASK_SIDE);
    let line = comptime!(columns / width);
    let pitch = comptime!(columns + PAD);
    let hidden_pitch = comptime!(CHUNK + PAD);
    let first_row = expand_item::first_row(tables, item);
    let rows = expand_item::rows(tables, item);
    let slot = expand_item::expand(tables, item);
    let rank = expand_item::rank(tables, item);
    let offset = expand_item::hidden(tables, item);
    let column0 = CUBE_POS_X * line;
    let mut left = SharedMemory::<S>::new_aligned(comptime!((TASK_SIDE * hidden_pitch) as usize), ALIGNMENT);
    let mut right = SharedMemory::<Vector<S, N>>::new_aligned(comptime!((CHUNK * pitch / width) as usize), ALIGNMENT);
    let mut out =
        SharedMemory::<Vector<f32, N>>::new_aligned(comptime!((TASK_SIDE * pitch / width) as usize), ALIGNMENT);
    let (down, across) = comptime!((SIDE / m, SIDE / n));
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(down * across) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            m,
            n,
            depth,
            cmma::MatrixLayout::Undefined,
            0.0,
        ));
    }
    let plane_column = plane(units, comptime!(blueprint.planes())) * comptime!(TASK_SIDE / width);
    let mut q0 = 0u32;
    while q0 < rank {
        let mut load = UNIT_POS_X;
        while load < comptime!(TASK_SIDE * CHUNK) {
            let row = load / CHUNK;
            let q = q0 + load % CHUNK;
            let mut value = S::new(0.0);
            if row < rows && q < rank {
                value = S::cast_from(h[(offset + row * rank + q) as usize]);
            }
            left[(row * hidden_pitch + load % CHUNK) as usize] = value;
            load += units;
        }
        #[unroll]
        for pass in 0..comptime!((CHUNK * line).div_ceil(units)) {
            if stages(pass, line, CHUNK, units) {
                let q = staged_row(q0, pass, line, units);
                let column = column0 + staged_column(pass, line, units);
                let mut value = Vector::<S, N>::new(S::new(0.0));
                if q < rank && column < k_vectors {
                    value = Vector::cast_from(out_pool[((slot + q) * k_vectors + column) as usize]);
                }
                right[staged_at(pass, line, comptime!(pitch / width), units) as usize] = value;
            }
        }
        sync_cube();
        #[unroll]
        for step in 0..comptime!(CHUNK as usize / depth) {
            #[unroll]
            for i in 0..down {
                let at = comptime!(i * m * hidden_pitch as usize + step * depth);
                let a = cmma::Matrix::<S>::from_slice(
                    cmma::MatrixIdent::A,
                    m,
                    n,
                    depth,
                    cmma::MatrixLayout::RowMajor,
                    &left.slice(at, left.len()),
                    hidden_pitch,
                );
                #[unroll]
                for j in 0..across {
                    let at = plane_column + comptime!(((step * depth) as u32 * pitch + (j * n) as u32) / width);
                    let b = cmma::Matrix::<Vector<S, N>>::from_slice(
                        cmma::MatrixIdent::B,
                        m,
                        n,
                        depth,
                        cmma::MatrixLayout::RowMajor,
                        &right.slice(at as usize, right.len()),
                        pitch,
                    );
                    let sum = sums.index(comptime!(i * across + j));
                    cmma::execute(&a, &b, sum, sum);
                }
            }
        }
        sync_cube();
        q0 += CHUNK;
    }
    #[unroll]
    for i in 0..down {
        #[unroll]
        for j in 0..across {
            let at = plane_column + comptime!(((i * m) as u32 * pitch + (j * n) as u32) / width);
            let end = out.len();
            let sum = sums.index(comptime!(i * across + j));
            cmma::store(&mut out.slice_mut(at as usize, end), sum, pitch, cmma::MatrixLayout::RowMajor);
        }
    }
    sync_cube();
    let mut load = UNIT_POS_X;
    while load < comptime!(TASK_SIDE * line) {
        let row = load / line;
        let column = column0 + load % line;
        if row < rows && column < k_vectors {
            let at = ((first_row + row) * k_vectors + column) as usize;
            let sum = out[(row * comptime!(pitch / width) + load % line) as usize];
            y[at] = Vector::cast_from(Vector::<f32, N>::cast_from(y[at]) + sum);
        }
        load += units;
    }
}
