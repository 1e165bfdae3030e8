//! The tensors of one file by name, whichever format the file has.

use super::{Encoding, StoredTensor, TensorProblem};
use crate::error::FileError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One tensor of a file.
#[derive(Clone, Debug)]
pub enum TensorEntry {
    /// A tensor that can be decoded.
    Stored(StoredTensor),
    /// A tensor of a type that has no decoder here; it is an error only to whoever asks for it.
    Unsupported {
        /// The type's name in the file format.
        element_type: String,
        /// The shape, outermost extent first.
        shape: Vec<usize>,
    },
}

impl TensorEntry {
    /// The shape, outermost extent first.
    pub fn shape(&self) -> &[usize] {
        match self {
            TensorEntry::Stored(tensor) => tensor.shape(),
            TensorEntry::Unsupported { shape, .. } => shape,
        }
    }

    /// The encoding, where there is a decoder for it.
    pub fn encoding(&self) -> Option<Encoding> {
        match self {
            TensorEntry::Stored(tensor) => Some(tensor.encoding()),
            TensorEntry::Unsupported { .. } => None,
        }
    }
}

/// The tensors of one file.
#[derive(Clone, Debug)]
pub struct TensorTable {
    path: PathBuf,
    entries: BTreeMap<String, TensorEntry>,
}

impl TensorTable {
    pub(crate) fn new(path: &Path, entries: BTreeMap<String, TensorEntry>) -> Self {
        Self { path: path.to_owned(), entries }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, TensorEntry> {
        &self.entries
    }

    /// The tensor `name`, if it is there and can be decoded.
    pub fn get(&self, name: &str) -> Result<&StoredTensor, FileError> {
        match self.entries.get(name) {
            Some(TensorEntry::Stored(tensor)) => Ok(tensor),
            Some(TensorEntry::Unsupported { element_type, .. }) => {
                Err(self.error(name, TensorProblem::UnsupportedType { found: element_type.clone() }))
            }
            None => {
                let near = nearest(name, self.entries.keys());
                Err(self.error(name, TensorProblem::Missing { near }))
            }
        }
    }

    /// The error that `tensor` of this file has `problem`.
    pub(crate) fn error(&self, tensor: &str, problem: TensorProblem) -> FileError {
        FileError::Tensor { path: self.path.clone(), tensor: tensor.to_string(), problem }
    }
}

/// The most similar of `names`, for messages; only among the first thousand, so that an error costs little.
pub(crate) fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a String>) -> Option<String> {
    if name.len() > 256 {
        return None;
    }
    names
        .take(1000)
        .filter(|candidate| candidate.len() <= 256)
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.clone())
}
