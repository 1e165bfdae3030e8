//! Models that are cut into several files, as llama.cpp does it: `NAME-00001-of-00003.gguf` and so on, each of which says its number
//! and how many there are. The first has the model's metadata.

use super::{Gguf, GgufProblem, MetadataValue};
use crate::error::FileError;
use crate::tensor::SharedBytes;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use thiserror::Error;

/// What is wrong with the files that a model is cut into.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SplitProblem {
    /// `split.no` and `split.count` that don't belong together.
    #[error("it says to be number {number} of {count} files, counted from 0")]
    Number {
        /// Its number.
        number: u64,
        /// How many there are.
        count: u64,
    },
    /// A name from which the others' can't be told.
    #[error(
        "it is one of {count} files that a model is cut into, so its name has to end in `{expected}`; name all as they were"
    )]
    Name {
        /// How many there are.
        count: u64,
        /// The end of its name.
        expected: String,
    },
    /// One isn't there.
    #[error("it is one of {count} files that a model is cut into, and `{missing}` isn't beside it; download that too")]
    Missing {
        /// How many there are.
        count: u64,
        /// The name of the missing one.
        missing: String,
    },
    /// One that says to be another.
    #[error(
        "by its name it is number {expected} of {count} files that a model is cut into, but it says otherwise; download it again"
    )]
    Other {
        /// Counted from 1.
        expected: u64,
        /// How many there are.
        count: u64,
    },
    /// A tensor that another file has too.
    #[error("its tensor `{tensor}` is in another of the model's files too; the files aren't of one model")]
    Repeated {
        /// The tensor.
        tensor: String,
    },
    /// Files that together have more or fewer tensors than they say.
    #[error("the model's files have {found} tensors and say to have {expected}; the files aren't of one model")]
    Tensors {
        /// What there are.
        found: u64,
        /// What they say.
        expected: u64,
    },
}

pub(super) fn error(path: &Path, problem: SplitProblem) -> FileError {
    FileError::Gguf { path: path.to_owned(), problem: GgufProblem::Split(problem) }
}

/// What a file says of its place among several.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Split {
    /// Counted from 0.
    number: u64,
    /// At least 2.
    count: u64,
}

impl Split {
    /// `None` of a file that is whole.
    pub(super) fn of(metadata: &BTreeMap<String, MetadataValue>) -> Result<Option<Split>, SplitProblem> {
        let number_of = |key: &str| metadata.get(key).and_then(MetadataValue::as_u64);
        let (number, count) = (number_of("split.no").unwrap_or(0), number_of("split.count").unwrap_or(1));
        match count {
            0 | 1 => Ok(None),
            // Five digits are what a name has room for.
            2..=99_999 if number < count => Ok(Some(Split { number, count })),
            _ => Err(SplitProblem::Number { number, count }),
        }
    }

    /// All files of the model, `opened` being this one's, at `path`.
    pub(super) fn open(self, path: &Path, opened: Gguf) -> Result<Gguf, FileError> {
        let fail = |problem| error(path, problem);
        let (count, own) = (self.count, suffix(self.number, self.count));
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(beginning) = name.strip_suffix(&own[..]) else {
            return Err(fail(SplitProblem::Name { count, expected: own }));
        };
        let path_of = |number: u64| path.with_file_name(format!("{beginning}{}", suffix(number, count)));
        let missing = (0..count).map(path_of).find(|path| !path.exists());
        if let Some(missing) = missing.as_deref().and_then(Path::file_name) {
            return Err(fail(SplitProblem::Missing { count, missing: missing.to_string_lossy().into_owned() }));
        }
        let mut files = Vec::new();
        for number in 0..count {
            files.push(if number == self.number { opened.clone() } else { self.other(&path_of(number), number)? });
        }
        let metadata = files[0].metadata.clone();
        let shards: Vec<_> = files.into_iter().flat_map(|file| file.shards).collect();
        let mut tensors = HashSet::new();
        for shard in &shards {
            if let Some(tensor) = shard.entries().keys().find(|tensor| !tensors.insert(tensor.as_str())) {
                return Err(error(shard.path(), SplitProblem::Repeated { tensor: tensor.clone() }));
            }
        }
        let found = tensors.len() as u64;
        match metadata.get("split.tensors.count").and_then(MetadataValue::as_u64) {
            Some(expected) if expected != found => Err(fail(SplitProblem::Tensors { found, expected })),
            _ => Ok(Gguf { metadata, shards }),
        }
    }

    /// The file that has to be number `number`.
    fn other(self, path: &Path, number: u64) -> Result<Gguf, FileError> {
        let gguf = Gguf::parse(path, SharedBytes::map(path)?)?;
        if Split::of(&gguf.metadata) == Ok(Some(Split { number, ..self })) {
            return Ok(gguf);
        }
        Err(error(path, SplitProblem::Other { expected: number + 1, count: self.count }))
    }
}

/// How the name of the file of this number ends.
fn suffix(number: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", number + 1)
}

/// The name of a file without extension, and without its number if it has one.
pub(crate) fn without_number(stem: &str) -> &str {
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let numbers = stem.rsplit_once("-of-").filter(|(_, count)| is_number(count));
    let beginning = numbers.and_then(|(rest, _)| rest.rsplit_once('-')).filter(|(_, number)| is_number(number));
    beginning.map_or(stem, |(beginning, _)| beginning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_their_numbers() {
        assert_eq!(without_number("m-00001-of-00002"), "m");
        for name in ["m", "m-1-of-2", "m-00001-of-2", "m-of-00002", "-of-", ""] {
            assert_eq!(without_number(name), name);
        }
        assert_eq!(suffix(0, 12), "-00001-of-00012.gguf");
    }
}
