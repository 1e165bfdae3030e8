//! Machine code that is carried to where there is no time to compile: a file for each kernel, found by its text.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::architecture::Architecture;
use crate::wheel::hexadecimal;

/// A folder of machine code.
#[derive(Debug, Clone)]
pub struct KeptKernels {
    folder: PathBuf,
}

impl KeptKernels {
    /// The environment variable that names a folder.
    pub const VARIABLE: &str = "FLORA_KERNELS";

    /// Those in `folder`, which need not be there yet.
    #[must_use]
    pub fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Those in the folder that [`KeptKernels::VARIABLE`] names.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        std::env::var_os(Self::VARIABLE).filter(|folder| !folder.is_empty()).map(|folder| Self::at(folder.into()))
    }

    /// The machine code of a kernel's text, a cubin; `None` where it wasn't kept.
    #[must_use]
    pub fn find(&self, source: &str, architecture: Architecture) -> Option<Vec<u8>> {
        fs::read(self.file(source, architecture)).ok()
    }

    /// Keeps it. A reader sees the whole or nothing.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn keep(&self, source: &str, architecture: Architecture, code: &[u8]) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut part = tempfile::NamedTempFile::new_in(&self.folder)?;
        part.write_all(code)?;
        part.persist(self.file(source, architecture))?;
        Ok(())
    }

    /// The name has all that the machine code depends on but the compilers, which are those that it was made by.
    fn file(&self, source: &str, architecture: Architecture) -> PathBuf {
        let hash = hexadecimal(&Sha256::digest(source));
        self.folder.join(format!("{hash}.{architecture}.cubin"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_code_is_found_by_text_and_architecture() {
        let root = tempfile::tempdir().unwrap();
        let kept = KeptKernels::at(root.path().join("new"));
        assert_eq!(kept.find("a", Architecture::Sm90a), None);
        kept.keep("a", Architecture::Sm90a, &[1, 0, 255]).unwrap();
        kept.keep("a", Architecture::Sm80, &[2]).unwrap();
        kept.keep("a", Architecture::Sm80, &[3]).unwrap();
        assert_eq!(kept.find("a", Architecture::Sm90a), Some(vec![1, 0, 255]));
        assert_eq!(kept.find("a", Architecture::Sm80), Some(vec![3]));
        assert_eq!(kept.find("b", Architecture::Sm80), None);
        assert_eq!(kept.find("a", Architecture::Sm100), None);
        assert_eq!(root.path().join("new").read_dir().unwrap().count(), 2);
    }
}
