//! What can be wrong with a file, whatever it holds. Errors about a model or an adapter wrap these.

use crate::gguf::GgufProblem;
use crate::safetensors_file::SafetensorsProblem;
use crate::tensor::TensorProblem;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a file could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A folder, pipe or device where a file is needed.
    #[error("{} is not a regular file", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
    },
    /// A file that is too long to be what it claims.
    #[error("{} has {length} bytes; a file of its kind has at most {limit}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// The most bytes that are accepted.
        limit: u64,
    },
    /// What Git checks out in place of a large file.
    #[error("{} is a pointer of Git LFS and not the file itself; `git lfs pull` in its repository fetches it", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },
    /// Not JSON, or JSON with a key twice.
    #[error("{}: {problem}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The mistake, with line and column.
        problem: String,
    },
    /// Not a safetensors file, or a damaged one.
    #[error("{} is not a whole safetensors file: {problem}; download or save it again", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The damage.
        problem: SafetensorsProblem,
    },
    /// Not a GGUF file, or a damaged one.
    #[error("{} is not a whole GGUF file: {problem}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// The damage.
        problem: GgufProblem,
    },
    /// One tensor is not as it should be.
    #[error("{}: tensor `{tensor}` {problem}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// The mistake.
        problem: TensorProblem,
    },
}

impl FileError {
    pub(crate) fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        FileError::Io { path: path.to_owned(), action, source }
    }
}
