//! The kernel that multiplies by the base weight: one pass for rows of every kind, one launch, the output written once.
//!
//! A cube multiplies one *item*, a range of virtual rows made of whole output rows, by one column tile. A virtual row (paper Eq. 6)
//! is an input row with its own in-scale and out-scale; base rows have none, IA3 rows one, fLoRA rows of rank r are r of them. An
//! item of `on_chip` has a W_i of its own: w0's tile is multiplied by Σ_v in_v out_vᵀ on its way to the product. Low-rank sums (`fused`) are
//! made by the first cubes that start, while the others multiply, and are expanded in the epilogue.
//!
//! MACs: V·d·k for V virtual rows; for an item of W_i with r scales r·d·k more; t·r·(d + k) for low-rank sums. Bytes: w0 once for
//! each `rows` of the tile, everything else once (x, scales and vectors again from the second-level cache for each column tile).
//!
//! Every sum runs over d in order, and every output adds its virtual rows in order, whatever tile they fall in: the bits of a
//! row don't depend on the rest of the batch.

use cubecl::prelude::*;

use super::blueprint::{ALIGNMENT, RANK_CHUNK, SUM_PAD, TileBlueprint};
use super::fetched::{Depths, fetches_ahead, nothing_fetched, ragged_first};
use super::item::{self, COLUMN_TILE, CUBE_ITEM_WORDS, ITEM_WORDS, SPLIT};
use super::multiply::{Sums, multiply, no_sums, store_strip};
use super::multiply_registers::{Factors, Lanes, lanes, load_out_vectors, no_factors, start_factors};
use super::on_chip::{multiplier, plain_factor, stage_out_vectors};
use super::output::{take_hidden, write_partial, write_strip};
use super::places::places;
use super::shrink::shrink_products;
use super::stage::{fetch, stage_rows, stage_vectors, stage_weight};
use super::staged::{Staged, first_stage, out_start, staged, turn, weight_parts};
use super::tables::{H_START, Layout, NO_SUM, TASK_SIDE, shrink_task};
use super::words::word_count;

/// x `[t, d]`, weight `[.., d, k]` or its words, weight_scales of a quantised one, in_pool `[slots, d]`, out_pool `[slots, k]`,
/// tables: virtual rows first, then what `layout` says, as it does of h; bias `[k]`, residual and y `[t, k]`, or y the
/// partial sums `[splits, V, k]`.
#[cube(launch_unchecked)]
pub(crate) fn tile<X: Float, W: Numeric, A: Float, S: Float, Y: Float, M: Size, N: Size>(
    x: &Array<Vector<X, M>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<Vector<A, M>>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    h: &mut Array<Atomic<u32>>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    y: &mut Array<Vector<Y, N>>,
    layout: Layout,
    #[comptime] blueprint: TileBlueprint,
    #[define(X, W, A, S, Y)] _types: [StorageType; 5],
) {
    let mut staged = staged::<S, M, N>(layout.k > 0, blueprint);
    if comptime!(blueprint.hidden > 0) {
        // Cubes are numbered as they start, so that whoever waits for h waits for cubes that run.
        let mut ticket = SharedMemory::<u32>::new(1usize);
        if UNIT_POS_X == 0 {
            ticket[0] = h[layout.hidden as usize].fetch_add(1u32);
        }
        sync_cube();
        let cube = ticket[0];
        // What comes next may lie where the ticket lay.
        sync_cube();
        if cube < layout.task_count {
            make_hidden::<X, A, S, M>(x, in_pool, tables, h, layout, cube, blueprint);
            empty_stale(h, layout, cube);
        } else {
            let at = cube - layout.task_count;
            let rest = at / layout.item_count;
            multiply_item::<X, W, A, S, Y, M, N>(
                x,
                weight,
                weight_scales,
                in_pool,
                out_pool,
                tables,
                h,
                bias,
                residual,
                y,
                layout,
                &mut staged,
                at % layout.item_count,
                rest % layout.column_tiles,
                rest / layout.column_tiles,
                blueprint,
            );
        }
    } else {
        multiply_item::<X, W, A, S, Y, M, N>(
            x,
            weight,
            weight_scales,
            in_pool,
            out_pool,
            tables,
            h,
            bias,
            residual,
            y,
            layout,
            &mut staged,
            CUBE_POS_X,
            CUBE_POS_Y,
            CUBE_POS_Z,
            blueprint,
        );
    }
}

