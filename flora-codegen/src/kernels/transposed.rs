//! w0ᵀ in global memory, decoded: the weight of the adjoint layer, whose forward pass is a backward pass's dx.
//!
//! Bytes: w0 read and w0ᵀ written once, in the type of the activations. It is made for a pass and not kept.

use cubecl::prelude::*;
use flora_plan::layer::Quantisation;

use super::materialise::base_value;

/// Inputs and outputs of a cube.
pub(crate) const TRANSPOSED_SIDE: u32 = 32;
/// Floats from one staged line to the next: one more, so that lines and columns both are in different banks.
const PITCH: u32 = TRANSPOSED_SIDE + 1;

/// weight `[d, k]` or its words; made `[k, d]`.
#[cube(launch_unchecked)]
pub(crate) fn transposed<W: Numeric, Y: Float, M: Size, N: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    made: &mut Array<Vector<Y, M>>,
    d: u32,
    k: u32,
    #[comptime] quantisation: Option<Quantisation>,
    #[define(W, Y)] _types: [StorageType; 2],
) {
    let width = weight.vector_size();
    let width = comptime!(width as u32);
    let columns = k / width;
    let mut tile = SharedMemory::<f32>::new(comptime!((TRANSPOSED_SIDE * PITCH) as usize));
    let depth0 = CUBE_POS_X * TRANSPOSED_SIDE;
    let column0 = CUBE_POS_Y * comptime!(TRANSPOSED_SIDE / width);
    let line = comptime!(TRANSPOSED_SIDE / width);
    let mut at = UNIT_POS_X;
    while at < comptime!(TRANSPOSED_SIDE * line) {
        let (row, own) = (at / line, at % line);
        if depth0 + row < d && column0 + own < columns {
            let value = base_value::<W, N>(weight, weight_scales, depth0 + row, column0 + own, columns, quantisation);
            #[unroll]
            for lane in 0..width {
                tile[((own * width + lane) * PITCH + row) as usize] = value[lane as usize];
            }
        }
        at += CUBE_DIM;
    }
    sync_cube();
    let out_width = made.vector_size();
    let out_width = comptime!(out_width as u32);
    let out_columns = d / out_width;
    let out_line = comptime!(TRANSPOSED_SIDE / out_width);
    let out_row0 = CUBE_POS_Y * TRANSPOSED_SIDE;
    let out_column0 = CUBE_POS_X * out_line;
    let mut at = UNIT_POS_X;
    while at < comptime!(TRANSPOSED_SIDE * out_line) {
        let (row, own) = (at / out_line, at % out_line);
        if out_row0 + row < k && out_column0 + own < out_columns {
            let mut value = Vector::<Y, M>::empty();
            #[unroll]
            for lane in 0..out_width {
                value[lane as usize] = Y::cast_from(tile[(row * PITCH + own * out_width + lane) as usize]);
            }
            made[((out_row0 + row) * out_columns + out_column0 + own) as usize] = value;
        }
        at += CUBE_DIM;
    }
}
