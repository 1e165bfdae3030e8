//! Plain safetensors files of matrices by module path: the inputs and outputs that other programs are compared with.

use crate::atomic;
use crate::error::FileError;
use crate::safetensors_file;
use crate::tensor::{TensorEntry, TensorProblem};
use std::collections::BTreeMap;
use std::path::Path;

/// A matrix in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows, tokens mostly.
    pub rows: usize,
    /// Columns: d for inputs, k for outputs.
    pub columns: usize,
    /// Row-major, rows·columns numbers.
    pub values: Vec<f32>,
}

/// Reads a safetensors file of F32, F16 or BF16 matrices, all finite, by name.
///
/// # Errors
///
/// An unreadable or damaged file, a tensor that is no matrix, another element type, NaN or infinity: each with file and tensor.
pub fn read_matrices(path: &Path) -> Result<BTreeMap<String, Matrix>, FileError> {
    let table = safetensors_file::map(path)?;
    let mut matrices = BTreeMap::new();
    for (name, entry) in table.entries() {
        let bad = |problem| table.error(name, problem);
        let tensor = match entry {
            TensorEntry::Stored(tensor) => tensor,
            TensorEntry::Unsupported { element_type, .. } => {
                return Err(bad(TensorProblem::UnsupportedType { found: element_type.clone() }));
            }
        };
        let (rows, columns) = tensor.matrix_shape().map_err(bad)?;
        let values = tensor.to_finite_f32().map_err(bad)?;
        matrices.insert(name.clone(), Matrix { rows, columns, values });
    }
    Ok(matrices)
}

/// Writes `matrices` as F32; the file at `path` is replaced whole or not at all.
///
/// # Errors
///
/// A matrix whose values are not as many as its extents say, or a refusal of the operating system.
pub fn write_matrices(path: &Path, matrices: &BTreeMap<String, Matrix>) -> Result<(), FileError> {
    for (name, matrix) in matrices {
        if matrix.rows.checked_mul(matrix.columns) != Some(matrix.values.len()) {
            let expected = format!("as many elements as its {} values", matrix.values.len());
            let problem = TensorProblem::WrongShape { found: vec![matrix.rows, matrix.columns], expected };
            return Err(FileError::Tensor { path: path.to_owned(), tensor: name.clone(), problem });
        }
    }
    let tensors =
        matrices.iter().map(|(name, matrix)| (name.clone(), vec![matrix.rows, matrix.columns], &matrix.values[..]));
    let bytes = safetensors_file::to_bytes(tensors)
        .map_err(|problem| FileError::Safetensors { path: path.to_owned(), problem })?;
    atomic::write_file(path, &bytes)
}
