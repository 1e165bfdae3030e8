//! What a model holds beside its projections: embeddings, norms, the output matrix.

use super::ModelError;
use crate::error::FileError;
use crate::tensor::{Encoding, StoredTensor, TensorProblem, TensorTable};
use std::sync::Arc;

/// A tensor that belongs to no projection, in its own encoding.
#[derive(Clone, Debug)]
pub struct Parameter {
    place: Place,
    tensor: StoredTensor,
}

impl Parameter {
    pub(super) fn new(place: &Place) -> Result<Self, ModelError> {
        Ok(Self { place: place.clone(), tensor: place.tensor()?.clone() })
    }

    /// The extents, outermost first: `[vocabulary, d]` of an embedding.
    pub fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }

    /// The element type or block format.
    pub fn encoding(&self) -> Encoding {
        self.tensor.encoding()
    }

    /// The tensor as it is stored; its bytes are shared with the file.
    pub fn stored(&self) -> &StoredTensor {
        &self.tensor
    }

    /// All values, row-major, dequantised.
    ///
    /// # Errors
    /// NaN and infinities.
    pub fn to_f32(&self) -> Result<Vec<f32>, ModelError> {
        self.tensor.to_finite_f32().map_err(|problem| self.place.error(problem).into())
    }

    /// The rows `rows` of a matrix, one after another, dequantised: `[rows.len(), columns]`. Other rows are not touched.
    ///
    /// # Errors
    /// The tensor is no matrix, a row is beyond its end, or a value of a row is NaN or infinite.
    pub fn rows_f32(&self, rows: &[usize]) -> Result<Vec<f32>, ModelError> {
        self.tensor.rows_f32(rows).map_err(|problem| self.place.error(problem).into())
    }

    /// Refuses another shape than `shape`.
    pub(super) fn must_be(&self, shape: &[usize], why: &str) -> Result<(), ModelError> {
        if self.shape() == shape {
            return Ok(());
        }
        let problem = self.tensor.wrong_shape(format!("{shape:?} ({why})"));
        Err(self.place.error(problem).into())
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) table: Arc<TensorTable>,
    /// Its name in the file.
    pub(super) name: String,
}

impl Place {
    /// What lies there.
    pub(super) fn tensor(&self) -> Result<&StoredTensor, FileError> {
        self.table.get(&self.name)
    }

    /// The error that it has `problem`.
    pub(super) fn error(&self, problem: TensorProblem) -> FileError {
        self.table.error(&self.name, problem)
    }
}
