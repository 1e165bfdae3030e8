//! What becomes of a tile's sums: scaled, added up over the virtual rows of each output row, with its low-rank sum, and written once; or
//! written as partial sums of a part of d.

use cubecl::prelude::*;

use super::blueprint::{SUM_PAD, TileBlueprint};
use super::epilogue::finish;
use super::item;
use super::multiply::strip_column;
use super::tables::{H_START, Layout, NO_SUM, tile_row};

/// Waits for the low-rank sums of the item's rows.
#[cube]
pub(crate) fn take_hidden(
    hidden: &mut SharedMemory<f32>,
    h: &mut Array<Atomic<u32>>,
    start: u32,
    entry: &SharedMemory<u32>,
) {
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
pub(crate) fn write_strip<A: Float, Y: Float, N: Size>(
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
pub(crate) fn write_partial<Y: Float, N: Size>(
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
