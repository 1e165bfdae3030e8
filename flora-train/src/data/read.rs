//! Files and folders to examples. A folder's files are read in the order of their names, so that a job sees the same data on every
//! machine.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lines::{LineProblem, parse_lines};
use super::{Content, EncodeProblem, Example};

/// Where examples are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sources {
    /// Files of JSON lines (`.jsonl`, `.ndjson`), other files, each of which is one text, and folders of such other files.
    pub paths: Vec<PathBuf>,
    /// The extensions of a folder's files that are read, such as `rkt`; all where there are none.
    #[serde(default)]
    pub extensions: Vec<String>,
}

/// Why data can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder can't be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A line that is no example.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: LineProblem,
    },
    /// A file that was named and is no text.
    #[error("{} is not UTF-8 text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// An example that the tokenizer refuses.
    #[error("{}{}: {problem}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Encode {
        /// The file.
        path: PathBuf,
        /// The line, from 1, where the file has several examples.
        line: Option<usize>,
        /// Why.
        problem: EncodeProblem,
    },
    /// Nothing is left to learn from.
    #[error("there is nothing to learn from in {place}: {reason}")]
    Nothing {
        /// The files or folders.
        place: String,
        /// What became of what is there.
        reason: String,
    },
    /// Too little to hold some of it out.
    #[error(
        "{documents} documents can't be divided into some to learn from and some to evaluate on; give a file or folder to evaluate on"
    )]
    Indivisible {
        /// How many there are.
        documents: usize,
    },
}

/// A file of a folder that isn't learnt from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: &'static str,
}

/// The examples of `sources`, in the order of the paths, and a folder's in that of its files' names; and what was passed over in
/// folders. Links and hidden files of a folder are left alone.
///
/// # Errors
/// A file or folder can't be read, or a named one isn't what it should be; or there is no example at all.
pub fn read(sources: &Sources) -> Result<(Vec<Example>, Vec<Skipped>), DataError> {
    let mut reader = Reader { extensions: &sources.extensions, examples: Vec::new(), skipped: Vec::new() };
    for path in &sources.paths {
        let metadata = std::fs::metadata(path).map_err(|source| failed(path, source))?;
        match (metadata.is_dir(), is_lines(path)) {
            (true, _) => reader.folder(path)?,
            (false, true) => reader.lines(path)?,
            (false, false) => match reader.source(path)? {
                Ok(()) => {}
                Err("it is not UTF-8 text") => return Err(DataError::NotText { path: path.clone() }),
                Err(reason) => {
                    return Err(DataError::Nothing { place: path.display().to_string(), reason: reason.to_owned() });
                }
            },
        }
    }
    if reader.examples.is_empty() {
        let place = sources.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let reason = match &reader.skipped[..] {
            [] => "no file is read there".to_owned(),
            [first, ..] => format!(
                "{} files were passed over, such as {}: {}",
                reader.skipped.len(),
                first.path.display(),
                first.reason
            ),
        };
        return Err(DataError::Nothing { place, reason });
    }
    Ok((reader.examples, reader.skipped))
}

/// Whether a file has an example a line.
fn is_lines(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "jsonl" || extension == "ndjson")
}

fn failed(path: &Path, source: std::io::Error) -> DataError {
    DataError::Io { path: path.to_owned(), source }
}

struct Reader<'a> {
    extensions: &'a [String],
    examples: Vec<Example>,
    skipped: Vec<Skipped>,
}

impl Reader<'_> {
    fn lines(&mut self, path: &Path) -> Result<(), DataError> {
        let bytes = std::fs::read(path).map_err(|source| failed(path, source))?;
        let examples = parse_lines(path, &bytes);
        self.examples.extend(examples.map_err(|(line, problem)| DataError::Line {
            path: path.to_owned(),
            line,
            problem,
        })?);
        Ok(())
    }

    /// A file that is one example; the inner error says why it is none.
    fn source(&mut self, path: &Path) -> Result<Result<(), &'static str>, DataError> {
        let bytes = std::fs::read(path).map_err(|source| failed(path, source))?;
        Ok(match String::from_utf8(bytes) {
            Err(_) => Err("it is not UTF-8 text"),
            Ok(text) if text.trim().is_empty() => Err("it is empty"),
            Ok(text) => {
                self.examples.push(Example { file: path.to_owned(), line: None, content: Content::Source(text) });
                Ok(())
            }
        })
    }

    fn folder(&mut self, folder: &Path) -> Result<(), DataError> {
        let entries = std::fs::read_dir(folder).map_err(|source| failed(folder, source))?;
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| failed(folder, source))?;
            let kind = entry.file_type().map_err(|source| failed(&entry.path(), source))?;
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !is_hidden && (kind.is_dir() || kind.is_file()) {
                paths.push((entry.path(), kind.is_dir()));
            }
        }
        paths.sort();
        for (path, is_folder) in paths {
            if is_folder {
                self.folder(&path)?;
                continue;
            }
            let extension = path.extension().unwrap_or_default();
            if !self.extensions.is_empty() && !self.extensions.iter().any(|wanted| extension == wanted.as_str()) {
                continue;
            }
            if let Err(reason) = self.source(&path)? {
                self.skipped.push(Skipped { path, reason });
            }
        }
        Ok(())
    }
}
