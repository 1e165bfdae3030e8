//! Machine code on disk, so that a kernel is compiled once for all programs of a user.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::DriverError;

/// A folder of compiled kernels. A file is named after the text, the card's architecture and NVRTC's version, and begins with the hash of
/// what follows, so that a damaged one is known.
#[derive(Clone, Debug)]
pub struct KernelCache {
    folder: PathBuf,
}

/// What machine code is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    pub(crate) text: &'a str,
    pub(crate) architecture: &'a str,
    /// NVRTC's.
    pub(crate) version: (i32, i32),
}

/// Of a hash.
const HASH: usize = 32;

impl KernelCache {
    /// `kernels` in the user's cache folder: `FLORA_CACHE`, or else `flora` in the platform's. Nothing is created yet.
    ///
    /// # Errors
    /// Neither is known.
    pub fn open() -> Result<Self, DriverError> {
        let own = std::env::var_os("FLORA_CACHE").filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let root = own.or_else(|| dirs::cache_dir().map(|folder| folder.join("flora")));
        root.map(|root| Self::at(root.join("kernels"))).ok_or(DriverError::NoCacheFolder)
    }

    /// Another folder.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was kept, if it is whole.
    pub(crate) fn find(&self, key: Key<'_>) -> Option<Vec<u8>> {
        let file = fs::read(self.path(key)).ok()?;
        let (hash, code) = file.split_at_checked(HASH)?;
        (Sha256::digest(code)[..] == *hash).then(|| code.to_vec())
    }

    /// Keeps machine code; whoever reads meanwhile has what was there, or all of this.
    pub(crate) fn keep(&self, key: Key<'_>, code: &[u8]) -> Result<(), DriverError> {
        let write = || -> io::Result<()> {
            fs::create_dir_all(&self.folder)?;
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(&Sha256::digest(code))?;
            file.write_all(code)?;
            file.as_file().sync_all()?;
            file.persist(self.path(key))?;
            Ok(())
        };
        write().map_err(|source| DriverError::Cache { folder: self.folder.clone(), source })
    }

    fn path(&self, Key { text, architecture, version: (major, minor) }: Key<'_>) -> PathBuf {
        let hash: String = Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        self.folder.join(format!("{hash}.{architecture}.{major}.{minor}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_or_of_another_text_is_not_found() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(root.path().join("new"));
        let key = Key { text: "a", architecture: "sm_90a", version: (12, 9) };
        assert_eq!(cache.find(key), None);
        cache.keep(key, &[1, 0, 255]).unwrap();
        assert_eq!(cache.find(key), Some(vec![1, 0, 255]));
        for other in [Key { text: "b", ..key }, Key { architecture: "sm_80", ..key }, Key { version: (12, 8), ..key }] {
            assert_eq!(cache.find(other), None, "{other:?}");
        }
        let path = cache.path(key);
        let whole = fs::read(&path).unwrap();
        for end in 0..whole.len() {
            fs::write(&path, &whole[..end]).unwrap();
            assert_eq!(cache.find(key), None, "{end} bytes");
        }
        for at in 0..whole.len() {
            let mut other = whole.clone();
            other[at] ^= 1;
            fs::write(&path, &other).unwrap();
            assert_eq!(cache.find(key), None, "byte {at}");
        }
        cache.keep(key, &[2]).unwrap();
        assert_eq!(cache.find(key), Some(vec![2]));
        assert_eq!(cache.folder().read_dir().unwrap().count(), 1, "no temporary file is left");
        let blocked = KernelCache::at(path.join("below a file"));
        assert!(matches!(blocked.keep(key, &[1]), Err(DriverError::Cache { .. })));
    }
}
