//! The `stacked` kernel (paper Eq. 6): one GEMM over *virtual rows*, each an input row with its own in-scale and out-scale
//! vector, summed per output row in the epilogue. Base rows are one virtual row without scales, IA3 rows one with a scale,
//! fLoRA rows of rank r are r of them, so a batch of mixed kinds and ranks is one launch with nothing padded.
//!
//! MACs: V·d·k for V virtual rows. Bytes: w0 once per work item, x once per virtual row and column tile (from L2 after the
//! first), scales once, y once.
//!
//! Every accumulator sums over d in order, and every output adds its virtual rows in order, whatever tile they fall in: the
//! bits of a row don't depend on the rest of the batch.

use cubecl::prelude::*;

use super::epilogue::{Epilogue, finish};

/// The comptime key of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackedBlueprint {
    /// Virtual rows that a cube multiplies at once: a multiple of `ROWS_PER_UNIT`, at least 16.
    pub tile_rows: u32,
    /// Whether any virtual row has a scale.
    pub scaled: bool,
    /// What is applied before the write.
    pub epilogue: Epilogue,
}

/// Columns of w0 that a cube multiplies.
pub(crate) const TILE_COLUMNS: u32 = 64;
/// Steps of d that a cube stages in shared memory.
pub(crate) const TILE_DEPTH: u32 = 16;
/// Virtual rows in a unit's registers.
pub(crate) const ROWS_PER_UNIT: u32 = 4;
/// Columns in a unit's registers.
const COLUMNS_PER_UNIT: u32 = 4;

impl StackedBlueprint {
    /// Units of a cube.
    pub fn units(&self) -> u32 {
        (self.tile_rows / ROWS_PER_UNIT) * (TILE_COLUMNS / COLUMNS_PER_UNIT)
    }

    /// Bytes of shared memory: the tiles of x, of w0, and of the products.
    pub fn shared_bytes(&self) -> usize {
        let elements = TILE_DEPTH * (self.tile_rows + TILE_COLUMNS) + self.tile_rows * TILE_COLUMNS;
        elements as usize * size_of::<f32>()
    }
}

/// Words of one virtual row in the `rows` table: input row, in-slot + 1 or 0, out-slot + 1 or 0, 1 if it is the last of its
/// output row.
pub(crate) const ROW_WORDS: u32 = 4;

