//! What turns a tile of w0 into one of W_i: u + Σ_v in_v out_vᵀ for the scaled virtual rows of an adapter, u the number of
//! unscaled ones. By fragments where there are any, since the rank of an adapter fills one.
//!
//! MACs: r·depth·columns a tile, ranks rounded up to a chunk of 16.

use cubecl::prelude::*;

use super::blueprint::{ALIGNMENT, Multiply, PAD, RANK_CHUNK, SUM_PAD, TileBlueprint};
use super::fetched::{Depths, Fetched, place};
use super::item;
use super::places::vector_places;
use super::stage::{fetch_vectors, stage_vectors};
use super::tables::{self, Layout};
use super::units::{plane, staged_at, staged_column, staged_row, stages};

/// The factor of every weight of the tile, `[depth, columns + SUM_PAD]`; 1 for an item without a W_i. The first in-vectors
/// have been fetched.
#[cube]
pub(crate) fn multiplier<A: Float, S: Float, M: Size, N: Size, XW: Size, AW: Size, WW: Size>(
    in_pool: &Array<Vector<A, M>>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    fetched: &mut Fetched<N, XW, AW, WW>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    depth0: u32,
    depths: Depths,
    #[comptime] blueprint: TileBlueprint,
) -> SharedMemory<Vector<f32, N>> {
    let tile = comptime!(blueprint.tile);
    let row_width = in_pool.vector_size();
    let row_width = comptime!(row_width as u32);
    let width = out_pool.vector_size();
    let width = comptime!(width as u32);
    let units = comptime!(blueprint.units());
    let in_pitch = comptime!((tile.depth + PAD) / row_width);
    let line = comptime!(tile.columns / width);
    let pitch = comptime!((tile.columns + PAD) / width);
    let factor_pitch = comptime!((tile.columns + SUM_PAD) / width);
    let (m, n, k) = comptime!(blueprint.multiply.fragment().unwrap_or((1, 1, 1)));
    let is_fma = comptime!(matches!(blueprint.multiply, Multiply::Fma));
    let mut in_tile = SharedMemory::<Vector<S, M>>::new_aligned(comptime!((RANK_CHUNK * in_pitch) as usize), ALIGNMENT);
    let mut out_tile = SharedMemory::<Vector<S, N>>::new_aligned(comptime!((RANK_CHUNK * pitch) as usize), ALIGNMENT);
    let mut factor =
        SharedMemory::<Vector<f32, N>>::new_aligned(comptime!((tile.depth * factor_pitch) as usize), ALIGNMENT);

    let first = item::first_scale(entry);
    let end = item::end_scale(entry);
    let plain = plain_factor(entry);
    // Fragments of the factor, shared out among the planes.
    let planes = comptime!(blueprint.planes());
    let across = comptime!(tile.columns / n);
    let plane = plane(units, planes);
    let own = comptime!(if is_fma { 0 } else { (tile.depth / m * across).div_ceil(planes) });
    let mut products = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..own {
        products.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            comptime!(m as usize),
            comptime!(n as usize),
            comptime!(k as usize),
            cmma::MatrixLayout::Undefined,
            plain,
        ));
    }

    let mut chunk = first;
    while chunk < end {
        stage_vectors::<A, S, M, N, XW, AW, WW>(fetched, &mut in_tile, 0u32, blueprint);
        // An adapter whose vectors fit one chunk keeps its out-vectors from the first step of d on.
        if depth0 == depths.start || end - first > RANK_CHUNK {
            stage_out_vectors::<A, S, N>(out_pool, tables, layout, entry, chunk, &mut out_tile, 0u32, blueprint);
        }
        sync_cube();
        if is_fma {
            let mut at = UNIT_POS_X;
            while at < comptime!(tile.depth * line) {
                let depth = at / line;
                let mut sum = Vector::<f32, N>::new(plain);
                if chunk > first {
                    sum = factor[(depth * factor_pitch + at % line) as usize];
                }
                for rank in 0..min(end - chunk, RANK_CHUNK) {
                    let vector = in_tile[(rank * in_pitch + depth / row_width) as usize];
                    let mut value = f32::cast_from(vector[0usize]);
                    #[unroll]
                    for lane in 1..row_width {
                        value = select(depth % row_width == lane, f32::cast_from(vector[lane as usize]), value);
                    }
                    let out = Vector::<f32, N>::cast_from(out_tile[(rank * pitch + at % line) as usize]);
                    sum = fma(Vector::new(value), out, sum);
                }
                factor[(depth * factor_pitch + at % line) as usize] = sum;
                // A stride that the compiler does not know keeps it from unrolling into spills.
                at += CUBE_DIM;
            }
        } else {
            #[unroll]
            for position in 0..own {
                let fragment = plane + comptime!(position * planes);
                if comptime!((tile.depth / m * across).is_multiple_of(planes))
                    || fragment < comptime!(tile.depth / m * across)
                {
                    let down = fragment_at(plane, position, across, planes, comptime!(m / row_width), 0u32);
                    let right = fragment_at(plane, position, across, planes, 0u32, comptime!(n / width));
                    let product = products.index(comptime!(position as usize));
                    #[unroll]
                    for step in 0..comptime!(RANK_CHUNK / k) {
                        let a_at = down + comptime!(step * k * in_pitch);
                        let a = cmma::Matrix::<Vector<S, M>>::from_slice(
                            cmma::MatrixIdent::A,
                            comptime!(m as usize),
                            comptime!(n as usize),
                            comptime!(k as usize),
                            cmma::MatrixLayout::ColMajor,
                            &in_tile.slice(a_at as usize, in_tile.len()),
                            comptime!(in_pitch * row_width),
                        );
                        let b_at = right + comptime!(step * k * pitch);
                        let b = cmma::Matrix::<Vector<S, N>>::from_slice(
                            cmma::MatrixIdent::B,
                            comptime!(m as usize),
                            comptime!(n as usize),
                            comptime!(k as usize),
                            cmma::MatrixLayout::RowMajor,
                            &out_tile.slice(b_at as usize, out_tile.len()),
                            comptime!(pitch * width),
                        );
                        cmma::execute(&a, &b, product, product);
                    }
                }
            }
        }
        sync_cube();
        chunk += RANK_CHUNK;
        if chunk < end {
            let mut places = vector_places::<M>(tables, layout, entry, chunk, depth0, blueprint);
            fetch_vectors::<A, M, N, XW, AW, WW>(in_pool, fetched, &mut places, depth0, depths, true, blueprint);
        }
    }
    if !is_fma {
        #[unroll]
        for position in 0..own {
            let fragment = plane + comptime!(position * planes);
            if comptime!((tile.depth / m * across).is_multiple_of(planes))
                || fragment < comptime!(tile.depth / m * across)
            {
                let at =
                    fragment_at(plane, position, across, planes, comptime!(m * factor_pitch), comptime!(n / width));
                let len = factor.len();
                cmma::store(
                    &mut factor.slice_mut(at as usize, len),
                    products.index(comptime!(position as usize)),
                    comptime!(factor_pitch * width),
                    cmma::MatrixLayout::RowMajor,
                );
            }
        }
        sync_cube();
    }
    if is_fma && first == end {
        let mut at = UNIT_POS_X;
        while at < comptime!(tile.depth * line) {
            factor[(at / line * factor_pitch + at % line) as usize] = Vector::new(plain);
            at += CUBE_DIM;
        }
        sync_cube();
    }
    factor
}

