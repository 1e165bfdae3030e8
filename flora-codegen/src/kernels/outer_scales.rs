//! The second half of [`super::outer`]: a tile of M multiplied by the vectors of every scale of an adapter, in f32 by units, each of
//! which has four scales, so that what it reads is used as often.

use cubecl::prelude::*;

use super::blueprint::{GROUPS, OuterBlueprint, PRODUCT_PAD, SCALES, TOGETHER};
use super::tables::{OuterLayout, outer_adapter};

/// Stages the partners of up to [`SCALES`] scales from `first` of `scales` on, `[side, SCALES]`: a vector of the pool, or ones.
#[cube]
fn stage_partners<A: Float, Q: Size>(
    pool: &Array<A>,
    tables: &Array<u32>,
    vectors: &mut SharedMemory<Vector<f32, Q>>,
    first: u32,
    scales: u32,
    start: u32,
    extent: u32,
    #[comptime] blueprint: OuterBlueprint,
) {
    let side = comptime!(blueprint.side);
    let mut at = UNIT_POS_X;
    while at < comptime!(GROUPS * side) {
        let (group, own) = (at / side, start + at % side);
        let mut value = Vector::<f32, Q>::new(0.0);
        #[unroll]
        for lane in 0..TOGETHER {
            let scale = group * TOGETHER + lane;
            if scale < scales && own < extent {
                let slot = tables[(first + scale) as usize];
                let mut number = 1.0f32;
                if slot > 0 {
                    number = f32::cast_from(pool[((slot - 1) * extent + own) as usize]);
                }
                value[lane as usize] = number;
            }
        }
        vectors[(at % side * GROUPS + group) as usize] = value;
        at += CUBE_DIM;
    }
}

/// Adds Mᵀ in_v to the cube's part of each out-scale's gradient: a unit has [`TOGETHER`] scales of a vector of outputs, so that what it
/// reads is used as often.
#[cube]
pub(crate) fn add_out_scales<A: Float, Q: Size, N: Size>(
    in_pool: &Array<A>,
    tables: &Array<u32>,
    product: &SharedMemory<Vector<f32, N>>,
    vectors: &mut SharedMemory<Vector<f32, Q>>,
    parts: &mut Array<Vector<f32, N>>,
    layout: OuterLayout,
    adapter: u32,
    depth0: u32,
    column0: u32,
    is_first: bool,
    #[comptime] blueprint: OuterBlueprint,
) {
    let side = comptime!(blueprint.side);
    let width = N::value();
    let width = comptime!(width as u32);
    let line = comptime!(side / width);
    let pitch = comptime!((side + PRODUCT_PAD) / width);
    let columns = layout.k / width;
    let first = outer_adapter::first_out(tables, adapter);
    let count = outer_adapter::out_scales(tables, adapter);
    let mut scale0 = 0u32;
    while scale0 < count {
        let partner = layout.out_partners + first + scale0;
        stage_partners::<A, Q>(in_pool, tables, vectors, partner, count - scale0, depth0, layout.d, blueprint);
        sync_cube();
        let mut at = UNIT_POS_X;
        while at < comptime!(GROUPS * line) {
            let (group, column) = (at / line, column0 / width + at % line);
            if scale0 + group * TOGETHER < count && column < columns {
                let mut sums = Array::<Vector<f32, N>>::new(comptime!(TOGETHER as usize));
                #[unroll]
                for lane in 0..comptime!(TOGETHER as usize) {
                    sums[lane] = Vector::new(0.0);
                }
                for depth in 0..side {
                    let value = product[(depth * pitch + at % line) as usize];
                    let factors = vectors[(depth * GROUPS + group) as usize];
                    #[unroll]
                    for lane in 0..comptime!(TOGETHER as usize) {
                        sums[lane] = fma(Vector::new(factors[lane]), value, sums[lane]);
                    }
                }
                #[unroll]
                for lane in 0..TOGETHER {
                    let scale = scale0 + group * TOGETHER + lane;
                    if scale < count {
                        let own = (CUBE_POS_X * layout.out_scales + first + scale) * columns + column;
                        let mut sum = sums[lane as usize];
                        if !is_first {
                            sum += parts[own as usize];
                        }
                        parts[own as usize] = sum;
                    }
                }
            }
            at += CUBE_DIM;
        }
        sync_cube();
        scale0 += SCALES;
    }
}

/// Adds M out_v to the cube's part of each in-scale's gradient, likewise.
#[cube]
pub(crate) fn add_in_scales<A: Float, Q: Size, N: Size>(
    out_pool: &Array<A>,
    tables: &Array<u32>,
    product: &SharedMemory<Vector<f32, N>>,
    vectors: &mut SharedMemory<Vector<f32, Q>>,
    parts: &mut Array<f32>,
    layout: OuterLayout,
    adapter: u32,
    depth0: u32,
    column0: u32,
    is_first: bool,
    #[comptime] blueprint: OuterBlueprint,
) {
    let side = comptime!(blueprint.side);
    let width = N::value();
    let width = comptime!(width as u32);
    let line = comptime!(side / width);
    let pitch = comptime!((side + PRODUCT_PAD) / width);
    let first = outer_adapter::first_in(tables, adapter);
    let count = outer_adapter::in_scales(tables, adapter);
    let mut scale0 = 0u32;
    while scale0 < count {
        let partner = layout.in_partners + first + scale0;
        stage_partners::<A, Q>(out_pool, tables, vectors, partner, count - scale0, column0, layout.k, blueprint);
        sync_cube();
        let mut at = UNIT_POS_X;
        while at < comptime!(GROUPS * side) {
            let (group, depth) = (at / side, at % side);
            if scale0 + group * TOGETHER < count && depth0 + depth < layout.d {
                let mut sums = Vector::<f32, Q>::new(0.0);
                for place in 0..line {
                    let value = product[(depth * pitch + place) as usize];
                    #[unroll]
                    for lane in 0..width {
                        let factors = vectors[((place * width + lane) * GROUPS + group) as usize];
                        sums = fma(Vector::new(value[lane as usize]), factors, sums);
                    }
                }
                #[unroll]
                for lane in 0..TOGETHER {
                    let scale = scale0 + group * TOGETHER + lane;
                    if scale < count {
                        let own = (CUBE_POS_Y * layout.in_scales + first + scale) * layout.d + depth0 + depth;
                        let mut sum = sums[lane as usize];
                        if !is_first {
                            sum += parts[own as usize];
                        }
                        parts[own as usize] = sum;
                    }
                }
            }
            at += CUBE_DIM;
        }
        sync_cube();
        scale0 += SCALES;
    }
}