/// x `[t, d]`, w0 `[d, k]`, in_pool `[slots, d]`, out_pool `[slots, k]`, rows `[V, 4]`, items `[cubes, 2]` (the virtual rows
/// from, to), bias `[k]`, y `[t, k]`.
#[cube(launch_unchecked)]
pub(crate) fn stacked<ND: Size, NK: Size>(
    x: &Array<Vector<f32, ND>>,
    w0: &Array<Vector<f32, NK>>,
    in_pool: &Array<Vector<f32, ND>>,
    out_pool: &Array<f32>,
    rows: &Array<u32>,
    items: &Array<u32>,
    bias: &Array<f32>,
    y: &mut Array<f32>,
    d: u32,
    k: u32,
    #[comptime] blueprint: StackedBlueprint,
) {
    let tile_rows = comptime!(blueprint.tile_rows);
    let units = comptime!(blueprint.units());
    let width_d = x.vector_size();
    let width_k = w0.vector_size();
    let width_d = comptime!(width_d as u32);
    let width_k = comptime!(width_k as u32);
    let vectors = comptime!(COLUMNS_PER_UNIT / width_k);
    let tile_vectors = comptime!(TILE_COLUMNS / width_k);
    let depth_vectors = comptime!(TILE_DEPTH / width_d);

    let mut x_tile = SharedMemory::<f32>::new(comptime!((TILE_DEPTH * tile_rows) as usize));
    let mut w_tile = SharedMemory::<Vector<f32, NK>>::new(comptime!((TILE_DEPTH * tile_vectors) as usize));
    let mut out_tile = SharedMemory::<f32>::new(comptime!((tile_rows * TILE_COLUMNS) as usize));

    let first = items[(CUBE_POS_Y * 2) as usize];
    let end = items[(CUBE_POS_Y * 2 + 1) as usize];
    let column0 = CUBE_POS_X * TILE_COLUMNS;
    let unit_column = (UNIT_POS % comptime!(TILE_COLUMNS / COLUMNS_PER_UNIT)) * COLUMNS_PER_UNIT;
    let unit_row = (UNIT_POS / comptime!(TILE_COLUMNS / COLUMNS_PER_UNIT)) * ROWS_PER_UNIT;
    let d_vectors = d / width_d;
    let k_vectors = k / width_k;

    // The sum of the output row that the last chunk broke off in; one column a unit.
    let mut carry = 0.0f32;
    let mut chunk = first;
    while chunk < end {
        let mut sums = Array::<Vector<f32, NK>>::new(comptime!((ROWS_PER_UNIT * vectors) as usize));
        #[unroll]
        for i in 0..comptime!(ROWS_PER_UNIT * vectors) {
            sums[i as usize] = Vector::new(0.0);
        }

        let mut depth0 = 0u32;
        while depth0 < d {
            sync_cube();
            let mut load = UNIT_POS;
            while load < comptime!(tile_rows * depth_vectors) {
                let row = load / depth_vectors;
                let step = load % depth_vectors;
                let depth = depth0 / width_d + step;
                let mut value = Vector::<f32, ND>::new(0.0);
                if chunk + row < end && depth < d_vectors {
                    let entry = (chunk + row) * ROW_WORDS;
                    value = x[(rows[entry as usize] * d_vectors + depth) as usize];
                    if comptime!(blueprint.scaled) {
                        let slot = rows[(entry + 1) as usize];
                        if slot > 0 {
                            value *= in_pool[((slot - 1) * d_vectors + depth) as usize];
                        }
                    }
                }
                #[unroll]
                for lane in 0..width_d {
                    x_tile[((step * width_d + lane) * tile_rows + row) as usize] = value[lane as usize];
                }
                load += units;
            }
            let mut load = UNIT_POS;
            while load < comptime!(TILE_DEPTH * tile_vectors) {
                let depth = depth0 + load / tile_vectors;
                let column = column0 / width_k + load % tile_vectors;
                let mut value = Vector::<f32, NK>::new(0.0);
                if depth < d && column < k_vectors {
                    value = w0[(depth * k_vectors + column) as usize];
                }
                w_tile[load as usize] = value;
                load += units;
            }
            sync_cube();

            for step in 0..TILE_DEPTH {
                let mut weights = Array::<Vector<f32, NK>>::new(comptime!(vectors as usize));
                #[unroll]
                for j in 0..vectors {
                    weights[j as usize] = w_tile[(step * tile_vectors + unit_column / width_k + j) as usize];
                }
                #[unroll]
                for i in 0..ROWS_PER_UNIT {
                    let value = Vector::<f32, NK>::new(x_tile[(step * tile_rows + unit_row + i) as usize]);
                    #[unroll]
                    for j in 0..vectors {
                        let at = comptime!((i * vectors + j) as usize);
                        sums[at] = fma(value, weights[j as usize], sums[at]);
                    }
                }
            }
            depth0 += TILE_DEPTH;
        }

        #[unroll]
        for i in 0..ROWS_PER_UNIT {
            #[unroll]
            for j in 0..vectors {
                let sum = sums[comptime!((i * vectors + j) as usize)];
                #[unroll]
                for lane in 0..width_k {
                    let column = unit_column + comptime!(j * width_k + lane);
                    out_tile[((unit_row + i) * TILE_COLUMNS + column) as usize] = sum[lane as usize];
                }
            }
        }
        sync_cube();

        let column = column0 + UNIT_POS;
        if UNIT_POS < TILE_COLUMNS && column < k {
            for row in 0..tile_rows {
                if chunk + row < end {
                    let entry = (chunk + row) * ROW_WORDS;
                    let mut value = out_tile[(row * TILE_COLUMNS + UNIT_POS) as usize];
                    if comptime!(blueprint.scaled) {
                        let slot = rows[(entry + 2) as usize];
                        if slot > 0 {
                            value *= out_pool[((slot - 1) * k + column) as usize];
                        }
                    }
                    carry += value;
                    if rows[(entry + 3) as usize] == 1 {
                        let output = rows[entry as usize] * k + column;
                        y[output as usize] = finish(carry, bias, column, comptime!(blueprint.epilogue));
                        carry = 0.0;
                    }
                }
            }
        }
        chunk += tile_rows;
    }
}
