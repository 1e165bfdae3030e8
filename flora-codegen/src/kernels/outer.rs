//! The gradients of adapters' scales by tiles of M = G ∘ w0, where G = xᵀ g over an adapter's rows:
//!
//! ```text
//! out_v = Mᵀ in_v        in_v = M out_v
//! ```
//!
//! A cube owns some inputs and some outputs of one adapter, and goes over them in tiles: it makes one of G in shared memory, by
//! fragments where there are any, multiplies it by w0's, and then by the vectors of every scale. So M costs one product however many
//! scales there are, and is never in global memory. What a cube has of a gradient is a partial sum: of an in-scale's one for each
//! cube along the outputs, of an out-scale's one for each along the inputs. [`super::gradients::sum_parts`] adds them in order.
//!
//! MACs: t·d·k for an adapter's t rows, d·k, and d·k for each scale; the last two in f32 by units, because M of half types has
//! numbers below the least of f16. Bytes: w0 once an adapter, x and g once for each tile along the other extent.
//!
//! A row is padded with zeros to the next step of rows, and sums go over an adapter's own rows in the order of the batch. So the bits
//! of an adapter's gradients don't depend on the rest of it.

use cubecl::prelude::*;

use super::blueprint::{
    ALIGNMENT, COLUMNS_PER_UNIT, GROUPS, Multiply, OuterBlueprint, PAD, PLANES, PRODUCT_PAD, ROWS_PER_UNIT, TOGETHER,
};
use super::materialise::base_value;
use super::outer_scales::{add_in_scales, add_out_scales};
use super::tables::{OuterLayout, outer_adapter};

/// x `[t, d]`, g `[t, k]`, weight `[d, k]` or its words, in_pool `[slots, d]`, out_pool `[slots, k]`, tables: adapters, then what
/// `layout` says; in_parts `[cubes along the outputs, in-scales, d]`, out_parts `[cubes along the inputs, out-scales, k]`.
#[cube(launch_unchecked)]
pub(crate) fn outer<X: Float, W: Numeric, A: Float, S: Float, M: Size, P: Size, N: Size>(
    x: &Array<Vector<X, M>>,
    g: &Array<Vector<X, P>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<A>,
    out_pool: &Array<A>,
    tables: &Array<u32>,
    in_parts: &mut Array<f32>,
    out_parts: &mut Array<Vector<f32, N>>,
    layout: OuterLayout,
    #[comptime] blueprint: OuterBlueprint,
    #[define(X, W, A, S)] _types: [StorageType; 4],
) {
    let side = comptime!(blueprint.side);
    let row_width = M::value();
    let gradient_width = P::value();
    let width = N::value();
    let lines = comptime!(blueprint.rows() * (side + PAD));
    let mut x_tile = SharedMemory::<Vector<S, M>>::new_aligned(comptime!(lines as usize / row_width), ALIGNMENT);
    let mut g_tile = SharedMemory::<Vector<S, P>>::new_aligned(comptime!(lines as usize / gradient_width), ALIGNMENT);
    let mut product = SharedMemory::<Vector<f32, N>>::new_aligned(
        comptime!((side * (side + PRODUCT_PAD)) as usize / width),
        ALIGNMENT,
    );
    let size!(Q) = comptime!(TOGETHER as usize);
    let mut vectors = SharedMemory::<Vector<f32, Q>>::new_aligned(comptime!((GROUPS * side) as usize), ALIGNMENT);
    let adapter = CUBE_POS_Z * outer_adapter::WORDS;
    for input_tile in 0..layout.input_tiles {
        let depth0 = (CUBE_POS_X * layout.input_tiles + input_tile) * side;
        for output_tile in 0..layout.output_tiles {
            let column0 = (CUBE_POS_Y * layout.output_tiles + output_tile) * side;
            if depth0 < layout.d && column0 < layout.k {
                multiply_rows::<X, S, M, P, N>(
                    x,
                    g,
                    tables,
                    &mut x_tile,
                    &mut g_tile,
                    &mut product,
                    layout,
                    adapter,
                    depth0,
                    column0,
                    blueprint,
                );
                multiply_weight::<W, N>(weight, weight_scales, &mut product, layout, depth0, column0, blueprint);
                sync_cube();
                add_out_scales::<A, Q, N>(
                    in_pool,
                    tables,
                    &product,
                    &mut vectors,
                    out_parts,
                    layout,
                    adapter,
                    depth0,
                    column0,
                    input_tile == 0,
                    blueprint,
                );
                add_in_scales::<A, Q, N>(
                    out_pool,
                    tables,
                    &product,
                    &mut vectors,
                    in_parts,
                    layout,
                    adapter,
                    depth0,
                    column0,
                    output_tile == 0,
                    blueprint,
                );
            }
        }
    }
}

