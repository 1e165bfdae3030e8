//! The second half of a split GEMM: adds the partial sums of each virtual row in order, then does what the tile kernel's
//! epilogue does.
//!
//! Bytes: the partial sums once, y once.

use cubecl::prelude::*;
use flora_plan::layer::Epilogue;

use super::epilogue::finish;
use super::tables::{H_START, tile_row};

/// The comptime key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReduceBlueprint {
    /// Whether a virtual row may have an out-scale.
    pub scaled: bool,
    /// Whether a row may have a low-rank sum.
    pub low_rank: bool,
    /// What is applied before the write.
    pub epilogue: Epilogue,
}

/// partial `[splits, V, k]`, tables as the tile kernel's, h from word `hidden` on, one unit a virtual row and vector of columns.
#[cube(launch_unchecked)]
pub(crate) fn reduce<A: Float, Y: Float, N: Size>(
    partial: &Array<Vector<f32, N>>,
    out_pool: &Array<Vector<A, N>>,
    tables: &Array<u32>,
    h: &Array<f32>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    y: &mut Array<Vector<Y, N>>,
    virtual_rows: u32,
    splits: u32,
    k: u32,
    hidden: u32,
    #[comptime] blueprint: ReduceBlueprint,
    #[define(A, Y)] _types: [StorageType; 2],
) {
    let width = y.vector_size();
    let columns = k / comptime!(width as u32);
    let at = ABSOLUTE_POS as u32;
    if at < virtual_rows * columns {
        let column = at % columns;
        let mut row = at / columns;
        let mut starts = row == 0;
        if !starts {
            starts = tile_row::last(tables, (row - 1) * tile_row::WORDS) == 1;
        }
        if starts {
            let mut value = Vector::<f32, N>::new(0.0);
            let mut open = true;
            while open {
                let words = row * tile_row::WORDS;
                let mut sum = Vector::<f32, N>::new(0.0);
                for split in 0..splits {
                    sum += partial[((split * virtual_rows + row) * columns + column) as usize];
                }
                if comptime!(blueprint.scaled) {
                    let slot = tile_row::out_slot(tables, words);
                    if slot > 0 {
                        sum *= Vector::cast_from(out_pool[((slot - 1) * columns + column) as usize]);
                    }
                }
                value += sum;
                if tile_row::last(tables, words) == 1 {
                    open = false;
                    if comptime!(blueprint.low_rank) {
                        let expand = tile_row::expand(tables, words);
                        let own = tile_row::hidden(tables, words);
                        for q in 0..tile_row::rank(tables, words) {
                            let vector =
                                Vector::<f32, N>::cast_from(out_pool[((expand + q) * columns + column) as usize]);
                            value = fma(Vector::new(h[(hidden + H_START + own + q) as usize]), vector, value);
                        }
                    }
                    let output = tile_row::row(tables, words) * columns + column;
                    y[output as usize] =
                        finish::<Y, N>(value, bias, residual, column, output, comptime!(blueprint.epilogue));
                }
                row += 1;
            }
        }
    }
}