/// What every factor of an item starts at: the number of unscaled virtual rows of its W_i; 1 for one without a W_i.
#[cube]
pub(crate) fn plain_factor(entry: &SharedMemory<u32>) -> f32 {
    let mut plain = f32::cast_from(item::unscaled(entry));
    if item::first_scale(entry) == item::end_scale(entry) && item::unscaled(entry) == 0 {
        plain = 1.0f32.runtime();
    }
    plain
}

/// Stages the out-vectors of the scales from `rank`, `[blueprint.on_chip, columns + PAD]` from vector `start` on; zeros of scales that aren't there.
#[cube]
pub(crate) fn stage_out_vectors<A: Float, S: Float, N: Size>(
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    rank: u32,
    out_tile: &mut SharedMemory<Vector<S, N>>,
    start: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let width = N::value();
    let width = comptime!(width as u32);
    let units = comptime!(blueprint.units());
    let lines = comptime!(blueprint.on_chip);
    let line = comptime!(blueprint.tile.columns / width);
    let pitch = comptime!((blueprint.tile.columns + PAD) / width);
    let columns = layout.k / width;
    let column0 = item::column_tile(entry, blueprint) * line;
    #[unroll]
    for pass in 0..comptime!((lines * line).div_ceil(units)) {
        if stages(pass, line, lines, units) {
            let own = staged_row(rank, pass, line, units);
            let column = min(column0 + staged_column(pass, line, units), columns - 1);
            let mut value = Vector::<S, N>::new(S::new(0.0));
            if own < item::end_scale(entry) {
                value = Vector::new(S::new(1.0));
                let slot = tables::scale::out_slot(tables, layout.scales + own * tables::scale::WORDS);
                if slot > 0 {
                    value = Vector::cast_from(out_pool[((slot - 1) * columns + column) as usize]);
                }
            }
            place::<S, N>(out_tile, start + staged_at(pass, line, pitch, units), value, blueprint);
        }
    }
}

/// Where the fragment that the unit's plane makes as its `position`th lies, where fragments are `below` apart downwards and
/// `beside` sideways, `across` in a line.
#[cube]
fn fragment_at(
    plane: u32,
    #[comptime] position: u32,
    #[comptime] across: u32,
    #[comptime] planes: u32,
    #[comptime] below: u32,
    #[comptime] beside: u32,
) -> u32 {
    if comptime!(planes.is_multiple_of(across)) {
        plane / across * below + plane % across * beside + comptime!(position * (planes / across) * below)
    } else {
        let fragment = plane + comptime!(position * planes);
        fragment / across * below + fragment % across * beside
    }
}
