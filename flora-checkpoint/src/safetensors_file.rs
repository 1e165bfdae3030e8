//! Reads safetensors files, shared by models, adapters and plain tensor files.
//!
//! The `safetensors` crate checks the header against the data; two checks are made before it runs, because it lacks them: that
//! no name repeats (it keeps the last), and that no offset reaches past the file (its sum of offsets can overflow).

use crate::error::FileError;
use crate::json::Json;
use crate::tensor::{Encoding, SharedBytes, StoredTensor, TensorEntry, TensorTable};
use safetensors::{SafeTensorError, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;
use thiserror::Error;

/// What is wrong with a safetensors file as a whole.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SafetensorsProblem {
    /// The file ends before the header does.
    #[error("it has {length} bytes, fewer than its header needs")]
    Truncated {
        /// The length of the file in bytes.
        length: usize,
    },
    /// The header is longer than any real one.
    #[error("its header claims {claimed} bytes; at most {limit} are accepted")]
    HeaderTooLarge {
        /// The claimed length in bytes.
        claimed: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// A tensor lies outside the file.
    #[error("tensor `{tensor}` reaches past the end of the file")]
    OutsideFile {
        /// The tensor's name.
        tensor: String,
    },
    /// The header is inconsistent.
    #[error("{0}")]
    Header(SafeTensorError),
}

/// The longest header that is accepted, in bytes; one of a model with 100,000 tensors has about 15 MB.
const HEADER_LIMIT: u64 = 50_000_000;

/// Maps a safetensors file, which must not be truncated while in use.
pub(crate) fn map(path: &Path) -> Result<TensorTable, FileError> {
    parse(path, SharedBytes::map(path)?)
}

/// The tensors of the safetensors file `bytes`.
pub(crate) fn parse(path: &Path, bytes: SharedBytes) -> Result<TensorTable, FileError> {
    parse_with(path, bytes, |_, _, _| None)
}

/// The same, with the integers of tensors that `has_integers` names as the floats that they equal, where all of a tensor's do.
pub(crate) fn parse_with_integers(
    path: &Path,
    bytes: SharedBytes,
    has_integers: impl Fn(&str) -> bool,
) -> Result<TensorTable, FileError> {
    parse_with(path, bytes, |name, dtype, bytes| has_integers(name).then(|| floats_of_integers(dtype, bytes)).flatten())
}

/// Every integer up to this one is an f32.
const EXACT_LIMIT: u64 = 1 << 24;

fn floats_of_integers(dtype: safetensors::Dtype, bytes: &[u8]) -> Option<Vec<u8>> {
    let float = |integer: i64| (integer.unsigned_abs() <= EXACT_LIMIT).then_some((integer as f32).to_le_bytes());
    let floats: Option<Vec<[u8; 4]>> = match dtype {
        safetensors::Dtype::I32 => {
            bytes.as_chunks().0.iter().map(|bytes| float(i32::from_le_bytes(*bytes).into())).collect()
        }
        safetensors::Dtype::I64 => bytes.as_chunks().0.iter().map(|bytes| float(i64::from_le_bytes(*bytes))).collect(),
        _ => None,
    };
    floats.map(|floats| floats.concat())
}

fn parse_with(
    path: &Path,
    bytes: SharedBytes,
    floats: impl Fn(&str, safetensors::Dtype, &[u8]) -> Option<Vec<u8>>,
) -> Result<TensorTable, FileError> {
    let fail = |problem| FileError::Safetensors { path: path.to_owned(), problem };
    let whole = bytes.as_slice();
    let truncated = || fail(SafetensorsProblem::Truncated { length: whole.len() });
    let claimed = u64::from_le_bytes(*whole.first_chunk::<8>().ok_or_else(truncated)?);
    if claimed > HEADER_LIMIT {
        return Err(fail(SafetensorsProblem::HeaderTooLarge { claimed, limit: HEADER_LIMIT }));
    }
    let data_start = 8 + claimed as usize;
    let header = Json::parse(path, whole.get(8..data_start).ok_or_else(truncated)?)?;
    if let Json::Object(members) = &header {
        for (name, info) in members.iter().filter(|(name, _)| name != "__metadata__") {
            let reaches = match info.get("data_offsets") {
                Some(Json::Array(offsets)) => offsets.iter().any(|offset| match offset {
                    Json::Number(number) => number.as_u64().is_none_or(|at| at > (whole.len() - data_start) as u64),
                    _ => true,
                }),
                _ => false,
            };
            if reaches {
                return Err(fail(SafetensorsProblem::OutsideFile { tensor: name.clone() }));
            }
        }
    }
    let (_, metadata) = SafeTensors::read_metadata(whole).map_err(|error| fail(SafetensorsProblem::Header(error)))?;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let outside = || fail(SafetensorsProblem::OutsideFile { tensor: name.clone() });
        let stored =
            |encoding, data| {
                let tensor = StoredTensor::new(info.shape.clone(), encoding, data)
                    .map_err(|problem| FileError::Tensor { path: path.to_owned(), tensor: name.clone(), problem });
                tensor.map(TensorEntry::Stored)
            };
        let data = bytes.slice(data_start + start, end.saturating_sub(start)).ok_or_else(outside)?;
        let entry = match (Encoding::from_safetensors(info.dtype), floats(&name, info.dtype, data.as_slice())) {
            (Some(encoding), _) => stored(encoding, data)?,
            (None, Some(floats)) => stored(Encoding::F32, SharedBytes::from(floats))?,
            (None, None) => {
                TensorEntry::Unsupported { element_type: format!("{:?}", info.dtype), shape: info.shape.clone() }
            }
        };
        entries.insert(name, entry);
    }
    Ok(TensorTable::new(path, entries))
}

/// What the header of a file that [`parse`] has read says beside its tensors.
pub(crate) fn notes(path: &Path, bytes: &SharedBytes) -> Result<BTreeMap<String, String>, FileError> {
    let (_, metadata) = SafeTensors::read_metadata(bytes.as_slice()).map_err(|error| FileError::Safetensors {
        path: path.to_owned(),
        problem: SafetensorsProblem::Header(error),
    })?;
    Ok(metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect())
}

/// The bytes of a safetensors file that holds `tensors`: name → (shape, row-major values), as F32.
pub(crate) fn to_bytes<'a>(
    tensors: impl IntoIterator<Item = (String, Vec<usize>, &'a [f32])>,
    notes: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<u8>, SafetensorsProblem> {
    let tensors = tensors.into_iter().map(|(name, shape, values)| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        (name, F32Tensor { shape, bytes })
    });
    // Loaders of Hugging Face look for this entry.
    let metadata = notes.into_iter().chain([("format".to_string(), "pt".to_string())]).collect();
    safetensors::serialize(tensors, Some(metadata)).map_err(SafetensorsProblem::Header)
}

struct F32Tensor {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl safetensors::View for F32Tensor {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.bytes).into()
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
