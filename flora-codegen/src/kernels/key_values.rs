//! What is written into a pool of keys and values, `[blocks, 2, key_heads, BLOCK_TOKENS, size]`: a step's rows, and copies of blocks
//! that two sequences had and one goes on with.

use cubecl::prelude::*;
use flora_runtime::decoding::BLOCK_TOKENS;

use super::attention::turned;

/// Rows of keys and values, and where they come from.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct KeyValueRows {
    /// Word of the first row's slot: block · BLOCK_TOKENS + token.
    pub(crate) slots: u32,
    /// Rows.
    pub(crate) rows: u32,
    /// Key-value heads.
    pub(crate) key_heads: u32,
    /// Numbers of a row of keys, and the first of them.
    pub(crate) key_width: u32,
    pub(crate) key_first: u32,
    /// Numbers of a row of values, and the first of them.
    pub(crate) value_width: u32,
    pub(crate) value_first: u32,
}

/// Keys, turned where there is a rotation, and values into their slots: one unit a number of a row.
#[cube(launch_unchecked)]
pub(crate) fn append<E: Float>(
    keys: &Array<E>,
    values: &Array<E>,
    rotary: &Array<f32>,
    tables: &Array<u32>,
    pool: &mut Array<E>,
    layout: KeyValueRows,
    #[comptime] size: u32,
    #[comptime] rotates: bool,
    #[define(E)] _element: StorageType,
) {
    let at = ABSOLUTE_POS as u32;
    let number = at % size;
    let head = at / size % layout.key_heads;
    let row = at / size / layout.key_heads;
    if row < layout.rows {
        let first = row * layout.key_width + layout.key_first + head * size;
        let key = turned::<E>(keys, rotary, first, row, number, size, rotates);
        let value = values[(row * layout.value_width + layout.value_first + head * size + number) as usize];
        let slot = tables[(layout.slots + row) as usize];
        let tokens = comptime!(BLOCK_TOKENS as u32);
        let block = slot / tokens * 2;
        let line = slot % tokens;
        pool[(((block * layout.key_heads + head) * tokens + line) * size + number) as usize] = E::cast_from(key);
        pool[((((block + 1) * layout.key_heads + head) * tokens + line) * size + number) as usize] = value;
    }
}

/// Copies blocks of `numbers` numbers within a pool, `[from, to]` at words `2 · i` of the tables: one unit a number.
#[cube(launch_unchecked)]
pub(crate) fn copy_blocks<E: Float>(
    tables: &Array<u32>,
    pool: &mut Array<E>,
    copies: u32,
    numbers: u32,
    #[define(E)] _element: StorageType,
) {
    let at = ABSOLUTE_POS as u32;
    if at < copies * numbers {
        let pair = at / numbers * 2;
        let from = tables[pair as usize] * numbers + at % numbers;
        let to = tables[(pair + 1) as usize] * numbers + at % numbers;
        pool[to as usize] = pool[from as usize];
    }
}
