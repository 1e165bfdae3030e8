//! LoRA grouped by segment (SGMV/BGMV of Punica and S-LoRA), ranks not padded: `shrink` writes h = x @ b for every row,
//! `expand` adds h @ a to y.
//!
//! MACs: t·r·d and t·r·k. Bytes of `shrink`: x and the segment's shrink vectors once per 16 rows; of `expand`: y read and
//! written once, the expand vectors once per 16 rows and column tile.

use cubecl::prelude::*;

/// Rows of a segment that a cube computes.
pub(crate) const SEGMENT_TILE_ROWS: u32 = 16;
/// Ranks that a cube of `shrink` computes.
pub(crate) const SEGMENT_TILE_RANKS: u32 = 16;
const TILE_DEPTH: u32 = 32;
/// Column vectors that a cube of `expand` computes.
pub(crate) const EXPAND_COLUMN_VECTORS: u32 = 16;
/// Words of one work item: first row, rows, first shrink slot, first expand slot, rank, offset of the first row's h.
pub(crate) const ITEM_WORDS: u32 = 6;

/// x `[t, d]`, in_pool `[slots, d]`, items `[cubes, 6]`, h packed: row i of an item at `offset + i·rank`.
#[cube(launch_unchecked)]
pub(crate) fn shrink(x: &Array<f32>, in_pool: &Array<f32>, items: &Array<u32>, h: &mut Array<f32>, d: u32) {
    let item = CUBE_POS_Y * ITEM_WORDS;
    let first_row = items[item as usize];
    let rows = items[(item + 1) as usize];
    let slot = items[(item + 2) as usize];
    let rank = items[(item + 4) as usize];
    let offset = items[(item + 5) as usize];
    let rank0 = CUBE_POS_X * SEGMENT_TILE_RANKS;

    // A column of padding keeps the 16 rows that are read together in different banks.
    let pitch = comptime!(TILE_DEPTH + 1);
    let mut x_tile = SharedMemory::<f32>::new(comptime!((SEGMENT_TILE_ROWS * (TILE_DEPTH + 1)) as usize));
    let mut b_tile = SharedMemory::<f32>::new(comptime!((SEGMENT_TILE_RANKS * (TILE_DEPTH + 1)) as usize));
    let unit_row = UNIT_POS / SEGMENT_TILE_RANKS;
    let unit_rank = UNIT_POS % SEGMENT_TILE_RANKS;

    if rank0 < rank {
        let mut sum = 0.0f32;
        let mut depth0 = 0u32;
        while depth0 < d {
            sync_cube();
            let mut load = UNIT_POS;
            while load < comptime!(SEGMENT_TILE_ROWS * TILE_DEPTH) {
                let line = load / TILE_DEPTH;
                let depth = depth0 + load % TILE_DEPTH;
                let at = (line * pitch + load % TILE_DEPTH) as usize;
                let mut value = 0.0f32;
                if line < rows && depth < d {
                    value = x[((first_row + line) * d + depth) as usize];
                }
                x_tile[at] = value;
                let mut value = 0.0f32;
                if rank0 + line < rank && depth < d {
                    value = in_pool[((slot + rank0 + line) * d + depth) as usize];
                }
                b_tile[at] = value;
                load += comptime!(SEGMENT_TILE_ROWS * SEGMENT_TILE_RANKS);
            }
            sync_cube();
            for step in 0..TILE_DEPTH {
                sum = fma(x_tile[(unit_row * pitch + step) as usize], b_tile[(unit_rank * pitch + step) as usize], sum);
            }
            depth0 += TILE_DEPTH;
        }
        if unit_row < rows && rank0 + unit_rank < rank {
            h[(offset + unit_row * rank + rank0 + unit_rank) as usize] = sum;
        }
    }
}

/// h as `shrink` wrote it, out_pool `[slots, k]`, items `[cubes, 6]`, y `[t, k]`: y += h @ a.
#[cube(launch_unchecked)]
pub(crate) fn expand<NK: Size>(
    h: &Array<f32>,
    out_pool: &Array<Vector<f32, NK>>,
    items: &Array<u32>,
    y: &mut Array<Vector<f32, NK>>,
    k: u32,
) {
    let item = CUBE_POS_Y * ITEM_WORDS;
    let first_row = items[item as usize];
    let rows = items[(item + 1) as usize];
    let slot = items[(item + 3) as usize];
    let rank = items[(item + 4) as usize];
    let offset = items[(item + 5) as usize];
    let width_k = y.vector_size();
    let k_vectors = k / comptime!(width_k as u32);
    let row = UNIT_POS / EXPAND_COLUMN_VECTORS;
    let column = CUBE_POS_X * EXPAND_COLUMN_VECTORS + UNIT_POS % EXPAND_COLUMN_VECTORS;
    if row < rows && column < k_vectors {
        let mut sum = Vector::<f32, NK>::new(0.0);
        for q in 0..rank {
            let value = Vector::<f32, NK>::new(h[(offset + row * rank + q) as usize]);
            sum = fma(value, out_pool[((slot + q) * k_vectors + column) as usize], sum);
        }
        y[((first_row + row) * k_vectors + column) as usize] += sum;
    }
}
