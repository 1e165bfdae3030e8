//! Bytes that several tensors share: a mapped file, so that a model larger than memory can be opened, or a buffer.

use crate::error::FileError;
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

#[derive(Clone, Debug)]
enum Source {
    Mapped(Arc<Mmap>),
    Owned(Arc<[u8]>),
}

/// A cheaply cloned stretch of bytes.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    source: Source,
    range: Range<usize>,
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { source: Source::Owned(bytes.into()), range }
    }
}

impl SharedBytes {
    /// Maps a file into memory. Only regular files are accepted; what is read is never more than the file holds.
    ///
    /// The file must not be truncated while it is in use: the operating system then ends the process (`SIGBUS`), which no
    /// program can turn into an error. Writers that replace files by renaming are safe.
    pub fn map(path: &Path) -> Result<Self, FileError> {
        let (file, length) = open_regular(path)?;
        if length == 0 {
            return Ok(Vec::new().into());
        }
        // SAFETY: the mapping is private to this process and read-only; the contract on changing the file is above.
        let mapped = unsafe { Mmap::map(&file) }.map_err(|source| FileError::io(path, "map", source))?;
        refuse_pointer(path, &mapped)?;
        let range = 0..mapped.len();
        Ok(Self { source: Source::Mapped(Arc::new(mapped)), range })
    }

    /// Reads a regular file of at most `limit` bytes whole.
    pub fn read(path: &Path, limit: u64) -> Result<Self, FileError> {
        use std::io::Read;
        let (file, length) = open_regular(path)?;
        if length > limit {
            return Err(FileError::TooLong { path: path.to_owned(), length, limit });
        }
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).map_err(|source| FileError::io(path, "read", source))?;
        refuse_pointer(path, &bytes)?;
        Ok(bytes.into())
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        let whole = match &self.source {
            Source::Mapped(mapped) => &mapped[..],
            Source::Owned(owned) => &owned[..],
        };
        &whole[self.range.clone()]
    }

    /// The bytes from `start`, `length` of them, sharing the storage; `None` when they reach past the end.
    pub fn slice(&self, start: usize, length: usize) -> Option<Self> {
        let end = start.checked_add(length)?;
        if end > self.range.len() {
            return None;
        }
        Some(Self { source: self.source.clone(), range: self.range.start + start..self.range.start + end })
    }

    /// Lets the system have the memory that reading the bytes took, where they are mapped; they are read from the file again when
    /// they are touched.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        if let Source::Mapped(mapped) = &self.source {
            // What the system reads around a byte that is touched, and so brings back of a neighbour that was released.
            const AROUND: usize = 64 << 10;
            let start = self.range.start / AROUND * AROUND;
            let end = self.range.end.next_multiple_of(AROUND).min(mapped.len());
            // SAFETY: pages of a file that are only read come back as they were. A system that doesn't take the advice keeps them.
            let _ = unsafe { mapped.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

fn open_regular(path: &Path) -> Result<(File, u64), FileError> {
    // Looked at before it is opened: opening a pipe would block until someone writes to it.
    let metadata = std::fs::metadata(path).map_err(|source| FileError::io(path, "open", source))?;
    if !metadata.is_file() {
        return Err(FileError::NotRegular { path: path.to_owned() });
    }
    let file = File::open(path).map_err(|source| FileError::io(path, "open", source))?;
    Ok((file, metadata.len()))
}

/// Refuses what Git checks out in place of a file that it keeps elsewhere.
fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    const BEGINNING: &[u8] = b"version https://git-lfs.github.com/spec/";
    if bytes.starts_with(BEGINNING) { Err(FileError::LfsPointer { path: path.to_owned() }) } else { Ok(()) }
}
