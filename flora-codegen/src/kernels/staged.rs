//! What a cube of the tile kernel has staged in shared memory, and where a step of d lies in it.
//!
//! By [`Multiply::Mma`] it is one array where vectors of columns divide those of rows, and the first that the kernel touches, so
//! that it starts at place 0. CUDA's assembler then takes every constant of an address into the load; beside an array that starts
//! elsewhere it makes each address of its own, an instruction a load.

use cubecl::prelude::*;

use super::blueprint::{ALIGNMENT, Multiply, PAD, TileBlueprint};

/// Shared memory of the staged tiles.
#[derive(CubeType)]
pub(crate) struct Staged<S: Float, M: Size, N: Size> {
    /// Virtual rows, `[stages, rows, depth + PAD]`, then in-vectors of a W_i that is made in registers,
    /// `[stages, ranks, depth + PAD]`.
    pub(crate) rows: SharedMemory<Vector<S, M>>,
    /// w0, `[stages, depth, columns + PAD]`, then out-vectors of such a W_i, `[ranks, columns + PAD]`.
    pub(crate) weights: SharedMemory<Vector<S, N>>,
}

/// Where a step lies, in vectors of its array: those of rows where all is in one.
#[derive(CubeType)]
pub(crate) struct Stage {
    pub(crate) rows: u32,
    pub(crate) weights: u32,
    /// In-vectors of W_i.
    pub(crate) vectors: u32,
}

/// Vectors of one stage's rows, w0 and in-vectors.
fn stage_vectors(blueprint: TileBlueprint, row_width: usize, width: usize) -> (u32, u32, u32) {
    let tile = blueprint.tile;
    let row_pitch = (tile.depth + PAD) / row_width as u32;
    let ranks = if blueprint.makes_weights_in_registers() { blueprint.on_chip } else { 0 };
    let weights = tile.depth * (tile.columns + PAD) / weight_unit(blueprint, row_width, width);
    (tile.rows * row_pitch, weights, ranks * row_pitch)
}

/// Where in-vectors start.
fn vector_start(blueprint: TileBlueprint, row_width: usize, width: usize) -> u32 {
    blueprint.stages() * stage_vectors(blueprint, row_width, width).0
}

/// Whether all tiles are in one array.
fn is_one(blueprint: TileBlueprint, row_width: usize, width: usize) -> bool {
    blueprint.multiply == Multiply::Mma && row_width.is_multiple_of(width)
}

/// Numbers of a vector of the array that w0 is in.
pub(crate) fn weight_unit(blueprint: TileBlueprint, row_width: usize, width: usize) -> u32 {
    (if is_one(blueprint, row_width, width) { row_width } else { width }) as u32
}

/// Vectors of `width` in one of the array that w0 is in.
pub(crate) fn weight_parts(blueprint: TileBlueprint, row_width: usize, width: usize) -> u32 {
    weight_unit(blueprint, row_width, width) / width as u32
}

/// Where w0 starts in its array.
fn weight_start(blueprint: TileBlueprint, row_width: usize, width: usize) -> u32 {
    let (rows, _, vectors) = stage_vectors(blueprint, row_width, width);
    if is_one(blueprint, row_width, width) { blueprint.stages() * (rows + vectors) } else { 0 }
}

/// Where out-vectors start in the array of w0.
pub(crate) fn out_start(blueprint: TileBlueprint, row_width: usize, width: usize) -> u32 {
    weight_start(blueprint, row_width, width) + blueprint.stages() * stage_vectors(blueprint, row_width, width).1
}

/// Vectors of the array of w0.
fn weight_vectors(blueprint: TileBlueprint, row_width: usize, width: usize) -> usize {
    let ranks = if blueprint.makes_weights_in_registers() { blueprint.on_chip } else { 0 };
    let out_vectors = ranks * (blueprint.tile.columns + PAD) / weight_unit(blueprint, row_width, width);
    (out_start(blueprint, row_width, width) + out_vectors) as usize
}

/// Vectors of the array of rows.
fn row_vectors(blueprint: TileBlueprint, row_width: usize, width: usize) -> usize {
    if is_one(blueprint, row_width, width) {
        weight_vectors(blueprint, row_width, width)
    } else {
        let (rows, _, vectors) = stage_vectors(blueprint, row_width, width);
        (blueprint.stages() * (rows + vectors)) as usize
    }
}

/// The memory; `is_any` is true, and not known to be.
#[cube]
pub(crate) fn staged<S: Float, M: Size, N: Size>(
    is_any: bool,
    #[comptime] blueprint: TileBlueprint,
) -> Staged<S, M, N> {
    let row_width = M::value();
    let width = N::value();
    let vectors = comptime!(row_vectors(blueprint, row_width, width));
    let mut rows = SharedMemory::<Vector<S, M>>::new_aligned(vectors, ALIGNMENT);
    if comptime!(blueprint.multiply == Multiply::Mma) {
        // A block of its own, in which nothing else is alive: arrays are placed block by block.
        if is_any {
            rows[UNIT_POS_X as usize] = Vector::new(S::new(0.0));
        }
        sync_cube();
    }
    if comptime!(is_one(blueprint, row_width, width)) {
        let weights = same_memory::<S, M, N>(&rows);
        Staged::<S, M, N> { rows, weights }
    } else {
        let vectors = comptime!(weight_vectors(blueprint, row_width, width));
        Staged::<S, M, N> { rows, weights: SharedMemory::new_aligned(vectors, ALIGNMENT) }
    }
}

/// The same array under the name of another, whose vectors may be parts of its own.
#[cube]
#[allow(unused_variables, reason = "what is written is made of them")]
fn same_memory<S: Float, M: Size, N: Size>(memory: &SharedMemory<Vector<S, M>>) -> SharedMemory<Vector<S, N>> {
    intrinsic!(|_scope| memory.expand.clone().into())
}

#[cube]
pub(crate) fn first_stage<M: Size, N: Size>(#[comptime] blueprint: TileBlueprint) -> Stage {
    let row_width = M::value();
    let width = N::value();
    Stage {
        rows: 0u32.runtime(),
        weights: comptime!(weight_start(blueprint, row_width, width)).runtime(),
        vectors: comptime!(vector_start(blueprint, row_width, width)).runtime(),
    }
}

/// The other of two stages.
#[cube]
pub(crate) fn turn<M: Size, N: Size>(stage: &mut Stage, #[comptime] blueprint: TileBlueprint) {
    let row_width = M::value();
    let width = N::value();
    let (rows, weights, vectors) = comptime!(stage_vectors(blueprint, row_width, width));
    stage.rows = rows - stage.rows;
    stage.weights = comptime!(2 * weight_start(blueprint, row_width, width) + weights) - stage.weights;
    stage.vectors = comptime!(2 * vector_start(blueprint, row_width, width) + vectors) - stage.vectors;
}
