//! The kernel that multiplies by the base weight: one pass for rows of every kind, one launch, the output written once.
//!
//! A cube multiplies one *item*, a range of virtual rows made of whole output rows, by one column tile. A virtual row (paper Eq. 6)
//! is an input row with its own in-scale and out-scale; base rows have none, IA3 rows one, fLoRA rows of rank r are r of them. An
//! item of `on_chip` has a W_i of its own: w0's tile is multiplied by Σ_v in_v out_vᵀ as it is staged. Low-rank sums (`fused`) are
//! made by the first cubes that start, while the others multiply, and are expanded in the epilogue.
//!
//! MACs: V·d·k for V virtual rows; for an item of W_i with r scales r·d·k more; t·r·(d + k) for low-rank sums. Bytes: w0 once for
//! each `rows` of the tile, everything else once (x, scales and vectors again from the second-level cache for each column tile).
//!
//! Every sum runs over d in order, and every output adds its virtual rows in order, whatever tile they fall in: the bits of a
//! row don't depend on the rest of the batch.

use cubecl::prelude::*;

use super::blueprint::{ALIGNMENT, PAD, SUM_PAD, TileBlueprint};
use super::epilogue::finish;
use super::item::{self, COLUMN_TILE, CUBE_ITEM_WORDS, ITEM_WORDS, SPLIT};
use super::multiply::{multiply, no_sums, store_strip, strip_column};
use super::on_chip::multiplier;
use super::shrink::shrink_products;
use super::stage::{fetch, fetches_ahead, nothing_fetched, stage_rows, stage_weight};
use super::tables::{H_START, Layout, NO_SUM, TASK_SIDE, shrink_task, tile_row};
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
    item: u32,
    column_tile: u32,
    split: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let tile = comptime!(blueprint.tile);
    let row_width = x.vector_size();
    let row_width = comptime!(row_width as u32);
    let width = out_pool.vector_size();
    let width = comptime!(width as u32);
    let row_elements = comptime!(((tile.rows * (tile.depth + PAD)) / row_width) as usize);
    let weight_elements = comptime!(((tile.depth * (tile.columns + PAD)) / width) as usize);
    let sum_elements = comptime!((tile.rows * (blueprint.strip() + SUM_PAD) / width) as usize);
    let mut row_tile = SharedMemory::<Vector<S, M>>::new_aligned(row_elements, ALIGNMENT);
    let mut weight_tile = SharedMemory::<Vector<S, N>>::new_aligned(weight_elements, ALIGNMENT);
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

    let x_bytes = X::type_size();
    let a_bytes = A::type_size();
    let w_bytes = W::type_size();
    let size!(XW) = comptime!(word_count(row_width as usize, x_bytes));
    let size!(AW) = comptime!(word_count(row_width as usize, a_bytes));
    let size!(WW) = comptime!(word_count(width as usize, w_bytes));
    let ahead = comptime!(fetches_ahead(blueprint, row_width as usize, width as usize));
    let mut fetched = nothing_fetched::<M, N, XW, AW, WW>(blueprint);

    // What the entry has is read again wherever it is needed.
    let mut chunk = item::first(&entry);
    while chunk < item::end(&entry) {
        let mut sums = no_sums::<N>(blueprint);
        let mut depth0 = depth_start;
        if comptime!(ahead) {
            fetch::<X, W, A, M, N, XW, AW, WW>(
                x,
                weight,
                weight_scales,
                in_pool,
                tables,
                &mut fetched,
                layout,
                &entry,
                chunk,
                depth0,
                depth_end,
                blueprint,
            );
        }
        while depth0 < depth_end {
            if comptime!(!ahead) {
                fetch::<X, W, A, M, N, XW, AW, WW>(
                    x,
                    weight,
                    weight_scales,
                    in_pool,
                    tables,
                    &mut fetched,
                    layout,
                    &entry,
                    chunk,
                    depth0,
                    depth_end,
                    blueprint,
                );
            }
            stage_rows::<X, A, S, M, N, XW, AW, WW>(&fetched, &mut row_tile, blueprint);
            if comptime!(blueprint.on_chip) {
                let factor = multiplier::<A, S, M, N, XW, AW, WW>(
                    in_pool,
                    out_pool,
                    tables,
                    &mut fetched,
                    layout,
                    &entry,
                    depth0,
                    depth0 == depth_start,
                    blueprint,
                );
                stage_weight::<W, S, N, XW, AW, WW>(&fetched, &mut weight_tile, &factor, depth0, blueprint);
            } else {
                stage_weight::<W, S, N, XW, AW, WW>(&fetched, &mut weight_tile, &sum_tile, depth0, blueprint);
            }
            sync_cube();
            depth0 += tile.depth;
            if comptime!(ahead) {
                // A branch of its own, past which CUDA's assembler doesn't put off the loads.
                if depth0 < depth_end {
                    fetch::<X, W, A, M, N, XW, AW, WW>(
                        x,
                        weight,
                        weight_scales,
                        in_pool,
                        tables,
                        &mut fetched,
                        layout,
                        &entry,
                        chunk,
                        depth0,
                        depth_end,
                        blueprint,
                    );
                }
            }
            multiply::<S, M, N>(&row_tile, &weight_tile, &mut sums, blueprint);
            sync_cube();
        }
        let mut start = chunk;
        if comptime!(!blueprint.chunks()) {
            // The only chunk starts where the item does.
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

/// Waits for the low-rank sums of the item's rows.
#[cube]
fn take_hidden(hidden: &mut SharedMemory<f32>, h: &mut Array<Atomic<u32>>, start: u32, entry: &SharedMemory<u32>) {
    let first = start + H_START + item::hidden(entry);
    let mut at = UNIT_POS_X;
    while at < item::hidden_count(entry) {
        let mut bits = h[(first + at) as usize].load();
        while bits == NO_SUM {
            bits = h[(first + at) as usize].load();
        }
        hidden[at as usize] = f32::reinterpret(bits);
        at += CUBE_DIM;
    }
    sync_cube();
}

/// Scales the sums of a strip, adds up those of each output row and its low-rank sum, and writes the row.
#[cube]
fn write_strip<A: Float, Y: Float, N: Size>(
    sum_tile: &SharedMemory<Vector<f32, N>>,
    carry: &mut SharedMemory<Vector<f32, N>>,
    hidden: &SharedMemory<f32>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    y: &mut Array<Vector<Y, N>>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    chunk: u32,
    #[comptime] strip: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let tile = comptime!(blueprint.tile);
    let width = out_pool.vector_size();
    let width = comptime!(width as u32);
    let line = comptime!(blueprint.strip() / width);
    let pitch = comptime!((blueprint.strip() + SUM_PAD) / width);
    let units = comptime!(blueprint.units());
    let columns = layout.k / width;
    let end = item::end(entry);

    let column0 = item::column_tile(entry, blueprint) * comptime!(tile.columns / width);
    // Units beyond the last whole line of units have nothing to do.
    let lanes = comptime!(if units < line { 1 } else { units / line });
    let unit = UNIT_POS_X;
    let lane = unit / line;
    let tile_column = strip_column(unit % line * width, strip, blueprint) / width;
    let column = column0 + tile_column;
    let mut taken = tile_column;
    let mut left = tile_column;
    if comptime!(blueprint.carries) {
        let is_odd = (chunk - item::first(entry)) / tile.rows % 2;
        taken += is_odd * comptime!(tile.columns / width);
        left += (1 - is_odd) * comptime!(tile.columns / width);
    }
    let mut row = lane;
    while lane < lanes && column < columns && row < tile.rows && chunk + row < end {
        let mut at = chunk + row;
        let mut starts = row == 0;
        if !starts {
            starts = tile_row::last(tables, (at - 1) * tile_row::WORDS) == 1;
        }
        if starts {
            let mut value = Vector::<f32, N>::new(0.0);
            if comptime!(blueprint.carries) {
                let first = item::first(entry);
                if row == 0 && chunk > first {
                    // Within, because a kernel evaluates both sides of `&&`, and the first row has none before it.
                    if tile_row::last(tables, (at - 1) * tile_row::WORDS) == 0 {
                        value = carry[taken as usize];
                    }
                }
            }
            let mut open = true;
            while open {
                let words = at * tile_row::WORDS;
                let mut sum = sum_tile[((at - chunk) * pitch + unit % line) as usize];
                if comptime!(blueprint.scaled) {
                    let slot = tile_row::out_slot(tables, words);
                    if slot > 0 {
                        sum *= Vector::cast_from(out_pool[((slot - 1) * columns + column) as usize]);
                    }
                }
                value += sum;
                if tile_row::last(tables, words) == 1 {
                    open = false;
                    if comptime!(blueprint.hidden > 0) {
                        let expand = tile_row::expand(tables, words);
                        let own = tile_row::hidden(tables, words) - item::hidden(entry);
                        for q in 0..tile_row::rank(tables, words) {
                            let vector =
                                Vector::<f32, N>::cast_from(out_pool[((expand + q) * columns + column) as usize]);
                            value = fma(Vector::new(hidden[(own + q) as usize]), vector, value);
                        }
                    }
                    let output = tile_row::row(tables, words) * columns + column;
                    y[output as usize] =
                        finish::<Y, N>(value, bias, residual, column, output, comptime!(blueprint.epilogue));
                }
                if comptime!(blueprint.carries) {
                    let breaks_off = open && at + 1 == chunk + tile.rows;
                    if breaks_off {
                        carry[left as usize] = value;
                        open = false;
                    }
                }
                at += 1;
            }
        }
        row += lanes;
    }
}

/// Writes the sums of a strip as they are.
#[cube]
fn write_partial<Y: Float, N: Size>(
    sum_tile: &SharedMemory<Vector<f32, N>>,
    partial: &mut Array<Vector<Y, N>>,
    layout: Layout,
    entry: &SharedMemory<u32>,
    chunk: u32,
    #[comptime] strip: u32,
    #[comptime] blueprint: TileBlueprint,
) {
    let tile = comptime!(blueprint.tile);
    let width = partial.vector_size();
    let width = comptime!(width as u32);
    let line = comptime!(blueprint.strip() / width);
    let pitch = comptime!((blueprint.strip() + SUM_PAD) / width);
    let columns = layout.k / width;
    let column0 = item::column_tile(entry, blueprint) * comptime!(tile.columns / width);
    let split = item::split(entry, blueprint);
    let end = item::end(entry);
    let mut load = UNIT_POS_X;
    while load < comptime!(tile.rows * line) {
        let row = chunk + load / line;
        let column = column0 + strip_column(load % line * width, strip, blueprint) / width;
        if row < end && column < columns {
            let at = (split * layout.virtual_rows + row) * columns + column;
            partial[at as usize] = Vector::cast_from(sum_tile[(load / line * pitch + load % line) as usize]);
        }
        load += comptime!(blueprint.units());
    }
}
