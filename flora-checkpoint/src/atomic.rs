//! Writing so that a reader sees the old content or the new, never half of it.

use crate::error::FileError;
use std::io::{self, Write};
use std::path::Path;

/// Replaces or creates the file `path`: written beside it, brought to the disk, and renamed.
///
/// # Errors
/// The operating system refuses, or the disk is full; then what was at `path` is as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fail = |source| FileError::io(path, "write", source);
    let mut temporary = tempfile::NamedTempFile::new_in(parent).map_err(fail)?;
    temporary.write_all(bytes).map_err(fail)?;
    temporary.as_file().sync_all().map_err(fail)?;
    set_default_permissions(temporary.as_file()).map_err(fail)?;
    temporary.persist(path).map_err(|error| fail(error.error))?;
    sync_folder(parent)
}

/// Puts the folder `new` in the place of `path`, where there may be another. Afterwards that one, if it is still there, is at `new`.
pub(crate) fn replace_folder(new: &Path, path: &Path) -> Result<(), FileError> {
    let fail = |source| FileError::io(path, "replace", source);
    if path.symlink_metadata().is_err() {
        return std::fs::rename(new, path).map_err(fail);
    }
    match exchange(new, path) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
        done => return done.map_err(fail),
    }
    let aside = new.with_extension("replaced");
    std::fs::rename(path, &aside).map_err(fail)?;
    std::fs::rename(new, path).map_err(|source| {
        // Back to what it was, as far as the system lets us.
        let _ = std::fs::rename(&aside, path);
        fail(source)
    })
}

/// Both names at once; [`io::ErrorKind::Unsupported`] where the system or the file system can't.
#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Err(io::ErrorKind::Unsupported.into()),
        done => Ok(done?),
    }
}

#[cfg(not(target_os = "linux"))]
fn exchange(_one: &Path, _other: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Brings a folder's entries to the disk, so that a name that was given holds after a loss of power.
#[cfg(unix)]
pub(crate) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    let synced = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    match synced {
        // Some file systems have no such thing.
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        done => done.map_err(|source| FileError::io(folder, "write", source)),
    }
}

#[cfg(not(unix))]
pub(crate) fn sync_folder(_folder: &Path) -> Result<(), FileError> {
    Ok(())
}

/// Temporary files are private; what is kept may be read by others, as other output of programs.
#[cfg(unix)]
fn set_default_permissions(file: &std::fs::File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_default_permissions(_: &std::fs::File) -> io::Result<()> {
    Ok(())
}
