//! What a decoder does to rows by themselves: norms and products.
//!
//! Bytes of a norm: x once and y once, a cube for each row, whose numbers come from the caches when they are read again. Sums are made
//! in an order that depends on the width alone.

use cubecl::prelude::*;

/// The comptime key of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormBlueprint {
    /// Units of a cube, a power of two.
    pub units: u32,
    /// Whether the mean is subtracted and an offset added.
    pub centred: bool,
}

/// y = (x − mean) / √(variance + ε) ∘ gamma + beta, or x / √(mean square + ε) ∘ gamma. x `[rows, width]`, a cube each.
#[cube(launch_unchecked)]
pub(crate) fn normalise<E: Float, N: Size>(
    x: &Array<Vector<E, N>>,
    gamma: &Array<Vector<f32, N>>,
    beta: &Array<Vector<f32, N>>,
    y: &mut Array<Vector<E, N>>,
    rows: u32,
    width: u32,
    epsilon: f32,
    #[comptime] blueprint: NormBlueprint,
    #[define(E)] _element: StorageType,
) {
    let lanes = N::value();
    let vectors = width / comptime!(lanes as u32);
    let mut parts = SharedMemory::<f32>::new(comptime!(blueprint.units as usize));
    let row = CUBE_POS as u32;
    if row < rows {
        let first = row * vectors;
        let mut mean = 0.0f32.runtime();
        if comptime!(blueprint.centred) {
            let mut sums = Vector::<f32, N>::new(0.0);
            let mut at = UNIT_POS_X;
            while at < vectors {
                sums += Vector::cast_from(x[(first + at) as usize]);
                at += comptime!(blueprint.units);
            }
            mean = total::<N>(sums, &mut parts, comptime!(blueprint.units)) / f32::cast_from(width);
        }
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut at = UNIT_POS_X;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[(first + at) as usize]) - Vector::new(mean);
            squares = fma(value, value, squares);
            at += comptime!(blueprint.units);
        }
        let square = total::<N>(squares, &mut parts, comptime!(blueprint.units)) / f32::cast_from(width);
        let scale = 1.0f32 / f32::sqrt(square + epsilon);
        let mut at = UNIT_POS_X;
        while at < vectors {
            let value = Vector::<f32, N>::cast_from(x[(first + at) as usize]) - Vector::new(mean);
            let mut result = value * Vector::new(scale) * gamma[at as usize];
            if comptime!(blueprint.centred) {
                result += beta[at as usize];
            }
            y[(first + at) as usize] = Vector::cast_from(result);
            at += comptime!(blueprint.units);
        }
    }
}

/// The sum over all units and lanes, for each of them.
#[cube]
fn total<N: Size>(own: Vector<f32, N>, parts: &mut SharedMemory<f32>, #[comptime] units: u32) -> f32 {
    let lanes = N::value();
    let mut sum = 0.0f32.runtime();
    #[unroll]
    for lane in 0..lanes {
        sum += own[lane];
    }
    // What was summed before has been read by all.
    sync_cube();
    parts[UNIT_POS_X as usize] = sum;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if UNIT_POS_X < half {
            let other = parts[(UNIT_POS_X + half) as usize];
            parts[UNIT_POS_X as usize] += other;
        }
        sync_cube();
        half /= 2;
    }
    parts[0]
}

/// one ∘ other
#[cube(launch_unchecked)]
pub(crate) fn multiply<E: Float, N: Size>(
    one: &Array<Vector<E, N>>,
    other: &Array<Vector<E, N>>,
    y: &mut Array<Vector<E, N>>,
    vectors: u32,
    #[define(E)] _element: StorageType,
) {
    let at = ABSOLUTE_POS as u32;
    if at < vectors {
        let product = Vector::<f32, N>::cast_from(one[at as usize]) * Vector::cast_from(other[at as usize]);
        y[at as usize] = Vector::cast_from(product);
    }
}
