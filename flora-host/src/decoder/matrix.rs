//! Some columns of rows that lie in one slice: the queries within a joined projection's outputs are read where they are.

use std::ops::Range;

use crate::decoder::error::OperationError;
use crate::values::Values;

/// A matrix `[rows, columns]`; its rows may be a part of longer ones.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    values: Values<'a>,
    /// Numbers from one row to the next.
    pitch: usize,
    first: usize,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// Columns `columns` of rows of `pitch` numbers, which follow one another in `values`.
    ///
    /// # Errors
    /// Values that aren't whole rows; columns that rows don't have.
    pub fn new(values: Values<'a>, pitch: usize, columns: Range<usize>) -> Result<Self, OperationError> {
        if values.len().checked_rem(pitch).is_none_or(|rest| rest != 0) {
            return Err(OperationError::PartialRow { width: pitch, found: values.len() });
        }
        if columns.end > pitch || columns.start > columns.end {
            return Err(OperationError::NoColumn { end: columns.end.max(columns.start), width: pitch });
        }
        Ok(Self { values, pitch, first: columns.start, columns: columns.len() })
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.values.len() / self.pitch
    }

    /// How many columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The numbers' type.
    pub(super) fn element(&self) -> flora_plan::layer::Element {
        self.values.element()
    }

    /// Widens the numbers of a row from column `first` on into `out`.
    pub(super) fn widen(&self, row: usize, first: usize, out: &mut [f32]) {
        self.values.widen(row * self.pitch + self.first + first, out);
    }
}
