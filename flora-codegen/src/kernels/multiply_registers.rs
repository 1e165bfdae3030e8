//! A staged tile's product by tensor cores that are fed from registers: yᵀ = Wᵀxᵀ for every tile, so that a row has the same bits
//! whatever stands beside it.
//!
//! The transpose is what makes `on_chip` cheap. The factor of a fragment of Wᵀ, out_vectorsᵀ in_vectors, comes out of its product in
//! the very registers that hold the fragment: it is multiplied there and used for all rows of the tile, and W_i is in no memory.
//!
//! Wᵀ is A: `[depth, columns]` in shared memory, loaded transposed. xᵀ is B: `[rows, depth]`, loaded as it lies. The lines of both
//! are 8 halves longer than the tile, so that the lines of a matrix lie in different banks.

use cubecl::prelude::*;
use flora_plan::layer::Element;

use super::blueprint::{Multiply, PAD, RANK_CHUNK, SUM_PAD, TileBlueprint};
use super::registers::{Pair, copied, matrices, pair, sum_of};
use super::staged::{Stage, Staged, out_start, weight_unit};
use super::units::{plane_column, plane_row};

/// What W_i of an item is made with; nothing where no item has one, or where it isn't made in registers.
#[derive(CubeType)]
pub(crate) struct Factors<S: Float> {
    /// What a unit has of the out-vectors of its columns, where there is one chunk of ranks.
    pub(crate) out_vectors: Sequence<Array<Pair<S>>>,
    /// What every factor starts at.
    pub(crate) plain: f32,
    /// The same as a sum, where there is one chunk of ranks: in one of these two types.
    pub(crate) start: Sequence<Array<Pair<f32>>>,
    pub(crate) half_start: Sequence<Array<Pair<S>>>,
    /// Chunks of ranks.
    pub(crate) chunks: u32,
}

/// The line that a lane names of matrices that stand below one another in pairs, and the vectors of 8 beside it: matrices 0 and 1
/// are side by side, 2 and 3 below them.
#[cube]
fn lane_place() -> (u32, u32) {
    let lane = UNIT_POS_X % 32;
    (lane % 8 + lane / 16 * 8, lane / 8 % 2)
}

/// Where a lane's lines of its first matrices lie, in vectors from where a stage starts: found once, so that a step only adds to them.
#[derive(CubeType)]
pub(crate) struct Lanes {
    /// Of rows.
    rows: i32,
    /// Of w0, and of out-vectors.
    weights: i32,
    /// Of in-vectors.
    vectors: i32,
}

#[cube]
pub(crate) fn lanes<M: Size, N: Size>(#[comptime] blueprint: TileBlueprint) -> Lanes {
    let row_width = M::value();
    let width = N::value();
    let unit = comptime!(weight_unit(blueprint, row_width, width));
    let row_width = comptime!(row_width as u32);
    let tile = comptime!(blueprint.tile);
    if comptime!(blueprint.multiply == Multiply::Mma) {
        let row_pitch = comptime!((tile.depth + PAD) / row_width);
        let (line, beside) = lane_place();
        let row = plane_row(blueprint) * comptime!(tile.rows / tile.row_planes) + line;
        let column = plane_column(blueprint) * comptime!(tile.columns / tile.column_planes / unit);
        // Matrices of in-vectors: depths 0 to 7 of ranks 0 to 7 and of 8 to 15, then depths 8 to 15.
        let lane = UNIT_POS_X % 32;
        Lanes {
            rows: i32::cast_from(row * row_pitch + beside * comptime!(8 / row_width)),
            weights: i32::cast_from(
                line * comptime!((tile.columns + PAD) / unit) + column + beside * comptime!(8 / unit),
            ),
            vectors: i32::cast_from(lane % 16 * row_pitch + lane / 16 * comptime!(8 / row_width)),
        }
    } else {
        Lanes { rows: 0i32.runtime(), weights: 0i32.runtime(), vectors: 0i32.runtime() }
    }
}

/// Nothing that a W_i is made with.
#[cube]
pub(crate) fn no_factors<S: Float>() -> Factors<S> {
    Factors::<S> {
        out_vectors: Sequence::new(),
        start: Sequence::new(),
        half_start: Sequence::new(),
        plain: 1.0f32.runtime(),
        chunks: 0u32.runtime(),
    }
}

/// Loads the out-vectors of the unit's columns, once for all steps of d.
#[cube]
pub(crate) fn load_out_vectors<S: Float, M: Size, N: Size>(
    staged: &Staged<S, M, N>,
    into: &mut Sequence<Array<Pair<S>>>,
    lanes: &Lanes,
    #[comptime] blueprint: TileBlueprint,
) {
    let width = N::value();
    let (down, _) = comptime!(blueprint.fragments());
    let row_width = M::value();
    let unit = comptime!(weight_unit(blueprint, row_width, width));
    let at = lanes.weights + comptime!(out_start(blueprint, row_width, width) as i32);
    #[unroll]
    for i in 0..down {
        into.push(matrices::<S, N>(&staged.weights, at + comptime!((i * 16 / unit) as i32), true));
    }
}

