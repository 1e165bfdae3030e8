//! Reads GGUF, the format of llama.cpp, versions 2 and 3.
//!
//! Own code because the crates at hand size buffers by the lengths a file claims. Here nothing is copied but names: arrays and
//! tensors stay views into the file, so what is held never exceeds a small multiple of the file's length.

mod cursor;
mod metadata;
mod split;

pub use metadata::{MetadataArray, MetadataValue, ValueType};
pub use split::SplitProblem;
pub(crate) use split::without_number;

use crate::error::FileError;
use crate::tensor::{Encoding, SharedBytes, StoredTensor, TensorEntry, TensorTable};
use cursor::Cursor;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// What is wrong with a GGUF file.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum GgufProblem {
    /// The first four bytes are not `GGUF`.
    #[error("it does not start with `GGUF`")]
    Magic,
    /// A version with another layout.
    #[error("it has version {found}; versions 2 and 3 (little-endian) are read, convert it with a current llama.cpp")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// The file ends too early, or a length in it is wrong.
    #[error("it ends inside {what} at byte {offset}; download it again")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: usize,
    },
    /// A name or string is not UTF-8.
    #[error("{what} at byte {offset} is not UTF-8")]
    NotUtf8 {
        /// What was being read.
        what: &'static str,
        /// Where it starts.
        offset: usize,
    },
    /// A value type outside the format.
    #[error("the metadata value at byte {offset} has the unknown type {found}")]
    UnknownValueType {
        /// The type number.
        found: u32,
        /// Where it is.
        offset: usize,
    },
    /// Arrays of arrays.
    #[error("the metadata at byte {offset} nests arrays, which is not read")]
    NestedArray {
        /// Where the array is.
        offset: usize,
    },
    /// A metadata key or tensor name repeats.
    #[error("the name `{name}` is there twice")]
    Repeated {
        /// The name.
        name: String,
    },
    /// `general.alignment` is no positive multiple of 8.
    #[error("its alignment is {found}, not a positive multiple of 8")]
    Alignment {
        /// The alignment in bytes.
        found: u32,
    },
    /// More than four extents.
    #[error("tensor `{tensor}` has {found} extents; at most 4 are possible")]
    TooManyExtents {
        /// The tensor's name.
        tensor: String,
        /// The number of extents.
        found: u32,
    },
    /// A tensor's data is not where it may be.
    #[error("the data of tensor `{tensor}` {problem}")]
    Placement {
        /// The tensor's name.
        tensor: String,
        /// What is wrong with the place.
        problem: PlacementProblem,
    },
    /// What a file says of the files that a model is cut into.
    #[error(transparent)]
    Split(#[from] SplitProblem),
}

/// What is wrong with where a tensor's data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlacementProblem {
    /// The offset is no multiple of the alignment.
    #[error("is not aligned")]
    Unaligned,
    /// The data reaches past the file's end.
    #[error("reaches past the end of the file; download it again")]
    OutsideFile,
    /// Two tensors share bytes.
    #[error("overlaps another tensor's")]
    Overlap,
}

/// An opened GGUF file, or several that a model is cut into.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// Of the first file, which has all of the model's.
    metadata: BTreeMap<String, MetadataValue>,
    /// Of each file, at least one.
    shards: Vec<Arc<TensorTable>>,
}

impl Gguf {
    /// Maps and checks the file, which must not be truncated while in use. One of several that a model is cut into
    /// (`NAME-00001-of-00003.gguf`) opens them all.
    pub fn open(path: &Path) -> Result<Gguf, FileError> {
        let gguf = Self::parse(path, SharedBytes::map(path)?)?;
        match split::Split::of(&gguf.metadata).map_err(|problem| split::error(path, problem))? {
            None => Ok(gguf),
            Some(split) => split.open(path, gguf),
        }
    }

    /// Checks the GGUF file `bytes`, by itself; `path` is named in errors.
    pub fn parse(path: &Path, bytes: SharedBytes) -> Result<Gguf, FileError> {
        let fail = |problem| FileError::Gguf { path: path.to_owned(), problem };
        let mut cursor = Cursor::new(&bytes);
        let header = read_header(&mut cursor).map_err(fail)?;
        let metadata = read_metadata(&mut cursor, header.metadata_count).map_err(fail)?;
        let infos = read_tensor_infos(&mut cursor, header.tensor_count).map_err(fail)?;
        let alignment = alignment(&metadata).map_err(fail)?;
        let data_start = cursor.position().next_multiple_of(alignment);
        let entries = place(path, &bytes, data_start, alignment, infos)?;
        Ok(Gguf { metadata, shards: vec![Arc::new(TensorTable::new(path, entries))] })
    }

    /// The metadata by key.
    pub fn metadata(&self) -> &BTreeMap<String, MetadataValue> {
        &self.metadata
    }

    /// The tensors of the first file by GGUF name; of a model in one file these are all. Shapes are row-major (`[rows, columns]`):
    /// GGUF's own order reversed.
    pub fn tensors(&self) -> &TensorTable {
        &self.shards[0]
    }