/// Stages rows of one of the factors of G, `[rows, side + PAD]`; zeros of rows and numbers that aren't there.
#[cube]
fn stage_rows<T: Float, S: Float, V: Size>(
    from: &Array<Vector<T, V>>,
    tables: &Array<u32>,
    tile: &mut SharedMemory<Vector<S, V>>,
    first: u32,
    rows: u32,
    start: u32,
    extent: u32,
    #[comptime] blueprint: OuterBlueprint,
) {
    let width = V::value();
    let width = comptime!(width as u32);
    let line = comptime!(blueprint.side / width);
    let pitch = comptime!((blueprint.side + PAD) / width);
    let mut at = UNIT_POS_X;
    while at < comptime!(blueprint.rows() * line) {
        let (row, own) = (at / line, at % line);
        let place = start / width + own;
        let mut value = Vector::<S, V>::new(S::new(0.0));
        if row < rows && place < extent / width {
            let token = tables[(first + row) as usize];
            value = Vector::cast_from(from[(token * (extent / width) + place) as usize]);
        }
        tile[(row * pitch + own) as usize] = value;
        at += CUBE_DIM;
    }
}

/// A tile of G, `[side, side + PRODUCT_PAD]`.
#[cube]
fn multiply_rows<X: Float, S: Float, M: Size, P: Size, N: Size>(
    x: &Array<Vector<X, M>>,
    g: &Array<Vector<X, P>>,
    tables: &Array<u32>,
    x_tile: &mut SharedMemory<Vector<S, M>>,
    g_tile: &mut SharedMemory<Vector<S, P>>,
    product: &mut SharedMemory<Vector<f32, N>>,
    layout: OuterLayout,
    adapter: u32,
    depth0: u32,
    column0: u32,
    #[comptime] blueprint: OuterBlueprint,
) {
    let own = layout.rows + outer_adapter::first_row(tables, adapter);
    let rows = outer_adapter::rows(tables, adapter);
    let is_fma = comptime!(matches!(blueprint.multiply, Multiply::Fma));
    let (m, n, k) = comptime!(blueprint.multiply.fragment().unwrap_or((1, 1, 1)));
    let down = comptime!(blueprint.side / PLANES / m);
    let across = comptime!(blueprint.side / PLANES / n);
    let mut sums = Array::<f32>::new(comptime!((ROWS_PER_UNIT * COLUMNS_PER_UNIT) as usize));
    #[unroll]
    for at in 0..comptime!((ROWS_PER_UNIT * COLUMNS_PER_UNIT) as usize) {
        sums[at] = 0.0f32;
    }
    let mut fragments = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(if is_fma { 0 } else { down * across }) {
        fragments.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            comptime!(m as usize),
            comptime!(n as usize),
            comptime!(k as usize),
            cmma::MatrixLayout::Undefined,
            0.0,
        ));
    }
    let mut first = 0u32;
    while first < rows {
        stage_rows::<X, S, M>(x, tables, x_tile, own + first, rows - first, depth0, layout.d, blueprint);
        stage_rows::<X, S, P>(g, tables, g_tile, own + first, rows - first, column0, layout.k, blueprint);
        sync_cube();
        if comptime!(is_fma) {
            by_units::<S, M, P>(x_tile, g_tile, &mut sums, min(rows - first, comptime!(blueprint.rows())), blueprint);
        } else {
            by_fragments::<S, M, P>(x_tile, g_tile, &mut fragments, blueprint);
        }
        sync_cube();
        first += comptime!(blueprint.rows());
    }
    let width = N::value();
    let width = comptime!(width as u32);
    let pitch = comptime!((blueprint.side + PRODUCT_PAD) / width);
    if comptime!(is_fma) {
        let units = comptime!(blueprint.side / COLUMNS_PER_UNIT);
        let row0 = UNIT_POS_X / units * ROWS_PER_UNIT;
        let place = UNIT_POS_X % units * comptime!(COLUMNS_PER_UNIT / width);
        #[unroll]
        for i in 0..ROWS_PER_UNIT {
            #[unroll]
            for j in 0..comptime!(COLUMNS_PER_UNIT / width) {
                let mut value = Vector::<f32, N>::empty();
                #[unroll]
                for lane in 0..width {
                    value[lane as usize] = sums[comptime!((i * COLUMNS_PER_UNIT + j * width + lane) as usize)];
                }
                product[((row0 + i) * pitch + place + j) as usize] = value;
            }
        }
    } else {
        let plane = UNIT_POS_X / comptime!(blueprint.plane_size);
        let row0 = plane / PLANES * comptime!(blueprint.side / PLANES * pitch);
        let place = plane % PLANES * comptime!(blueprint.side / PLANES / width);
        #[unroll]
        for i in 0..down {
            #[unroll]
            for j in 0..across {
                let at = row0 + place + comptime!(i * m * pitch + j * n / width);
                let end = product.len();
                cmma::store(
                    &mut product.slice_mut(at as usize, end),
                    fragments.index(comptime!((i * across + j) as usize)),
                    comptime!(pitch * width),
                    cmma::MatrixLayout::RowMajor,
                );
            }
        }
    }
    sync_cube();
}

