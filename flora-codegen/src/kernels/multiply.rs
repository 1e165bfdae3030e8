//! One staged tile of rows times one staged tile of weights, added to the cube's sums: by fragments or by units.

use cubecl::prelude::*;

use super::blueprint::{COLUMNS_PER_UNIT, Multiply, PAD, ROWS_PER_UNIT, SUM_PAD, TileBlueprint};
use super::multiply_registers::{Factors, Lanes, multiply_matrices, store_pairs};
use super::registers::{Pair, sum_of};
use super::staged::{Stage, Staged};
use super::units::{plane_column, plane_row};

/// The sums of a cube: fragments of its planes, or vectors in its units' registers; the other kinds are empty.
#[derive(CubeType)]
pub(crate) struct Sums<N: Size> {
    fragments: Sequence<cmma::Matrix<f32>>,
    /// What a unit has of 16×8 each.
    pairs: Sequence<Array<Pair<f32>>>,
    registers: Array<Vector<f32, N>>,
}

fn fragment(multiply: Multiply) -> (usize, usize, usize) {
    match multiply {
        Multiply::Fma | Multiply::Mma => (1, 1, 1),
        Multiply::Cmma { m, n, k } => (m as usize, n as usize, k as usize),
    }
}

/// Vectors in a unit's registers.
fn registers(blueprint: TileBlueprint, width: u32) -> usize {
    match blueprint.multiply {
        Multiply::Fma => (ROWS_PER_UNIT * (COLUMNS_PER_UNIT / width)) as usize,
        Multiply::Cmma { .. } | Multiply::Mma => 1,
    }
}

/// Sums of nothing.
#[cube]
pub(crate) fn no_sums<N: Size>(#[comptime] blueprint: TileBlueprint) -> Sums<N> {
    let width = N::value();
    let (m, n, k) = comptime!(fragment(blueprint.multiply));
    let (down, across) = comptime!(blueprint.fragments());
    let mut fragments = Sequence::<cmma::Matrix<f32>>::new();
    let is_mma = comptime!(blueprint.multiply == Multiply::Mma);
    #[unroll]
    for _ in 0..comptime!(if is_mma { 0 } else { down * across }) {
        fragments.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            m,
            n,
            k,
            cmma::MatrixLayout::Undefined,
            0.0,
        ));
    }
    let mut pairs = Sequence::<Array<Pair<f32>>>::new();
    #[unroll]
    for _ in 0..comptime!(if is_mma { down * across } else { 0 }) {
        pairs.push(sum_of::<f32>(0.0f32));
    }
    let count = comptime!(registers(blueprint, width as u32));
    let mut registers = Array::<Vector<f32, N>>::new(count);
    #[unroll]
    for at in 0..count {
        registers[at] = Vector::new(0.0);
    }
    Sums::<N> { fragments, pairs, registers }
}

/// rows `[rows, depth + PAD]` by weights `[depth, columns + PAD]`, in elements, of one stage. `factors` are of a W_i that is made
/// in registers.
#[cube]
pub(crate) fn multiply<S: Float, M: Size, N: Size>(
    staged: &Staged<S, M, N>,
    factors: &Factors<S>,
    sums: &mut Sums<N>,
    lanes: &Lanes,
    stage: &Stage,
    #[comptime] blueprint: TileBlueprint,
) {
    if comptime!(blueprint.multiply == Multiply::Mma) {
        multiply_matrices::<S, M, N>(staged, factors, &mut sums.pairs, lanes, stage, blueprint);
    } else if comptime!(matches!(blueprint.multiply, Multiply::Fma)) {
        multiply_registers::<S, M, N>(&staged.rows, &staged.weights, sums, blueprint);
    } else {
        multiply_fragments::<S, M, N>(&staged.rows, &staged.weights, sums, blueprint);
    }
}

#[cube]
fn multiply_fragments<S: Float, M: Size, N: Size>(
    rows: &SharedMemory<Vector<S, M>>,
    weights: &SharedMemory<Vector<S, N>>,
    sums: &mut Sums<N>,
    #[comptime] blueprint: TileBlueprint,
) {
    let row_width = rows.vector_size();
    let weight_width = weights.vector_size();
    let (m, n, k) = comptime!(fragment(blueprint.multiply));
    let (down, across) = comptime!(blueprint.fragments());
    let row_width = comptime!(row_width as u32);
    let weight_width = comptime!(weight_width as u32);
    let row_pitch = comptime!(blueprint.tile.depth + PAD);
    let weight_pitch = comptime!(blueprint.tile.columns + PAD);
    let row0 = plane_row(blueprint) * comptime!(down * m as u32 * row_pitch / row_width);
    let column0 = plane_column(blueprint) * comptime!(across * n as u32 / weight_width);
    // Devices with small fragments expand each into scalars, and would compile for seconds.
    #[unroll(k >= 16)]
    for step in 0..comptime!(blueprint.tile.depth / k as u32) {
        let mut right = Sequence::<cmma::Matrix<Vector<S, N>>>::new();
        #[unroll]
        for j in 0..across {
            let at = column0
                + step * comptime!(k as u32 * weight_pitch / weight_width)
                + comptime!(j * n as u32 / weight_width);
            right.push(cmma::Matrix::<Vector<S, N>>::from_slice(
                cmma::MatrixIdent::B,
                m,
                n,
                k,
                cmma::MatrixLayout::RowMajor,
                &weights.slice(at as usize, weights.len()),
                weight_pitch,
            ));
        }
        #[unroll]
        for i in 0..down {
            let at = row0 + step * comptime!(k as u32 / row_width) + comptime!(i * m as u32 * row_pitch / row_width);
            let left = cmma::Matrix::<Vector<S, M>>::from_slice(
                cmma::MatrixIdent::A,
                m,
                n,
                k,
                cmma::MatrixLayout::RowMajor,
                &rows.slice(at as usize, rows.len()),
                row_pitch,
            );
            #[unroll]
            for j in 0..across {
                let sum = sums.fragments.index(comptime!((i * across + j) as usize));
                cmma::execute(&left, right.index(comptime!(j as usize)), sum, sum);
            }
        }
    }
}

