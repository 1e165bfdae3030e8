//! The two files of an adapter's folder as they were at one moment, and what tells them from the files that take their place.
//!
//! Folders are replaced while they are read: by renaming, by links that are flipped, or by writing over the files. What is read
//! here is one folder's, both files of the same moment, or an error. Both are opened in one opened folder, so a link that is
//! flipped meanwhile changes nothing; they are read into memory, so a file that is cut short can't end the process; and they are
//! read again where folder or files have changed by the end.

use super::{AdapterError, CONFIG, TENSORS};
use crate::error::FileError;
use crate::tensor::SharedBytes;
use sha2::{Digest, Sha256};
use std::fs::{File, Metadata};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The longest config that is accepted, in bytes; one with a pattern for every module of a large model has about 200 kB.
const CONFIG_LIMIT: u64 = 4 << 20;
/// The longest adapter that is accepted, in bytes.
const TENSORS_LIMIT: u64 = 16 << 30;

/// Times of change are as coarse as the system's clock ticks, of 10 ms at most. A file that changed as long ago as this, and is
/// read from then on, has another time when it changes again.
const SETTLED: Duration = Duration::from_millis(20);
/// How often a folder is read that keeps changing; half a second at least.
pub(super) const ATTEMPTS: usize = 25;

/// What tells the two files of an adapter's folder from any others: of the file that each path leads to, the device, the inode,
/// the time of its last change, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FolderVersion([FileVersion; 2]);

impl FolderVersion {
    /// Of the files that are in `folder` now. Reads nothing of them.
    ///
    /// # Errors
    /// A file that isn't there, or can't be looked at.
    pub fn of(folder: &Path) -> Result<Self, AdapterError> {
        let version = |name: &str| {
            let path = folder.join(name);
            std::fs::metadata(&path)
                .map(|metadata| FileVersion::of(&metadata))
                .map_err(|error| missing(folder, name, error))
        };
        Ok(Self([version(CONFIG)?, version(TENSORS)?]))
    }

    /// One number for it.
    pub fn digest(&self) -> u64 {
        self.digest_with(&[])
    }

    /// One number for it and the parts of a mixture.
    pub fn digest_with(&self, parts: &[Self]) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        parts.iter().for_each(|part| part.hash(&mut hasher));
        hasher.finish()
    }

    /// Of the parts of a mixture that are in `folder` now: sub-folders that are called `0`, `1` and so on. Other adapters have none.
    pub fn of_parts(folder: &Path) -> Vec<Self> {
        (0..super::MOST_MIXED).map_while(|part| Self::of(&folder.join(part.to_string())).ok()).collect()
    }
}

/// One file or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileVersion {
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds of the last change, which no program can set.
    changed: (i64, i64),
    modified: Option<SystemTime>,
    length: u64,
}

impl FileVersion {
    #[cfg(unix)]
    fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            modified: metadata.modified().ok(),
            length: metadata.len(),
        }
    }

    #[cfg(not(unix))]
    fn of(metadata: &Metadata) -> Self {
        let modified = metadata.modified().ok();
        let since = modified.and_then(|modified| modified.duration_since(SystemTime::UNIX_EPOCH).ok());
        let since = since.unwrap_or_default();
        let changed = (since.as_secs() as i64, i64::from(since.subsec_nanos()));
        Self { device: 0, inode: 0, changed, modified, length: metadata.len() }
    }

    /// How long to wait until a change after now shows. A clock that is ahead, as another machine's may be, isn't waited for.
    fn unsettled(&self) -> Option<Duration> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let (seconds, nanoseconds) = self.changed;
        let age = now.as_nanos() as i128 - (i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds));
        let left = SETTLED.as_nanos() as i128 - age;
        (left > 0 && left <= 2 * SETTLED.as_nanos() as i128).then(|| Duration::from_nanos(left as u64))
    }
}

/// The files of an adapter's folder, read.
#[derive(Clone, Debug)]
pub struct AdapterFiles {
    pub(super) folder: PathBuf,
    pub(super) config: SharedBytes,
    pub(super) tensors: SharedBytes,
    version: FolderVersion,
}

impl AdapterFiles {
    /// Reads both files of `folder` whole; nothing of it stays open. Links are followed wherever they lead.
    ///
    /// # Errors
    /// A file that isn't there, is no file or can't be read, or a folder that keeps changing.
    pub fn read(folder: &Path) -> Result<Self, AdapterError> {
        Self::read_when(folder, OpenFolder::unsettled)
    }

    /// The same for who won't compare the version: nothing is waited for until a later change would show in it.
    pub(super) fn read_at_once(folder: &Path) -> Result<Self, AdapterError> {
        Self::read_when(folder, |_| None)
    }

    fn read_when(folder: &Path, wait: impl Fn(&OpenFolder) -> Option<Duration>) -> Result<Self, AdapterError> {
        if !folder.is_dir() {
            let reason = "there is no such folder".to_string();
            return Err(AdapterError::NotAnAdapter { path: folder.to_owned(), reason });
        }
        for _ in 0..ATTEMPTS {
            let opened = OpenFolder::open(folder)?;
            if let Some(wait) = wait(&opened) {
                std::thread::sleep(wait);
                continue;
            }
            let config = read(&folder.join(CONFIG), &opened.config, CONFIG_LIMIT)?;
            let tensors = read(&folder.join(TENSORS), &opened.tensors, TENSORS_LIMIT)?;
            if opened.is_as_it_was() {
                let [_, files @ ..] = opened.versions;
                return Ok(Self { folder: folder.to_owned(), config, tensors, version: FolderVersion(files) });
            }
        }
        Err(AdapterError::Unsettled { path: folder.to_owned() })
    }