    /// The tensors of every file. No two have a tensor of one name.
    pub fn shards(&self) -> &[Arc<TensorTable>] {
        &self.shards
    }

    /// The file, the first one of several.
    pub fn path(&self) -> PathBuf {
        self.tensors().path().to_owned()
    }
}

struct Header {
    tensor_count: u64,
    metadata_count: u64,
}

fn read_header(cursor: &mut Cursor<'_>) -> Result<Header, GgufProblem> {
    let magic = cursor.take(4, "the first four bytes").map_err(|_| GgufProblem::Magic)?;
    if magic != b"GGUF" {
        return Err(GgufProblem::Magic);
    }
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(GgufProblem::Version { found: version });
    }
    let tensor_count = cursor.u64("the number of tensors")?;
    let metadata_count = cursor.u64("the number of metadata entries")?;
    Ok(Header { tensor_count, metadata_count })
}

fn read_metadata(cursor: &mut Cursor<'_>, count: u64) -> Result<BTreeMap<String, MetadataValue>, GgufProblem> {
    let mut metadata = BTreeMap::new();
    // Every turn consumes bytes or fails, so a huge count ends at the end of the file.
    for _ in 0..count {
        let key = cursor.string("a metadata key")?;
        let value = MetadataValue::read(cursor)?;
        if metadata.insert(key.to_string(), value).is_some() {
            return Err(GgufProblem::Repeated { name: key.to_string() });
        }
    }
    Ok(metadata)
}

struct TensorInfo {
    name: String,
    shape: Vec<usize>,
    ggml_type: u32,
    offset: u64,
}

fn read_tensor_infos(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<TensorInfo>, GgufProblem> {
    let mut infos = Vec::new();
    for _ in 0..count {
        let name = cursor.string("a tensor name")?.to_string();
        let extents = cursor.u32("a tensor's number of extents")?;
        if extents > 4 {
            return Err(GgufProblem::TooManyExtents { tensor: name, found: extents });
        }
        let mut shape = Vec::new();
        for _ in 0..extents {
            let extent = cursor.u64("a tensor's extent")?;
            // An extent beyond the address space fails as too large when its bytes are counted.
            shape.push(usize::try_from(extent).unwrap_or(usize::MAX));
        }
        shape.reverse();
        let ggml_type = cursor.u32("a tensor's type")?;
        let offset = cursor.u64("a tensor's offset")?;
        infos.push(TensorInfo { name, shape, ggml_type, offset });
    }
    Ok(infos)
}

fn alignment(metadata: &BTreeMap<String, MetadataValue>) -> Result<usize, GgufProblem> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(MetadataValue::U32(found)) if *found > 0 && found.is_multiple_of(8) => Ok(*found as usize),
        Some(MetadataValue::U32(found)) => Err(GgufProblem::Alignment { found: *found }),
        Some(_) => Err(GgufProblem::Alignment { found: 0 }),
    }
}

fn place(
    path: &Path,
    bytes: &SharedBytes,
    data_start: usize,
    alignment: usize,
    mut infos: Vec<TensorInfo>,
) -> Result<BTreeMap<String, TensorEntry>, FileError> {
    let fail = |problem| FileError::Gguf { path: path.to_owned(), problem };
    infos.sort_by_key(|info| info.offset);
    let mut entries = BTreeMap::new();
    let mut free_from = 0;
    for TensorInfo { name, shape, ggml_type, offset } in infos {
        let misplaced = |problem| fail(GgufProblem::Placement { tensor: name.clone(), problem });
        if !offset.is_multiple_of(alignment as u64) {
            return Err(misplaced(PlacementProblem::Unaligned));
        }
        let offset = usize::try_from(offset).map_err(|_| misplaced(PlacementProblem::OutsideFile))?;
        if offset < free_from {
            return Err(misplaced(PlacementProblem::Overlap));
        }
        let start = data_start.checked_add(offset).ok_or_else(|| misplaced(PlacementProblem::OutsideFile))?;
        let bad = |problem| FileError::Tensor { path: path.to_owned(), tensor: name.clone(), problem };
        let (entry, length) = match Encoding::from_ggml(ggml_type) {
            None => (TensorEntry::Unsupported { element_type: ggml_name(ggml_type), shape }, 0),
            Some(encoding) => {
                let length = encoding.byte_count(&shape).map_err(bad)?;
                let data = bytes.slice(start, length).ok_or_else(|| misplaced(PlacementProblem::OutsideFile))?;
                (TensorEntry::Stored(StoredTensor::new(shape, encoding, data).map_err(bad)?), length)
            }
        };
        if start > bytes.as_slice().len() {
            return Err(misplaced(PlacementProblem::OutsideFile));
        }
        free_from = offset + length;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(fail(GgufProblem::Repeated { name }));
        }
    }
    Ok(entries)
}

/// ggml's name of a type that has no decoder here, as far as it is known.
fn ggml_name(id: u32) -> String {
    const NAMES: [(u32, &str); 14] = [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
    ];
    NAMES.iter().find(|(number, _)| *number == id).map_or(format!("ggml type {id}"), |(_, name)| name.to_string())
}