/// Adds the products of staged rows to the square of sums of a unit.
#[cube]
fn by_units<S: Float, M: Size, P: Size>(
    x_tile: &SharedMemory<Vector<S, M>>,
    g_tile: &SharedMemory<Vector<S, P>>,
    sums: &mut Array<f32>,
    rows: u32,
    #[comptime] blueprint: OuterBlueprint,
) {
    let units = comptime!(blueprint.side / COLUMNS_PER_UNIT);
    let input = UNIT_POS_X / units;
    let output = UNIT_POS_X % units;
    for row in 0..rows {
        let left = four::<S, M>(x_tile, row, input, blueprint);
        let right = four::<S, P>(g_tile, row, output, blueprint);
        #[unroll]
        for i in 0..ROWS_PER_UNIT {
            #[unroll]
            for j in 0..COLUMNS_PER_UNIT {
                let at = comptime!((i * COLUMNS_PER_UNIT + j) as usize);
                sums[at] = fma(left[i as usize], right[j as usize], sums[at]);
            }
        }
    }
}

/// The `position`th four numbers of a staged row.
#[cube]
fn four<S: Float, V: Size>(
    tile: &SharedMemory<Vector<S, V>>,
    row: u32,
    position: u32,
    #[comptime] blueprint: OuterBlueprint,
) -> Array<f32> {
    let width = V::value();
    let width = comptime!(width as u32);
    let first = row * comptime!((blueprint.side + PAD) / width) + position * comptime!(4 / width);
    let mut numbers = Array::<f32>::new(4usize);
    #[unroll]
    for place in 0..comptime!(4 / width) {
        let vector = tile[(first + place) as usize];
        #[unroll]
        for lane in 0..width {
            numbers[comptime!((place * width + lane) as usize)] = f32::cast_from(vector[lane as usize]);
        }
    }
    numbers
}

/// Adds the products of staged rows to the fragments of a plane.
#[cube]
fn by_fragments<S: Float, M: Size, P: Size>(
    x_tile: &SharedMemory<Vector<S, M>>,
    g_tile: &SharedMemory<Vector<S, P>>,
    fragments: &mut Sequence<cmma::Matrix<f32>>,
    #[comptime] blueprint: OuterBlueprint,
) {
    let (m, n, k) = comptime!(blueprint.multiply.fragment().unwrap_or((1, 1, 1)));
    let half = comptime!(blueprint.side / PLANES);
    let (down, across) = comptime!((half / m, half / n));
    let row_width = M::value();
    let row_width = comptime!(row_width as u32);
    let width = P::value();
    let width = comptime!(width as u32);
    let pitch = comptime!(blueprint.side + PAD);
    let plane = UNIT_POS_X / comptime!(blueprint.plane_size);
    let input0 = plane / PLANES * comptime!(half / row_width);
    let output0 = plane % PLANES * comptime!(half / width);
    // Devices with small fragments expand each into scalars, and would compile for seconds.
    #[unroll(k >= 16)]
    for step in 0..comptime!(blueprint.rows() / k) {
        let mut right = Sequence::<cmma::Matrix<Vector<S, P>>>::new();
        #[unroll]
        for j in 0..across {
            let at = output0 + step * comptime!(k * pitch / width) + comptime!(j * n / width);
            right.push(cmma::Matrix::<Vector<S, P>>::from_slice(
                cmma::MatrixIdent::B,
                comptime!(m as usize),
                comptime!(n as usize),
                comptime!(k as usize),
                cmma::MatrixLayout::RowMajor,
                &g_tile.slice(at as usize, g_tile.len()),
                pitch,
            ));
        }
        #[unroll]
        for i in 0..down {
            let at = input0 + step * comptime!(k * pitch / row_width) + comptime!(i * m / row_width);
            let left = cmma::Matrix::<Vector<S, M>>::from_slice(
                cmma::MatrixIdent::A,
                comptime!(m as usize),
                comptime!(n as usize),
                comptime!(k as usize),
                cmma::MatrixLayout::ColMajor,
                &x_tile.slice(at as usize, x_tile.len()),
                pitch,
            );
            #[unroll]
            for j in 0..across {
                let sum = fragments.index(comptime!((i * across + j) as usize));
                cmma::execute(&left, right.index(comptime!(j as usize)), sum, sum);
            }
        }
    }
}

/// Turns a tile of G into one of M.
#[cube]
fn multiply_weight<W: Numeric, N: Size>(
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    product: &mut SharedMemory<Vector<f32, N>>,
    layout: OuterLayout,
    depth0: u32,
    column0: u32,
    #[comptime] blueprint: OuterBlueprint,
) {
    let width = N::value();
    let width = comptime!(width as u32);
    let line = comptime!(blueprint.side / width);
    let pitch = comptime!((blueprint.side + PRODUCT_PAD) / width);
    let columns = layout.k / width;
    let mut at = UNIT_POS_X;
    while at < comptime!(blueprint.side * line) {
        let (depth, column) = (at / line, column0 / width + at % line);
        // What lies beyond the weight is 0.
        if depth0 + depth < layout.d && column < columns {
            let own = (depth * pitch + at % line) as usize;
            let value = base_value::<W, N>(
                weight,
                weight_scales,
                depth0 + depth,
                column,
                columns,
                comptime!(blueprint.quantisation),
            );
            product[own] = product[own] * value;
        }
        at += CUBE_DIM;
    }
}
