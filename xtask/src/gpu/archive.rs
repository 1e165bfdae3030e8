//! One file of the folder, small enough to be carried in one go.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use liblzma::stream::{Check, MtStreamBuilder};
use liblzma::write::XzEncoder;

use super::folder::MADE;

/// What can be carried at once: 64 MiB.
const MOST_BYTES: u64 = 64 << 20;
/// How hard xz tries, of 9: harder takes longer and saves little, and needs more memory to be unpacked.
const PRESET: u32 = 6;

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("can't pack {folder} into {archive}: {source}", folder = folder.display(), archive = archive.display())]
    Io { folder: PathBuf, archive: PathBuf, source: io::Error },
    #[error(
        "{archive} has {bytes} bytes, and {MOST_BYTES} are what can be carried; remove the kernels of the folder that aren't needed",
        archive = archive.display()
    )]
    TooLarge { archive: PathBuf, bytes: u64 },
}

/// The archive beside a folder, and the script that unpacks and runs it.
pub(super) struct Archive {
    /// `gpu.tar.xz` of a folder `gpu`.
    pub(super) file: PathBuf,
    /// `gpu.sh`, which looks for the archive of its own name.
    pub(super) script: PathBuf,
    /// Of the archive.
    pub(super) bytes: u64,
}

/// Packs `folder` without the results that lie in it, and leaves its script beside.
///
/// # Errors
/// What the file system answers, and [`ArchiveError::TooLarge`] for an archive that is there but too large.
pub(super) fn pack(folder: &Path) -> Result<Archive, ArchiveError> {
    let (file, script) = (folder.with_extension("tar.xz"), folder.with_extension("sh"));
    // A killed run leaves no half of an archive.
    let part = folder.with_extension("tar.xz.new");
    let packed = write(folder, &part).and_then(|()| {
        fs::rename(&part, &file)?;
        fs::copy(folder.join("run.sh"), &script)?;
        Ok(file.metadata()?.len())
    });
    match packed {
        Err(source) => Err(ArchiveError::Io { folder: folder.to_owned(), archive: file, source }),
        Ok(bytes) if bytes > MOST_BYTES => Err(ArchiveError::TooLarge { archive: file, bytes }),
        Ok(bytes) => Ok(Archive { file, script, bytes }),
    }
}

fn write(folder: &Path, archive: &Path) -> io::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u32);
    let stream = MtStreamBuilder::new().preset(PRESET).check(Check::Crc64).threads(threads).encoder()?;
    let mut archive = tar::Builder::new(XzEncoder::new_stream(BufWriter::new(File::create(archive)?), stream));
    // A folder without a name is none that was made here.
    let root = Path::new(folder.file_name().unwrap_or_default());
    let mut entries = folder.read_dir()?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, inside) = (entry.path(), root.join(entry.file_name()));
        if path.is_file() {
            archive.append_path_with_name(&path, inside)?;
        } else if MADE.iter().any(|made| entry.file_name() == *made) {
            archive.append_dir_all(inside, &path)?;
        }
    }
    archive.into_inner()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_has_the_folder_without_its_results() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("gpu");
        for (name, text) in [
            ("run.sh", "the script"),
            ("bin/flora", "the command"),
            ("kernels/0123.sm_90a.cubin", "a kernel"),
            ("results/report.json", "{}"),
            ("rehearsal/outputs/tune.out", "{}"),
        ] {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let archive = pack(&folder).unwrap();
        assert_eq!(archive.file, root.path().join("gpu.tar.xz"));
        assert_eq!(archive.bytes, archive.file.metadata().unwrap().len());
        assert_eq!(fs::read_to_string(root.path().join("gpu.sh")).unwrap(), "the script");
        assert_eq!(archive.script, root.path().join("gpu.sh"));
        let mut packed = tar::Archive::new(liblzma::read::XzDecoder::new(File::open(&archive.file).unwrap()));
        let entries = packed.entries().unwrap().map(Result::unwrap);
        let files = entries.filter(|entry| entry.header().entry_type().is_file());
        let files: Vec<_> = files.map(|file| file.path().unwrap().display().to_string()).collect();
        assert_eq!(files, ["gpu/bin/flora", "gpu/kernels/0123.sm_90a.cubin", "gpu/run.sh"]);
        let missing = root.path().join("nothing");
        assert!(matches!(pack(&missing), Err(ArchiveError::Io { folder, .. }) if folder == missing));
    }
}
