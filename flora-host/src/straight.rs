//! Rows that nothing is done to, by the matrix unit: they are read where they lie, and a strip's outputs are finished and written as
//! they are made. Nothing is packed or summed in memory, which costs more than products that are this quick.
//!
//! A row's bits are those that [`crate::gemm`] gives it.

use std::mem::MaybeUninit;
use std::ops::Range;

use flora_plan::schedule::ScheduledRow;
use half::bf16;
use pulp::Simd;

use crate::fetch::Pieces;
use crate::kernel::Form;
use crate::layout::{PAIRED_SLICE, STRIP};
use crate::matrix_unit::{MatrixUnit, UNIT_ROWS, UnitProducts};
use crate::pass::Pass;
use crate::products::Pairs;
use crate::values::Values;
use crate::vectorise::vectorised;

/// Rows whose products are in being at a time.
const TOGETHER: usize = 4 * UNIT_ROWS;

/// Such rows of a pass.
pub(crate) struct Straight<'a> {
    pass: &'a Pass<'a>,
    unit: MatrixUnit,
    /// All rows of x.
    x: &'a [bf16],
    rows: Range<usize>,
}

impl<'a> Straight<'a> {
    /// Rows of a pass, if they are such: whole steps of whole numbers, at least as many as the unit takes at a time.
    pub(crate) fn of(pass: &'a Pass<'a>, rows: &[ScheduledRow]) -> Option<Self> {
        let (Form::Pairs(Some(unit)), Values::Bf16(x), None) = (pass.form, pass.x.values, pass.x.replaced) else {
            return None;
        };
        let width = pass.x.width;
        let is_whole = width.is_multiple_of(2 * Pairs::STEP) && width <= PAIRED_SLICE;
        let first = rows.first()?.row as usize;
        let is_plain = |(at, row): (usize, &ScheduledRow)| {
            let ScheduledRow { row, in_slot, out_slot, last } = *row;
            (row as usize, in_slot, out_slot, last) == (first + at, 0, 0, 1)
        };
        let are_plain = pass.rows.low_rank.is_empty() && pass.rows.sources.is_empty();
        if rows.len() < UNIT_ROWS || !is_whole || !are_plain || !rows.iter().enumerate().all(is_plain) {
            return None;
        }
        Some(Self { pass, unit, x, rows: first..first + rows.len() })
    }

    /// Writes their outputs of a panel of columns.
    pub(crate) fn run<S: Simd>(&self, simd: S, panel: Range<usize>) {
        let weight = self.pass.weight;
        let width = self.pass.x.width;
        let strips = panel.start / STRIP..panel.end.div_ceil(STRIP);
        let mut made = [const { MaybeUninit::uninit() }; TOGETHER];
        for strip in strips.clone() {
            let columns = strip * STRIP..panel.end.min((strip + 1) * STRIP);
            let pairs = weight.pairs(strip, 0..width);
            let next = strip + 1;
            let ahead = if next < strips.end { weight.stored(next, 0..width) } else { Pieces::default() };
            for rows in turns(self.rows.clone()) {
                let work = UnitProducts {
                    x: &self.x[rows.start * self.pass.x.pitch..],
                    rows: rows.len(),
                    x_pitch: self.pass.x.pitch,
                    weight: bytemuck::cast_slice(pairs),
                    depth: width / 2,
                    ahead: ahead.part(&(rows.start - self.rows.start..rows.end - self.rows.start), self.rows.len()),
                };
                let made = self.unit.multiply(work, &mut made);
                self.write(simd, rows, columns.clone(), made);
            }
        }
    }

    /// Finishes and writes outputs.
    fn write<S: Simd>(&self, simd: S, rows: Range<usize>, columns: Range<usize>, made: &mut [[f32; STRIP]]) {
        let Pass { finish, sink, out_pool, .. } = *self.pass;
        vectorised(
            simd,
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

/// The rows in turns of whole blocks of the unit. The last one begins with rows of the one before it where others are too few.
fn turns(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let whole = rows.len() / UNIT_ROWS * UNIT_ROWS;
    let end = rows.start + whole;
    let last = (rows.len() > whole).then(|| rows.end - UNIT_ROWS..rows.end);
    (rows.start..end).step_by(TOGETHER).map(move |first| first..end.min(first + TOGETHER)).chain(last)
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
                assert!(turn.start >= rows.start && turn.len() <= TOGETHER);
                next = turn.end;
            }
            assert_eq!(next, rows.end);
        }
    }
}