/// Whether the factors of one chunk of ranks are summed as halves, which is what they are rounded to: tensor cores give f16 sums, and
/// no bf16 ones.
fn sums_factors_as_halves(blueprint: TileBlueprint) -> bool {
    blueprint.stage == Element::F16
}

/// Finds the sum that factors start at. It comes out of a product of zeros, so that CUDA's assembler doesn't see that its numbers are
/// the same, and keeps them in registers that follow one another instead of copying one to four for every product.
#[cube]
pub(crate) fn start_factors<S: Float>(factors: &mut Factors<S>, #[comptime] blueprint: TileBlueprint) {
    let mut zeros = Array::<Pair<S>>::new(4usize);
    #[unroll]
    for at in 0..4usize {
        zeros[at] = Vector::new(S::new(0.0));
    }
    let right = pair::<S>(&zeros, 0usize, 1usize);
    if comptime!(sums_factors_as_halves(blueprint)) {
        let definition = cmma::MmaDefinition::<S, S, S>::new(16usize, 8usize, 16usize);
        let mut start = sum_of::<S>(S::cast_from(factors.plain));
        definition.execute_inplace(&zeros, &right, &mut start);
        factors.half_start.push(start);
    } else {
        let definition = cmma::MmaDefinition::<S, S, f32>::new(16usize, 8usize, 16usize);
        let mut start = sum_of::<f32>(factors.plain);
        definition.execute_inplace(&zeros, &right, &mut start);
        factors.start.push(start);
    }
}

/// Adds a stage's product to the sums.
#[cube]
pub(crate) fn multiply_matrices<S: Float, M: Size, N: Size>(
    staged: &Staged<S, M, N>,
    factors: &Factors<S>,
    sums: &mut Sequence<Array<Pair<f32>>>,
    lanes: &Lanes,
    stage: &Stage,
    #[comptime] blueprint: TileBlueprint,
) {
    let definition = cmma::MmaDefinition::<S, S, f32>::new(16usize, 8usize, 16usize);
    let row_width = M::value();
    let width = N::value();
    let unit = comptime!(weight_unit(blueprint, row_width, width));
    let row_width = comptime!(row_width as u32);
    let tile = comptime!(blueprint.tile);
    let (down, across) = comptime!(blueprint.fragments());
    let row_pitch = comptime!(tile.depth + PAD);
    let pitch = comptime!(tile.columns + PAD);
    let row_at = i32::cast_from(stage.rows) + lanes.rows;
    let weight_at = i32::cast_from(stage.weights) + lanes.weights;
    #[unroll]
    for step in 0..comptime!(tile.depth / 16) {
        let mut left = Sequence::<Array<Pair<S>>>::new();
        #[unroll]
        for i in 0..down {
            let at = weight_at + comptime!(((step * 16 * pitch + i * 16) / unit) as i32);
            left.push(matrices::<S, N>(&staged.weights, at, true));
        }
        if comptime!(blueprint.on_chip > 0) {
            scale::<S, M, N>(staged, factors, &mut left, lanes, stage, step, blueprint);
        }
        #[unroll]
        for j in 0..comptime!(across / 2) {
            let at = row_at + comptime!(((j * 16 * row_pitch + step * 16) / row_width) as i32);
            let four = matrices::<S, M>(&staged.rows, at, false);
            let first = pair::<S>(&four, 0usize, 1usize);
            let second = pair::<S>(&four, 2usize, 3usize);
            #[unroll]
            for i in 0..down {
                let sum = sums.index_mut(comptime!((i * across + 2 * j) as usize));
                definition.execute_inplace(left.index(comptime!(i as usize)), &first, sum);
                let sum = sums.index_mut(comptime!((i * across + 2 * j + 1) as usize));
                definition.execute_inplace(left.index(comptime!(i as usize)), &second, sum);
            }
        }
    }
}

