//! A tensor of f64 with known extents.

use super::{EvaluateError, MAX_ELEMENTS};

/// A scalar, vector or matrix, or a stack of them over the rank axis. Row-major; finite or not.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    rank: Option<usize>,
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Value {
    /// One number.
    pub fn scalar(number: f64) -> Self {
        Self { rank: None, shape: Vec::new(), data: vec![number] }
    }

    /// `[n]`
    pub fn vector(data: Vec<f64>) -> Self {
        Self { rank: None, shape: vec![data.len()], data }
    }

    /// `[rows, columns]`, row-major.
    ///
    /// # Errors
    /// [`EvaluateError::WrongLength`] when `data` has another length than `rows * columns`.
    pub fn matrix(rows: usize, columns: usize, data: Vec<f64>) -> Result<Self, EvaluateError> {
        Self::new(None, vec![rows, columns], data)
    }

    /// A value of the given shape (at most two extents), over a rank axis when `rank` is given.
    pub(crate) fn new(rank: Option<usize>, shape: Vec<usize>, data: Vec<f64>) -> Result<Self, EvaluateError> {
        if Self::count(rank, &shape)? != data.len() {
            let extents = rank.into_iter().chain(shape).collect();
            return Err(EvaluateError::WrongLength { elements: data.len(), extents });
        }
        Ok(Self { rank, shape, data })
    }

    /// A value whose elements `f` gives by layer of the rank axis, row and column.
    pub(super) fn from_fn(
        rank: Option<usize>,
        shape: Vec<usize>,
        mut f: impl FnMut(usize, usize, usize) -> f64,
    ) -> Result<Self, EvaluateError> {
        let mut data = Vec::with_capacity(Self::count(rank, &shape)?);
        let (rows, columns) = rows_and_columns(&shape);
        for layer in 0..rank.unwrap_or(1) {
            for row in 0..rows {
                for column in 0..columns {
                    data.push(f(layer, row, column));
                }
            }
        }
        Ok(Self { rank, shape, data })
    }

    /// The number of elements, bounded.
    pub(super) fn count(rank: Option<usize>, shape: &[usize]) -> Result<usize, EvaluateError> {
        let mut extents = rank.iter().chain(shape);
        let count = extents.try_fold(1usize, |product, extent| product.checked_mul(*extent));
        count
            .filter(|count| *count <= MAX_ELEMENTS)
            .ok_or_else(|| EvaluateError::TooLarge { extents: rank.iter().chain(shape).copied().collect() })
    }

    /// As many zeros.
    pub(crate) fn zeros(&self) -> Self {
        Self { data: vec![0.0; self.data.len()], ..self.clone() }
    }

    /// The extents without the rank axis: none for a scalar, one for a vector, two for a matrix.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The extent of the rank axis, where there is one.
    pub fn rank_extent(&self) -> Option<usize> {
        self.rank
    }

    /// The extents, a rank axis first.
    pub fn extents(&self) -> Vec<usize> {
        self.rank.iter().chain(&self.shape).copied().collect()
    }

    /// The elements, row-major, a rank axis outermost.
    pub fn data(&self) -> &[f64] {
        &self.data
    }

    /// The elements.
    pub fn into_data(self) -> Vec<f64> {
        self.data
    }

    /// Rows and columns; a vector is one row, a scalar one element.
    pub(super) fn rows_and_columns(&self) -> (usize, usize) {
        rows_and_columns(&self.shape)
    }

    /// One row of a matrix; the rank axis is broadcast over.
    pub(super) fn row(&self, layer: usize, row: usize) -> &[f64] {
        let (rows, columns) = self.rows_and_columns();
        let layer = if self.rank.is_some() { layer } else { 0 };
        &self.data[(layer * rows + row) * columns..][..columns]
    }

    /// The element at a place of a larger value that this one broadcasts over.
    pub(super) fn broadcast_at(&self, layer: usize, row: usize, column: usize) -> f64 {
        let (rows, columns) = self.rows_and_columns();
        let layer = if self.rank.is_some() { layer } else { 0 };
        let row = if self.shape.len() == 2 { row } else { 0 };
        let column = if self.shape.is_empty() { 0 } else { column };
        self.data[(layer * rows + row) * columns + column]
    }
}

fn rows_and_columns(shape: &[usize]) -> (usize, usize) {
    match *shape {
        [rows, columns] => (rows, columns),
        [columns] => (1, columns),
        _ => (1, 1),
    }
}