#[cube]
fn multiply_registers<S: Float, M: Size, N: Size>(
    rows: &SharedMemory<Vector<S, M>>,
    weights: &SharedMemory<Vector<S, N>>,
    sums: &mut Sums<N>,
    #[comptime] blueprint: TileBlueprint,
) {
    let row_width = rows.vector_size();
    let row_width = comptime!(row_width as u32);
    let weight_width = weights.vector_size();
    let weight_width = comptime!(weight_width as u32);
    let row_pitch = comptime!((blueprint.tile.depth + PAD) / row_width);
    let weight_pitch = comptime!((blueprint.tile.columns + PAD) / weight_width);
    let vectors = comptime!(COLUMNS_PER_UNIT / weight_width);
    let across = comptime!(blueprint.tile.columns / COLUMNS_PER_UNIT);
    let row0 = UNIT_POS_X / across * ROWS_PER_UNIT;
    let column0 = UNIT_POS_X % across * vectors;
    // As many as the tile is deep, in a form that keeps CUDA's compiler from unrolling the loop into spills.
    let steps = CUBE_DIM / comptime!(blueprint.units() * row_width / blueprint.tile.depth);
    for step in 0..steps {
        let mut left = Array::<Vector<S, M>>::new(comptime!(ROWS_PER_UNIT as usize));
        #[unroll]
        for i in 0..ROWS_PER_UNIT {
            left[i as usize] = rows[((row0 + i) * row_pitch + step) as usize];
        }
        #[unroll]
        for lane in 0..row_width {
            let line = (step * row_width + lane) * weight_pitch + column0;
            #[unroll]
            for j in 0..vectors {
                let weight = Vector::<f32, N>::cast_from(weights[(line + j) as usize]);
                #[unroll]
                for i in 0..ROWS_PER_UNIT {
                    let at = comptime!((i * vectors + j) as usize);
                    let value = Vector::<f32, N>::new(f32::cast_from(left[i as usize][lane as usize]));
                    sums.registers[at] = fma(value, weight, sums.registers[at]);
                }
            }
        }
    }
}

/// Writes strip `strip` of the sums to shared memory, `[rows, strip + SUM_PAD]`. Column c of it is column
/// [`strip_column`]`(c)` of the tile.
#[cube]
pub(crate) fn store_strip<N: Size>(
    sums: &Sums<N>,
    out: &mut SharedMemory<Vector<f32, N>>,
    #[comptime] strip: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let width = out.vector_size();
    let width = comptime!(width as u32);
    let pitch = comptime!(blueprint.strip() + SUM_PAD);
    if comptime!(blueprint.multiply == Multiply::Mma) {
        store_pairs::<N>(&sums.pairs, out, strip, blueprint);
    } else if comptime!(matches!(blueprint.multiply, Multiply::Fma)) {
        let vectors = comptime!(COLUMNS_PER_UNIT / width);
        let across = comptime!(blueprint.tile.columns / COLUMNS_PER_UNIT);
        let row0 = UNIT_POS_X / across * ROWS_PER_UNIT;
        let column0 = UNIT_POS_X % across * vectors;
        #[unroll]
        for i in 0..ROWS_PER_UNIT {
            #[unroll]
            for j in 0..vectors {
                let at = comptime!((i * vectors + j) as usize);
                out[((row0 + i) * comptime!(pitch / width) + column0 + j) as usize] = sums.registers[at];
            }
        }
    } else {
        let (m, n, _) = comptime!(fragment(blueprint.multiply));
        let (down, across) = comptime!(blueprint.fragments());
        let first = plane_row(blueprint) * comptime!(down * m as u32 * pitch / width)
            + plane_column(blueprint) * comptime!(n as u32 / width);
        #[unroll]
        for i in 0..down {
            let at = first + comptime!(i * m as u32 * pitch / width);
            let end = out.len();
            let sum = sums.fragments.index(comptime!((i * across + strip) as usize));
            cmma::store(&mut out.slice_mut(at as usize, end), sum, pitch, cmma::MatrixLayout::RowMajor);
        }
    }
}

/// The column of the tile that column `column` of strip `strip` is.
#[cube]
pub(crate) fn strip_column(column: u32, #[comptime] strip: u32, #[comptime] blueprint: TileBlueprint) -> u32 {
    if comptime!(matches!(blueprint.multiply, Multiply::Fma)) {
        column
    } else {
        // Each plane's own columns of a strip lie beside the next plane's.
        let own = comptime!(blueprint.strip() / blueprint.tile.column_planes);
        let plane = comptime!(blueprint.tile.columns / blueprint.tile.column_planes);
        column / own * plane + comptime!(strip * own) + column % own
    }
}