/// Makes the 16 depths of step `step` of w0ᵀ in `left` those of W_iᵀ.
#[cube]
fn scale<S: Float, M: Size, N: Size>(
    staged: &Staged<S, M, N>,
    factors: &Factors<S>,
    left: &mut Sequence<Array<Pair<S>>>,
    lanes: &Lanes,
    stage: &Stage,
    #[comptime] step: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let definition = cmma::MmaDefinition::<S, S, f32>::new(16usize, 8usize, 16usize);
    let row_width = M::value();
    let width = N::value();
    let unit = comptime!(weight_unit(blueprint, row_width, width));
    let out_at = comptime!(out_start(blueprint, row_width, width) as i32);
    let row_width = comptime!(row_width as u32);
    let (down, _) = comptime!(blueprint.fragments());
    let row_pitch = comptime!(blueprint.tile.depth + PAD);
    let pitch = comptime!(blueprint.tile.columns + PAD);
    let in_at = i32::cast_from(stage.vectors) + lanes.vectors + comptime!((step * 16 / row_width) as i32);
    if comptime!(blueprint.on_chip == RANK_CHUNK) {
        let four = matrices::<S, M>(&staged.rows, in_at, true);
        #[unroll]
        for half in 0..2usize {
            let in_vectors = pair::<S>(&four, comptime!(2 * half), comptime!(2 * half + 1));
            #[unroll]
            for i in 0..down {
                let out_vectors = factors.out_vectors.index(comptime!(i as usize));
                let weight = left.index_mut(comptime!(i as usize));
                if comptime!(sums_factors_as_halves(blueprint)) {
                    let definition = cmma::MmaDefinition::<S, S, S>::new(16usize, 8usize, 16usize);
                    let mut factor = copied::<S>(factors.half_start.index(0usize));
                    definition.execute_inplace(out_vectors, &in_vectors, &mut factor);
                    weight[comptime!(2 * half)] *= factor[0usize];
                    weight[comptime!(2 * half + 1)] *= factor[1usize];
                } else {
                    let mut factor = copied::<f32>(factors.start.index(0usize));
                    definition.execute_inplace(out_vectors, &in_vectors, &mut factor);
                    weight[comptime!(2 * half)] *= Vector::cast_from(factor[0usize]);
                    weight[comptime!(2 * half + 1)] *= Vector::cast_from(factor[1usize]);
                }
            }
        }
    } else {
        let out_at = lanes.weights + out_at;
        let mut products = Sequence::<Array<Pair<f32>>>::new();
        #[unroll]
        for _ in 0..comptime!(2 * down) {
            products.push(sum_of::<f32>(factors.plain));
        }
        for chunk in 0..factors.chunks {
            let chunk = i32::cast_from(chunk);
            let below = comptime!((RANK_CHUNK * row_pitch / row_width) as i32);
            let four = matrices::<S, M>(&staged.rows, in_at + chunk * below, true);
            let first = pair::<S>(&four, 0usize, 1usize);
            let second = pair::<S>(&four, 2usize, 3usize);
            #[unroll]
            for i in 0..down {
                let below = comptime!((RANK_CHUNK * pitch / unit) as i32);
                let out_vectors =
                    matrices::<S, N>(&staged.weights, out_at + chunk * below + comptime!((i * 16 / unit) as i32), true);
                let factor = products.index_mut(comptime!((2 * i) as usize));
                definition.execute_inplace(&out_vectors, &first, factor);
                let factor = products.index_mut(comptime!((2 * i + 1) as usize));
                definition.execute_inplace(&out_vectors, &second, factor);
            }
        }
        #[unroll]
        for i in 0..down {
            #[unroll]
            for half in 0..2usize {
                multiply_half::<S>(left, products.index(comptime!(2 * i as usize + half)), comptime!(i as usize), half);
            }
        }
    }
}

/// Multiplies 8 of the 16 depths of a fragment by their factors, rounded.
#[cube]
fn multiply_half<S: Float>(
    left: &mut Sequence<Array<Pair<S>>>,
    factor: &Array<Pair<f32>>,
    #[comptime] fragment: usize,
    #[comptime] half: usize,
) {
    let weight = left.index_mut(fragment);
    weight[comptime!(2 * half)] *= Vector::cast_from(factor[0usize]);
    weight[comptime!(2 * half + 1)] *= Vector::cast_from(factor[1usize]);
}

/// Writes strip `strip` of the sums, 16 columns of each plane, to shared memory, `[rows, strip + SUM_PAD]`.
#[cube]
pub(crate) fn store_pairs<N: Size>(
    sums: &Sequence<Array<Pair<f32>>>,
    out: &mut SharedMemory<Vector<f32, N>>,
    #[comptime] strip: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let (_, across) = comptime!(blueprint.fragments());
    let pitch = comptime!(blueprint.strip() + SUM_PAD);
    let lane = UNIT_POS_X % 32;
    let row0 = plane_row(blueprint) * comptime!(blueprint.tile.rows / blueprint.tile.row_planes) + lane % 4 * 2;
    let first = row0 * pitch + plane_column(blueprint) * 16 + lane / 4;
    let end = out.len();
    let mut numbers = out.slice_mut(0usize, end).with_vector_size::<Const<1>>();
    #[unroll]
    for j in 0..across {
        let sum = sums.index(comptime!((strip * across + j) as usize));
        #[unroll]
        for half in 0..2u32 {
            #[unroll]
            for e in 0..2u32 {
                let at = first + comptime!((j * 8 + e) * pitch + half * 8);
                numbers[at as usize] = Vector::new(sum[comptime!(half as usize)][comptime!(e as usize)]);
            }
        }
    }
}
