//! Plain safetensors files: matrices by module path, which are the inputs and outputs that other programs are compared with, and
//! f32 tensors with notes, which are a program's own state.

use crate::atomic;
use crate::error::FileError;
use crate::peft::Operand;
use crate::safetensors_file;
use crate::tensor::{Encoding, SharedBytes, TensorEntry, TensorProblem};
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
    let bytes = safetensors_file::to_bytes(tensors, [])
        .map_err(|problem| FileError::Safetensors { path: path.to_owned(), problem })?;
    atomic::write_file(path, &bytes)
}

/// f32 tensors by name, and notes: the texts that a safetensors file holds beside its tensors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// Any bits, NaN too.
    pub tensors: BTreeMap<String, Operand>,
    /// By key; `format` is the library's own.
    pub notes: BTreeMap<String, String>,
}

/// The longest file of state that is read, in bytes.
const STATE_LIMIT: u64 = 64 << 30;

impl TensorFile {
    /// Reads the file at `path` whole.
    ///
    /// # Errors
    /// An unreadable or damaged file, or a tensor that isn't F32.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let bytes = SharedBytes::read(path, STATE_LIMIT)?;
        let table = safetensors_file::parse(path, bytes.clone())?;
        let mut notes = safetensors_file::notes(path, &bytes)?;
        notes.remove("format");
        let tensor = |(name, entry): (&String, &TensorEntry)| match entry {
            TensorEntry::Stored(tensor) if tensor.encoding() == Encoding::F32 => {
                Ok((name.clone(), Operand { shape: tensor.shape().to_vec(), values: tensor.to_f32() }))
            }
            entry => {
                let found = entry.encoding().map_or("another type".to_owned(), |encoding| format!("{encoding:?}"));
                Err(table.error(name, TensorProblem::UnsupportedType { found }))
            }
        };
        let tensors = table.entries().iter().map(tensor).collect::<Result<_, _>>()?;
        Ok(Self { tensors, notes })
    }

    /// Writes it as the file at `path`, which is replaced whole or not at all, and is on the disk afterwards.
    ///
    /// # Errors
    /// A tensor whose values are not as many as its extents say, or a refusal of the operating system.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        for (name, tensor) in &self.tensors {
            let elements = tensor.shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
            if elements != Some(tensor.values.len()) {
                let expected = format!("as many elements as its {} values", tensor.values.len());
                let problem = TensorProblem::WrongShape { found: tensor.shape.clone(), expected };
                return Err(FileError::Tensor { path: path.to_owned(), tensor: name.clone(), problem });
            }
        }
        let tensors = self.tensors.iter().map(|(name, own)| (name.clone(), own.shape.clone(), &own.values[..]));
        let notes = self.notes.iter().map(|(key, value)| (key.clone(), value.clone()));
        let bytes = safetensors_file::to_bytes(tensors, notes)
            .map_err(|problem| FileError::Safetensors { path: path.to_owned(), problem })?;
        atomic::write_file(path, &bytes)
    }
}
