//! Rows that nothing is done to before they are multiplied, as floats or by the matrix unit: they are read where they lie, and a
//! strip's outputs are finished and written as they are made. Nothing is packed or summed in memory, which takes a tenth of the
//! time of floats, and more than products that are as quick as the unit's.
//!
//! A row's bits are those that [`crate::gemm`] gives it.

use std::mem::MaybeUninit;
use std::ops::Range;

use flora_plan::schedule::ScheduledRow;
use half::bf16;
use pulp::Simd;

use crate::expand::expand_strip;
use crate::fetch::Pieces;
use crate::frame::Frame;
use crate::kernel::{Form, MOST_TILE_ROWS, tile_rows};
use crate::layout::{PAIRED_SLICE, STRIP};
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS, UnitProducts};
use crate::pack::Vectors;
use crate::partition::even_tiles;
use crate::pass::Pass;
use crate::products::Pairs;
use crate::scratch::Scratch;
use crate::unpacked::UnpackedTile;
use crate::values::Values;
use crate::vectorise::vectorised;

/// Such rows of a pass.
pub(crate) struct Straight<'a> {
    pass: &'a Pass<'a>,
    rows: Range<usize>,
    operands: Operands<'a>,
}

/// All rows of x, and what multiplies them.
#[derive(Clone, Copy)]
enum Operands<'a> {
    Floats(&'a [f32]),
    Pairs(&'a [bf16], MatrixUnit),
}

impl<'a> Straight<'a> {
    /// Rows of a pass, if they are such and one after the other. The matrix unit reads whole steps of as many rows as it takes at a
    /// time.
    pub(crate) fn of(pass: &'a Pass<'a>, rows: &[ScheduledRow]) -> Option<Self> {
        let width = pass.x.width;
        let operands = match (pass.form, pass.x.values) {
            (Form::Floats, Values::F32(x)) if !pass.weight.are_encoded() => Operands::Floats(x),
            (Form::Pairs(Some(unit)), Values::Bf16(x))
                if rows.len() >= UNIT_ROWS && width.is_multiple_of(2 * Pairs::STEP) && width <= PAIRED_SLICE =>
            {
                Operands::Pairs(x, unit)
            }
            _ => return None,
        };
        let first = rows.first()?.row as usize;
        let is_plain = |(at, row): (usize, &ScheduledRow)| {
            let ScheduledRow { row, in_slot, out_slot, last } = *row;
            (row as usize, in_slot, out_slot, last) == (first + at, 0, 0, 1)
        };
        let are_as_they_lie = pass.rows.sources.is_empty() && pass.x.replaced.is_none();
        let are_plain = are_as_they_lie && rows.iter().enumerate().all(is_plain);
        are_plain.then(|| Self { pass, operands, rows: first..first + rows.len() })
    }

    /// Writes their outputs of a panel of columns.
    pub(crate) fn run<S: Simd>(&self, panel: &Frame<'_, S>, scratch: &mut Scratch) {
        let Pass { weight, x: Vectors { width, pitch, .. }, .. } = *self.pass;
        let end = panel.columns.end;
        let strips = panel.columns.start / STRIP..end.div_ceil(STRIP);
        let (mut tile, mut blocks) =
            ([[0.0; STRIP]; MOST_TILE_ROWS], [const { MaybeUninit::uninit() }; PAIRS_TOGETHER]);
        for strip in strips.clone() {
            let columns = strip * STRIP..end.min((strip + 1) * STRIP);
            let next = strip + 1;
            let ahead = if next < strips.end { weight.stored(next, 0..width) } else { Pieces::default() };
            let frame = Frame { columns, ..*panel };
            for rows in self.turns::<S>() {
                let turn = rows.start - self.rows.start..rows.end - self.rows.start;
                let ahead = ahead.part(&turn, self.rows.len());
                match self.operands {
                    Operands::Floats(x) => {
                        let made = &mut tile[..rows.len()];
                        let (x, x_pitch) = (&x[rows.start * pitch..], pitch);
                        UnpackedTile { x, x_pitch, weight: weight.unencoded(strip), ahead, out: &mut *made }
                            .run(frame.simd);
                        self.write(&frame, (rows, end), made, scratch);
                    }
                    Operands::Pairs(x, unit) => {
                        let work = UnitProducts {
                            x: &x[rows.start * pitch..],
                            rows: rows.len(),
                            x_pitch: pitch,
                            weight: bytemuck::cast_slice(weight.pairs(strip, 0..width)),
                            depth: width / 2,
                            ahead,
                        };
                        let made = unit.multiply(work, &mut blocks);
                        self.write(&frame, (rows, end), made, scratch);
                    }
                }
            }
        }
    }

    /// The rows whose products are in being at a time: a tile of floats, or some blocks of the unit.
    fn turns<S: Simd>(&self) -> impl Iterator<Item = Range<usize>> {
        let (tiles, blocks) = match self.operands {
            Operands::Floats(_) => (Some(even_tiles(self.rows.len(), tile_rows::<S>())), None),
            Operands::Pairs(..) => (None, Some(turns(self.rows.clone()))),
        };
        let first = self.rows.start;
        let tiles = tiles.into_iter().flatten().map(move |tile| first + tile.start..first + tile.end);
        tiles.chain(blocks.into_iter().flatten())
    }

    /// Adds low-rank sums to a strip's products, finishes and writes them. The panel has columns up to `end`.
    fn write<S: Simd>(
        &self,
        frame: &Frame<'_, S>,
        (rows, end): (Range<usize>, usize),
        made: &mut [[f32; STRIP]],
        scratch: &mut Scratch,
    ) {
        let Pass { finish, sink, out_pool, .. } = *self.pass;
        let (runs, hidden) = (self.pass.rows.low_rank, self.pass.hidden);
        let next = frame.columns.end..end.min(frame.columns.end + STRIP);
        expand_strip(frame, (runs, hidden), &rows, next, made, &mut scratch.outer);
        let columns = frame.columns.clone();
        vectorised(
            frame.simd,
            #[inline(always)]
            || {
                if let Some(finish) = finish {
                    finish.apply_to_strip::<S>((rows.start, columns.clone(), out_pool.width), made);
                }
                // SAFETY: y outlives the pass, and no other task has these columns. Rows that are written twice are written alike.
                unsafe { sink.write_strip(rows.start, columns, made) }
            },
        );
    }
}

/// Rows whose products the matrix unit has in being at a time.
const PAIRS_TOGETHER: usize = 4 * UNIT_ROWS;

/// The rows in turns of whole blocks of the unit. The last one begins with rows of the one before it where others are too few.
fn turns(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let whole = rows.len() / UNIT_ROWS * UNIT_ROWS;
    let end = rows.start + whole;
    let last = (rows.len() > whole).then(|| rows.end - UNIT_ROWS..rows.end);
    (rows.start..end).step_by(PAIRS_TOGETHER).map(move |first| first..end.min(first + PAIRS_TOGETHER)).chain(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_have_every_row() {
        for (first, count) in (UNIT_ROWS..400).zip([32, 33, 63, 64, 127, 128, 129, 160, 161, 255, 384].iter().cycle()) {
            let rows = first..first + count;
            let mut next = rows.start;
            for turn in turns(rows.clone()) {
                assert!(turn.start <= next && turn.end > next && turn.len().is_multiple_of(UNIT_ROWS), "{turn:?}");
                assert!(turn.start >= rows.start && turn.len() <= PAIRS_TOGETHER);
                next = turn.end;
            }
            assert_eq!(next, rows.end);
        }
    }
}
