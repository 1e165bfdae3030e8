//! Keeps what was compiled, so that a test over hundreds of kernels costs seconds when nothing changed.
//!
//! A result is a file in the cache folder, named by the SHA-256 of all that it depends on: the source, the architecture,
//! the compilers' versions and the code that reads their output. It starts with the SHA-256 of its own content, so a
//! damaged one is known, passed over and written anew. A cache that can't be read or written costs time and nothing else.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::Compiled;
use super::architecture::Architecture;
use crate::wheel::hexadecimal;

/// The code on which a result depends: with any of it changed, a kept result would no longer be what a compilation gives.
const READERS: [&str; 5] = [
    include_str!("../cuda.rs"),
    include_str!("ptxas.rs"),
    include_str!("listing.rs"),
    include_str!("mix.rs"),
    include_str!("loops.rs"),
];

/// Results kept at most, a few kilobytes each; the longest unused ones make room.
const MOST: usize = 4096;

/// The folder of kept results.
#[derive(Debug)]
pub(super) struct Results {
    folder: PathBuf,
    /// The compilers' versions.
    compilers: String,
}

impl Results {
    /// Those in `folder`, made by such compilers.
    pub(super) fn new(folder: PathBuf, compilers: String) -> Self {
        Self { folder, compilers }
    }

    /// What `compile` gives for the source, or gave at an earlier time.
    pub(super) fn get_or<E>(
        &self,
        source: &str,
        architecture: Architecture,
        compile: impl FnOnce() -> Result<Compiled, E>,
    ) -> Result<Compiled, E> {
        let file = self.folder.join(self.key(source, architecture));
        if let Some(kept) = read(&file) {
            return Ok(kept);
        }
        let compiled = compile()?;
        // Without it the next compilation takes as long as this one did.
        let _ = self.write(&file, &compiled);
        Ok(compiled)
    }

    /// The name of the file.
    fn key(&self, source: &str, architecture: Architecture) -> String {
        let mut hash = Sha256::new();
        let architecture = architecture.to_string();
        for part in READERS.into_iter().chain([self.compilers.as_str(), &architecture, source]) {
            // With its length, so that no two lists of parts hash alike.
            hash.update(part.len().to_le_bytes());
            hash.update(part);
        }
        hexadecimal(&hash.finalize())
    }

    /// Writes a result; a reader sees the whole or nothing.
    fn write(&self, file: &Path, compiled: &Compiled) -> std::io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let content = serde_json::to_string(compiled)?;
        let mut part = tempfile::NamedTempFile::new_in(&self.folder)?;
        write!(part, "{}\n{content}", digest(&content))?;
        part.persist(file)?;
        self.make_room()
    }

    /// Removes the longest unused results above [`MOST`].
    fn make_room(&self) -> std::io::Result<()> {
        let files: Vec<_> = fs::read_dir(&self.folder)?.flatten().map(|entry| entry.path()).collect();
        if files.len() <= MOST {
            return Ok(());
        }
        let used =
            |file: &PathBuf| fs::metadata(file).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut files: Vec<_> = files.into_iter().map(|file| (used(&file), file)).collect();
        files.sort();
        // An eighth at once, so that not every result that follows sorts the folder again.
        for (_, file) in &files[..files.len() - (MOST - MOST / 8)] {
            let _ = fs::remove_file(file);
        }
        Ok(())
    }
}

/// A kept result, if it is there and whole.
fn read(file: &Path) -> Option<Compiled> {
    let text = fs::read_to_string(file).ok()?;
    let (found, content) = text.split_once('\n')?;
    if found != digest(content) {
        return None;
    }
    // When it was last used. Unknown, it is removed earlier.
    let _ = File::options().append(true).open(file).and_then(|file| file.set_modified(SystemTime::now()));
    serde_json::from_str(content).ok()
}

fn digest(content: &str) -> String {
    hexadecimal(&Sha256::digest(content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn compiled(registers: u32) -> Compiled {
        Compiled { registers, ..Compiled::example() }
    }

    /// The registers of the result, and whether it was compiled for that.
    fn get(results: &Results, source: &str, architecture: Architecture, registers: u32) -> (u32, bool) {
        let mut anew = false;
        let result = results.get_or(source, architecture, || {
            anew = true;
            Ok::<_, Infallible>(compiled(registers))
        });
        (result.unwrap().registers, anew)
    }

    fn only_file(folder: &Path) -> PathBuf {
        let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        let [file] = &files[..] else { panic!("{files:?}") };
        file.clone()
    }

    #[test]
    fn a_result_is_kept_by_source_architecture_and_compilers() {
        let root = tempfile::tempdir().unwrap();
        let results = Results::new(root.path().join("compiled"), "1".to_owned());
        assert_eq!(get(&results, "a", Architecture::Sm80, 1), (1, true));
        assert_eq!(get(&results, "a", Architecture::Sm80, 2), (1, false));
        assert_eq!(get(&results, "a", Architecture::Sm90a, 3), (3, true));
        assert_eq!(get(&results, "b", Architecture::Sm80, 4), (4, true));
        let newer = Results::new(root.path().join("compiled"), "2".to_owned());
        assert_eq!(get(&newer, "a", Architecture::Sm80, 5), (5, true));
    }

    #[test]
    fn a_damaged_result_is_compiled_anew() {
        let root = tempfile::tempdir().unwrap();
        let results = Results::new(root.path().to_owned(), "1".to_owned());
        get(&results, "a", Architecture::Sm80, 17);
        let file = only_file(root.path());
        let whole = fs::read_to_string(&file).unwrap();
        assert!(whole.contains("\"registers\":17"));
        for damaged in
            [whole.replace("\"registers\":17", "\"registers\":71"), whole[..whole.len() / 2].to_owned(), String::new()]
        {
            fs::write(&file, damaged).unwrap();
            assert_eq!(get(&results, "a", Architecture::Sm80, 18), (18, true));
            assert_eq!(get(&results, "a", Architecture::Sm80, 19), (18, false));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_costs_time_only() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let results = Results::new(file.join("compiled"), "1".to_owned());
        assert_eq!(get(&results, "a", Architecture::Sm80, 1), (1, true));
        assert_eq!(get(&results, "a", Architecture::Sm80, 2), (2, true));
    }

    #[test]
    fn the_longest_unused_results_make_room() {
        let root = tempfile::tempdir().unwrap();
        let results = Results::new(root.path().to_owned(), "1".to_owned());
        for number in 0..MOST {
            let file = File::create(root.path().join(number.to_string())).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number as u64)).unwrap();
        }
        get(&results, "a", Architecture::Sm80, 1);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), MOST - MOST / 8);
        assert_eq!(get(&results, "a", Architecture::Sm80, 2), (1, false));
    }
}