/// One shrink task, its sums published one by one: each is its own flag.
#[cube]
fn make_hidden<X: Float, A: Float, S: Float, M: Size>(
    x: &Array<Vector<X, M>>,
    in_pool: &Array<Vector<A, M>>,
    tables: &Array<u32>,
    h: &mut Array<Atomic<u32>>,
    layout: Layout,
    cube: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let task = layout.tasks + cube * shrink_task::WORDS;
    let units = comptime!(blueprint.units());
    let result = shrink_products::<X, A, S, M>(
        x,
        in_pool,
        tables,
        task,
        layout.d,
        comptime!(blueprint.multiply),
        units,
        comptime!(blueprint.planes()),
    );
    let mut pair = UNIT_POS_X;
    while pair < comptime!(TASK_SIDE * TASK_SIDE) {
        let row = pair / TASK_SIDE;
        let rank = pair % TASK_SIDE;
        if row < shrink_task::rows(tables, task) && rank < shrink_task::ranks(tables, task) {
            let own = shrink_task::hidden(tables, task) + row * shrink_task::pitch(tables, task) + rank;
            let at = layout.hidden + H_START + own;
            let mut bits = u32::reinterpret(result[pair as usize]);
            if bits == NO_SUM {
                // A NaN all the same.
                bits = 0x7fc0_0000u32;
            }
            h[at as usize].store(bits);
        }
        pair += CUBE_DIM;
    }
}

/// Empties what the launch before has left, for the one that comes next: a part by each cube that makes sums.
#[cube]
fn empty_stale(h: &mut Array<Atomic<u32>>, layout: Layout, cube: u32) {
    let mut at = cube * CUBE_DIM + UNIT_POS_X;
    while at < layout.stale_count {
        // A ticket starts at 0.
        let mut empty = 0u32;
        if at >= H_START {
            empty = NO_SUM;
        }
        h[(layout.stale + at) as usize].store(empty);
        at += layout.task_count * CUBE_DIM;
    }
}