    /// A digest of what the files hold: the first half of SHA-256. Folders of the same files have the same.
    pub fn content(&self) -> u128 {
        let mut digest = Sha256::new();
        for file in [&self.config, &self.tensors] {
            digest.update((file.as_slice().len() as u64).to_le_bytes());
            digest.update(file.as_slice());
        }
        first_half(digest)
    }

    /// A digest of a weighted sum: of each part's weight and [`content`](Self::content), in their order. No file has the same.
    pub fn content_of_sum(parts: impl IntoIterator<Item = (f64, u128)>) -> u128 {
        let mut digest = Sha256::new();
        digest.update(b"weighted sum");
        for (weight, content) in parts {
            digest.update(weight.to_le_bytes());
            digest.update(content.to_le_bytes());
        }
        first_half(digest)
    }

    /// A digest of a mixture: of its own [`content`](Self::content) and those of its parts. No file has the same.
    pub(super) fn content_with(&self, parts: &[Self]) -> u128 {
        let mut digest = Sha256::new();
        digest.update(b"mixture");
        for files in std::iter::once(self).chain(parts) {
            digest.update(files.content().to_le_bytes());
        }
        first_half(digest)
    }

    /// Of the files that were read, whatever is in the folder by now.
    pub fn version(&self) -> FolderVersion {
        self.version
    }
}

fn first_half(digest: Sha256) -> u128 {
    let digest: [u8; 32] = digest.finalize().into();
    u128::from_le_bytes(std::array::from_fn(|at| digest[at]))
}

/// A folder with its files, all open.
struct OpenFolder {
    folder: File,
    config: File,
    tensors: File,
    /// Of the folder and its files, before anything was read.
    versions: [FileVersion; 3],
}

impl OpenFolder {
    fn open(path: &Path) -> Result<Self, AdapterError> {
        let failed = |source| FileError::io(path, "open", source);
        let folder = open_folder(path).map_err(failed)?;
        let before = version(&folder).map_err(failed)?;
        let open = |name: &str| {
            let file = open_in(&folder, path, name).map_err(|error| missing(path, name, error))?;
            let metadata = file.metadata().map_err(|source| FileError::io(&path.join(name), "open", source))?;
            if !metadata.is_file() {
                return Err(FileError::NotRegular { path: path.join(name) }.into());
            }
            Ok::<_, AdapterError>((file, FileVersion::of(&metadata)))
        };
        let (config, config_version) = open(CONFIG)?;
        let (tensors, tensors_version) = open(TENSORS)?;
        Ok(Self { folder, config, tensors, versions: [before, config_version, tensors_version] })
    }

    fn unsettled(&self) -> Option<Duration> {
        self.versions.iter().filter_map(FileVersion::unsettled).max()
    }

    /// Whether neither the folder's entries nor the files have changed since they were opened.
    fn is_as_it_was(&self) -> bool {
        let now = [&self.folder, &self.config, &self.tensors].map(|file| version(file).ok());
        now == self.versions.map(Some)
    }
}

fn version(file: &File) -> io::Result<FileVersion> {
    Ok(FileVersion::of(&file.metadata()?))
}

#[cfg(unix)]
fn open_folder(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Opening must not wait, as it would for a pipe's other end.
#[cfg(unix)]
fn open_in(folder: &File, _path: &Path, name: &str) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags, openat};
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    Ok(File::from(openat(folder, name, flags, Mode::empty())?))
}

/// No folder can be opened here: its config stands for it.
#[cfg(not(unix))]
fn open_folder(path: &Path) -> io::Result<File> {
    File::open(path.join(CONFIG))
}

#[cfg(not(unix))]
fn open_in(_folder: &File, path: &Path, name: &str) -> io::Result<File> {
    File::open(path.join(name))
}

/// Reads an open file of at most `limit` bytes whole.
fn read(path: &Path, mut file: &File, limit: u64) -> Result<SharedBytes, AdapterError> {
    let failed = |source| FileError::io(path, "read", source);
    let length = file.metadata().map_err(failed)?.len();
    if length > limit {
        return Err(FileError::TooLong { path: path.to_owned(), length, limit }.into());
    }
    let mut bytes = Vec::with_capacity(length as usize);
    (&mut file).take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes.into())
}

/// The error of a file that can't be opened; what to do about one that isn't there.
fn missing(folder: &Path, name: &str, error: io::Error) -> AdapterError {
    if error.kind() != io::ErrorKind::NotFound {
        return FileError::io(&folder.join(name), "open", error).into();
    }
    let is_there = |name: &str| folder.join(name).symlink_metadata().is_ok();
    let reason = if is_there(name) {
        format!("its {name} is a link that leads nowhere")
    } else if name == TENSORS && is_there("adapter_model.bin") {
        "its weights are a pickle (adapter_model.bin), which can run code; load it with PEFT and save it again as safetensors: \
         `PeftModel.from_pretrained(base, FOLDER).save_pretrained(FOLDER)`"
            .to_string()
    } else {
        format!("it has no {name}")
    };
    AdapterError::NotAnAdapter { path: folder.to_owned(), reason }
}
