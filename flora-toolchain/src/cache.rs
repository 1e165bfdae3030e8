//! The cache folder: everything fetched lives in one folder per thing, and a folder that exists is whole.
//!
//! That one promise is what the rest of the crate rests on. A thing is built in a temporary sibling, flushed to the disk
//! and then renamed into place; a lock file keeps two processes from fetching the same thing at once, and whoever holds
//! the lock clears away what a killed process left.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::error::FetchError;

/// The folder that holds everything flora fetches.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The user's cache folder: `FLORA_CACHE`, or else `flora` in the platform's cache folder (`~/.cache` on Linux).
    /// Nothing is created yet.
    ///
    /// # Errors
    /// [`FetchError::NoCacheFolder`] when neither is known.
    pub fn open() -> Result<Self, FetchError> {
        match std::env::var_os("FLORA_CACHE").filter(|folder| !folder.is_empty()) {
            Some(folder) => {
                let folder = PathBuf::from(folder);
                // Absolute, because programs are started from here with other working folders.
                std::path::absolute(&folder).map(Self::at).map_err(FetchError::io("resolve", folder, "the cache"))
            }
            None => dirs::cache_dir().map(|folder| Self::at(folder.join("flora"))).ok_or(FetchError::NoCacheFolder),
        }
    }

    /// A cache in `root`, an absolute path.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache's own folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of the thing `name` if it is installed, which means whole.
    #[must_use]
    pub fn installed(&self, name: &str) -> Option<PathBuf> {
        let folder = self.root.join(name);
        folder.is_dir().then_some(folder)
    }

    /// The folder of the thing `name`, which `build` fills (it is given an empty folder) if it is not installed yet.
    ///
    /// Waits for another process that installs the same thing. When `build` fails, nothing is left behind.
    ///
    /// # Errors
    /// What `build` returns, or what the file system answers.
    pub fn install(
        &self,
        name: &str,
        build: impl FnOnce(&Path) -> Result<(), FetchError>,
    ) -> Result<PathBuf, FetchError> {
        if let Some(folder) = self.installed(name) {
            return Ok(folder);
        }
        fs::create_dir_all(&self.root).map_err(FetchError::io("create", &self.root, name))?;
        let _lock = self.lock(name)?;
        if let Some(folder) = self.installed(name) {
            return Ok(folder);
        }
        let prefix = format!(".{name}.part-");
        self.clear_leftovers(&prefix);
        let part = tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.root).map_err(FetchError::io(
            "create a folder in",
            &self.root,
            name,
        ))?;
        build(part.path()).map_err(|error| match error {
            // The temporary folder is gone by the time this is read.
            FetchError::DiskFull { what, .. } => FetchError::DiskFull { what, folder: self.root.clone() },
            error => error,
        })?;
        flush(part.path()).map_err(FetchError::io("flush", part.path(), name))?;
        let folder = self.root.join(name);
        fs::rename(part.path(), &folder).map_err(FetchError::io("rename a folder to", &folder, name))?;
        // Renamed: there is nothing left for the guard to remove.
        let _ = part.keep();
        Ok(folder)
    }

    /// The lock of the thing `name`, held until the file is dropped.
    fn lock(&self, name: &str) -> Result<File, FetchError> {
        let path = self.root.join(format!(".{name}.lock"));
        let file = File::create(&path).map_err(FetchError::io("create", &path, name))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                tracing::info!("waiting for another process that fetches {name}");
                file.lock().map_err(FetchError::io("lock", &path, name))?;
            }
            Err(TryLockError::Error(source)) => return Err(FetchError::io("lock", &path, name)(source)),
        }
        Ok(file)
    }

    /// Removes what processes that were killed half-way left; called with the lock held. What can't be removed (a
    /// program that such a process started may still be writing) takes space but is never used.
    fn clear_leftovers(&self, prefix: &str) {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A thing as the environment variable `variable` has it, for tests: `required` is what `ensure` gives, `absent` is none,
/// and without it there is what was fetched before. One command sets it, so that a test that lacks the thing is known.
pub(crate) fn from_environment<T>(
    variable: &str,
    ensure: impl FnOnce() -> Result<T, FetchError>,
    installed: impl FnOnce() -> Option<T>,
) -> Result<Option<T>, FetchError> {
    match std::env::var(variable).as_deref() {
        Ok("required") => ensure().map(Some),
        Ok("absent") => Ok(None),
        _ => Ok(installed()),
    }
}

/// Writes every file below `folder` to the disk, so that the rename which declares it whole can't outlive its contents.
fn flush(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            flush(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn failure() -> FetchError {
        FetchError::NoCacheFolder
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let result = cache.install("thing", |folder| {
            fs::write(folder.join("half"), "half").unwrap();
            Err(failure())
        });
        assert!(result.is_err());
        assert_eq!(cache.installed("thing"), None);
        let left: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".thing.lock"], "only the lock file may stay");
    }

    #[test]
    fn leftovers_of_a_killed_process_are_cleared_and_never_used() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let leftover = root.path().join(".thing.part-killed");
        fs::create_dir(&leftover).unwrap();
        fs::write(leftover.join("file"), "half").unwrap();
        let folder = cache
            .install("thing", |folder| {
                fs::write(folder.join("file"), "whole").unwrap();
                Ok(())
            })
            .unwrap();
        assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "whole");
        assert!(!leftover.exists());
    }

    #[test]
    fn many_at_once_build_once_and_see_the_whole() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        let builds = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let folder = cache
                        .install("thing", |folder| {
                            builds.fetch_add(1, Ordering::SeqCst);
                            for part in 0..5 {
                                fs::write(folder.join(part.to_string()), "whole").unwrap();
                                std::thread::sleep(std::time::Duration::from_millis(5));
                            }
                            Ok(())
                        })
                        .unwrap();
                    assert_eq!(fs::read_dir(folder).unwrap().count(), 5);
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let error = Cache::at(file.join("cache")).install("thing", |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("cache"), "{error}");
        assert!(error.to_string().contains("FLORA_CACHE"), "{error}");
    }
}