#[cube]
fn multiply_item<X: Float, W: Numeric, A: Float, S: Float, Y: Float, M: Size, N: Size>(
    x: &Array<Vector<X, M>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<Vector<A, M>>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    h: &mut Array<Atomic<u32>>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    y: &mut Array<Vector<Y, N>>,
    layout: Layout,
    staged: &mut Staged<S, M, N>,
    item: u32,
    column_tile: u32,
    split: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let tile = comptime!(blueprint.tile);
    let width = out_pool.vector_size();
    let width = comptime!(width as u32);
    let sum_elements = comptime!((tile.rows * (blueprint.strip() + SUM_PAD) / width) as usize);
    let mut sum_tile = SharedMemory::<Vector<f32, N>>::new_aligned(sum_elements, ALIGNMENT);
    // The sum of the output row that the last chunk broke off in, and of the one that this chunk breaks off in: one unit takes the
    // first while another may be at the second.
    let mut carry = SharedMemory::<Vector<f32, N>>::new(comptime!(if blueprint.carries {
        (2 * tile.columns / width) as usize
    } else {
        1
    }));

    // The low-rank sums of the item's rows.
    let mut hidden = SharedMemory::<f32>::new(comptime!(blueprint.hidden.max(1) as usize));

    // In shared memory, so that no register keeps through the main loop what the epilogue needs.
    let mut entry = SharedMemory::<u32>::new(CUBE_ITEM_WORDS);
    let unit = UNIT_POS_X;
    if unit < ITEM_WORDS {
        entry[unit as usize] = tables[(layout.items + item * ITEM_WORDS + unit) as usize];
    }
    if comptime!(blueprint.hidden > 0) {
        // The place came from a ticket, not from the cube's position.
        if unit == 0 {
            entry[COLUMN_TILE] = column_tile;
            entry[SPLIT] = split;
        }
    }
    sync_cube();
    let mut depth_start = 0u32;
    let mut depth_end = layout.d;
    if comptime!(blueprint.split) {
        depth_start = item::split(&entry, blueprint) * layout.depth;
        depth_end = min(depth_start + layout.depth, layout.d);
    }

    let depths = Depths { start: depth_start, end: depth_end };

    let lanes = lanes::<M, N>(blueprint);
    // What the entry has is read again wherever it is needed.
    let mut chunk = item::first(&entry);
    while chunk < item::end(&entry) {
        let mut sums = no_sums::<N>(blueprint);
        let mut start = chunk;
        if comptime!(!blueprint.chunks()) {
            // The only chunk starts where the item does, and no register keeps it through the multiplication.
            start = item::first(&entry);
        }
        let mut factors = no_factors::<S>();
        if comptime!(blueprint.makes_weights_in_registers()) {
            let mut rank = item::first_scale(&entry);
            let mut is_last = false;
            while !is_last {
                begin_factors::<A, S, M, N>(
                    out_pool,
                    tables,
                    layout,
                    staged,
                    &entry,
                    rank,
                    &mut factors,
                    &lanes,
                    blueprint,
                );
                add_product::<X, W, A, S, M, N>(
                    x,
                    weight,
                    weight_scales,
                    in_pool,
                    out_pool,
                    tables,
                    layout,
                    &entry,
                    staged,
                    &sum_tile,
                    &mut factors,
                    &mut sums,
                    &lanes,
                    start,
                    rank,
                    depths,
                    blueprint,
                );
                rank += blueprint.on_chip;
                if comptime!(blueprint.on_chip == RANK_CHUNK) {
                    is_last = true;
                } else {
                    is_last = rank >= item::end_scale(&entry);
                    // Stages may be written again when all have multiplied them.
                    sync_cube();
                }
            }
        } else {
            add_product::<X, W, A, S, M, N>(
                x,
                weight,
                weight_scales,
                in_pool,
                out_pool,
                tables,
                layout,
                &entry,
                staged,
                &sum_tile,
                &mut factors,
                &mut sums,
                &lanes,
                start,
                item::first_scale(&entry),
                depths,
                blueprint,
            );
        }
        if comptime!(!blueprint.chunks()) {
            start = item::first(&entry);
        }
        if comptime!(blueprint.hidden > 0 && !blueprint.split) {
            take_hidden(&mut hidden, h, layout.hidden, &entry);
        }
        #[unroll]
        for strip in 0..comptime!(blueprint.strips()) {
            store_strip::<N>(&sums, &mut sum_tile, strip, blueprint);
            sync_cube();
            if comptime!(blueprint.split) {
                write_partial::<Y, N>(&sum_tile, y, layout, &entry, start, strip, blueprint);
            } else {
                write_strip::<A, Y, N>(
                    &sum_tile, &mut carry, &hidden, out_pool, tables, bias, residual, y, layout, &entry, start, strip,
                    blueprint,
                );
            }
            sync_cube();
        }
        if comptime!(blueprint.chunks()) {
            chunk += tile.rows;
        } else {
            // An item is one tile, and a compiler that sees it keeps nothing for a next one through the loop over d.
            chunk = item::end(&entry);
        }
    }
}

/// Adds to the sums the product of the virtual rows from `start` and the item's weight, made of the scales from `rank` where it is a
/// W_i that is made in registers.
#[cube]
fn add_product<X: Float, W: Numeric, A: Float, S: Float, M: Size, N: Size>(
    x: &Array<Vector<X, M>>,
    weight: &Array<Vector<W, N>>,
    weight_scales: &Array<Vector<u32, N>>,
    in_pool: &Array<Vector<A, M>>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    staged: &mut Staged<S, M, N>,
    sum_tile: &SharedMemory<Vector<f32, N>>,
    factors: &mut Factors<S>,
    sums: &mut Sums<N>,
    lanes: &Lanes,
    start: u32,
    rank: u32,
    depths: Depths,
    #[comptime] blueprint: TileBlueprint,
) {
    let tile = comptime!(blueprint.tile);
    let row_width = x.vector_size();
    let row_width = comptime!(row_width as u32);
    let width = out_pool.vector_size();
    let width = comptime!(width as u32);
    let steps = (depths.end - depths.start).div_ceil(tile.depth);
    // Where the first step may be the ragged one, it is: zeros come before depth 0, and no other step has a condition.
    let ragged_first = comptime!(ragged_first(blueprint, row_width as usize));
    let mut pad = 0u32;
    if comptime!(ragged_first) {
        pad = steps * tile.depth - (depths.end - depths.start);
    }
    let x_bytes = X::type_size();
    let a_bytes = A::type_size();
    let w_bytes = W::type_size();
    let size!(XW) = comptime!(word_count(row_width as usize, x_bytes));
    let size!(AW) = comptime!(word_count(row_width as usize, a_bytes));
    let size!(WW) = comptime!(word_count(width as usize, w_bytes));
    let ahead = comptime!(fetches_ahead(blueprint, row_width as usize, width as usize));
    let ragged = comptime!(!ahead || !ragged_first);
    let mut fetched = nothing_fetched::<A, M, N, XW, AW, WW>(blueprint);
    let mut depth0 = depths.start - pad;
    let mut places = places::<M, N>(tables, layout, entry, start, rank, depth0, blueprint);
    if comptime!(ahead) {
        fetch::<X, W, A, M, N, XW, AW, WW>(
            x,
            weight,
            weight_scales,
            in_pool,
            &mut fetched,
            &mut places,
            layout,
            entry,
            depth0,
            depths,
            true,
            blueprint,
        );
    }
    let mut left = steps;
    let mut stage = first_stage::<M, N>(blueprint);
    while left > 0 {
        if comptime!(!ahead) {
            fetch::<X, W, A, M, N, XW, AW, WW>(
                x,
                weight,
                weight_scales,
                in_pool,
                &mut fetched,
                &mut places,
                layout,
                entry,
                depth0,
                depths,
                true,
                blueprint,
            );
        }
        stage_rows::<X, A, S, M, N, XW, AW, WW>(&fetched, &mut staged.rows, stage.rows, blueprint);
        let parts = comptime!(weight_parts(blueprint, row_width as usize, width as usize));
        let weight_start = if comptime!(parts == 1) { stage.weights } else { stage.weights * parts };
        if comptime!(blueprint.on_chip > 0 && !blueprint.makes_weights_in_registers()) {
            let factor = multiplier::<A, S, M, N, XW, AW, WW>(
                in_pool,
                out_pool,
                tables,
                &mut fetched,
                layout,
                entry,
                depth0,
                depths,
                blueprint,
            );
            stage_weight::<W, S, N, XW, AW, WW>(
                &fetched,
                &mut staged.weights,
                weight_start,
                &factor,
                depth0,
                layout.k,
                blueprint,
            );
        } else {
            stage_weight::<W, S, N, XW, AW, WW>(
                &fetched,
                &mut staged.weights,
                weight_start,
                sum_tile,
                depth0,
                layout.k,
                blueprint,
            );
        }
        if comptime!(blueprint.makes_weights_in_registers()) {
            stage_vectors::<A, S, M, N, XW, AW, WW>(&fetched, &mut staged.rows, stage.vectors, blueprint);
        }
        sync_cube();
        depth0 += tile.depth;
        left -= 1;
        if comptime!(ahead) {
            // A branch of its own, past which CUDA's assembler doesn't put off the loads.
            if left > 0 {
                fetch::<X, W, A, M, N, XW, AW, WW>(
                    x,
                    weight,
                    weight_scales,
                    in_pool,
                    &mut fetched,
                    &mut places,
                    layout,
                    entry,
                    depth0,
                    depths,
                    ragged,
                    blueprint,
                );
            }
        }
        multiply::<S, M, N>(staged, factors, sums, lanes, &stage, blueprint);
        if comptime!(blueprint.stages() == 1) {
            sync_cube();
        } else {
            turn::<M, N>(&mut stage, blueprint);
        }
    }
}

/// Prepares the factors of W_i of the scales from `rank` on. Those of more ranks than are staged at once are made in several passes
/// over d, each of which adds its part of W_i's product to the sums.
#[cube]
fn begin_factors<A: Float, S: Float, M: Size, N: Size>(
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    layout: Layout,
    staged: &mut Staged<S, M, N>,
    entry: &SharedMemory<u32>,
    rank: u32,
    factors: &mut Factors<S>,
    lanes: &Lanes,
    #[comptime] blueprint: TileBlueprint,
) {
    factors.plain = 0.0f32.runtime();
    if rank == item::first_scale(entry) {
        factors.plain = plain_factor(entry);
    }
    factors.chunks = (min(item::end_scale(entry) - rank, blueprint.on_chip)).div_ceil(RANK_CHUNK);
    let row_width = M::value();
    let width = N::value();
    let parts = comptime!(weight_parts(blueprint, row_width, width));
    let start = comptime!(out_start(blueprint, row_width, width) * parts).runtime();
    stage_out_vectors::<A, S, N>(out_pool, tables, layout, entry, rank, &mut staged.weights, start, blueprint);
    sync_cube();
    if comptime!(blueprint.on_chip == RANK_CHUNK) {
        load_out_vectors::<S, M, N>(staged, &mut factors.out_vectors, lanes, blueprint);
        start_factors::<S>(factors, blueprint);
    }
}
