//! A tensor as it lies in a file: shape, encoding and bytes. Quantised blocks stay as they are until someone asks for
//! numbers, so that a kernel may dequantise them itself.

pub mod blocks;
mod bytes;
mod dequantise;
mod encoding;
mod table;

pub use blocks::QuantisedBlock;
pub use bytes::SharedBytes;
pub use encoding::Encoding;
pub(crate) use table::nearest;
pub use table::{TensorEntry, TensorTable};

use thiserror::Error;

/// What is wrong with one tensor.
#[derive(Clone, Debug, PartialEq, Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// The file has no tensor of that name.
    #[error("is missing{}", near.as_ref().map(|near| format!("; the closest name in the file is `{near}`")).unwrap_or_default())]
    Missing {
        /// The most similar name that the file has.
        near: Option<String>,
    },
    /// An element type that has no decoder here.
    #[error("has the element type {found}, which can't be read; convert it to one of {}", Encoding::names())]
    UnsupportedType {
        /// The type's name in the file format.
        found: String,
    },
    /// The product of the extents, or of extents and element size, exceeds the address space.
    #[error("has the shape {shape:?}, whose size overflows")]
    TooLarge {
        /// The shape in the file.
        shape: Vec<usize>,
    },
    /// The innermost extent is not a whole number of blocks.
    #[error("has the shape {shape:?}, whose last extent is no multiple of the {block} elements of a {encoding} block")]
    PartialBlock {
        /// The shape in the file.
        shape: Vec<usize>,
        /// The encoding.
        encoding: Encoding,
        /// Elements per block.
        block: usize,
    },
    /// The bytes are not as many as shape and encoding need.
    #[error("needs {needed} bytes but has {found}")]
    WrongSize {
        /// Bytes that shape and encoding need.
        needed: usize,
        /// Bytes in the file.
        found: usize,
    },
    /// Another shape was expected.
    #[error("has the shape {found:?} where {expected} is needed")]
    WrongShape {
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that is needed, in words.
        expected: String,
    },
    /// A row beyond the end of a matrix.
    #[error("has {rows} rows, of which {row} is none")]
    NoSuchRow {
        /// The row that was asked for, counted from 0.
        row: usize,
        /// The rows there are.
        rows: usize,
    },
    /// A value is NaN or infinite.
    #[error(
        "holds {value} at element {index} (row-major); weights must be finite, so the file is damaged or its training diverged"
    )]
    NotFinite {
        /// The position in row-major order.
        index: usize,
        /// The value as text, so that two NaNs compare equal.
        value: String,
    },
}

/// A tensor in the order and encoding of its file, row-major, the last extent contiguous.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    shape: Vec<usize>,
    encoding: Encoding,
    bytes: SharedBytes,
}

impl StoredTensor {
    /// Checks that `bytes` are exactly those of a tensor of `shape` in `encoding`.
    pub fn new(shape: Vec<usize>, encoding: Encoding, bytes: SharedBytes) -> Result<Self, TensorProblem> {
        let needed = encoding.byte_count(&shape)?;
        if needed != bytes.as_slice().len() {
            return Err(TensorProblem::WrongSize { needed, found: bytes.as_slice().len() });
        }
        Ok(Self { shape, encoding, bytes })
    }

    /// The extents, outermost first: `[k, d]` for a linear layer's weight.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element type or block format.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// The undecoded bytes; for a quantised encoding its blocks, row after row.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_slice()
    }

    /// Lets the system have the memory that reading a mapped file's bytes took: to call when they have been copied into another form,
    /// so that there is one copy of them. They can still be read.
    pub fn release(&self) {
        self.bytes.release();
    }

    /// The number of elements.
    pub fn element_count(&self) -> usize {
        self.bytes().len() / self.encoding.block_bytes() * self.encoding.block_elements()
    }

    /// The values in row-major order, dequantised as ggml defines it.
    pub fn to_f32(&self) -> Vec<f32> {
        dequantise::to_f32(self.encoding, self.bytes())
    }

    /// [`to_f32`](Self::to_f32), refusing NaN and infinities.
    pub fn to_finite_f32(&self) -> Result<Vec<f32>, TensorProblem> {
        let values = self.to_f32();
        finite(&values, 0)?;
        Ok(values)
    }

    /// The rows `rows` of a matrix, dequantised, one after another; NaN and infinities in them are refused.
    pub fn rows_f32(&self, rows: &[usize]) -> Result<Vec<f32>, TensorProblem> {
        let (count, columns) = self.matrix_shape()?;
        let row_bytes = self.encoding.byte_count(&[columns])?;
        // Grown row by row: what a file says of the columns is only as large as a row that is there.
        let mut values = Vec::new();
        for &row in rows {
            let outside = || TensorProblem::NoSuchRow { row, rows: count };
            let start = row.checked_mul(row_bytes).filter(|_| row < count).ok_or_else(outside)?;
            let bytes = self.bytes().get(start..start + row_bytes).ok_or_else(outside)?;
            let first = values.len();
            values.extend(dequantise::to_f32(self.encoding, bytes));
            finite(&values[first..], row.saturating_mul(columns))?;
        }
        Ok(values)
    }

    /// The two extents of a matrix.
    pub fn matrix_shape(&self) -> Result<(usize, usize), TensorProblem> {
        match self.shape[..] {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(self.wrong_shape("a matrix".to_string())),
        }
    }

    /// The problem of having another shape than `expected`.
    pub(crate) fn wrong_shape(&self, expected: String) -> TensorProblem {
        TensorProblem::WrongShape { found: self.shape.clone(), expected }
    }

    /// The same tensor with row i (of the outermost extent) taken from row `source(i)`, still encoded: blocks never cross rows.
    ///
    /// `source` is reduced modulo the number of rows, so that no value of it can fail.
    pub(crate) fn with_rows_from(&self, source: impl Fn(usize) -> usize) -> StoredTensor {
        let rows = self.shape.first().copied().unwrap_or(0);
        if rows == 0 {
            return self.clone();
        }
        let row_bytes = self.bytes().len() / rows;
        let mut bytes = Vec::with_capacity(self.bytes().len());
        for row in 0..rows {
            let start = source(row) % rows * row_bytes;
            bytes.extend_from_slice(&self.bytes()[start..start + row_bytes]);
        }
        StoredTensor { shape: self.shape.clone(), encoding: self.encoding, bytes: SharedBytes::from(bytes) }
    }
}

/// Refuses NaN and infinities; `first` is the position in its tensor of the first of `values`.
fn finite(values: &[f32], first: usize) -> Result<(), TensorProblem> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(TensorProblem::NotFinite { index: first + index, value: values[index].to_string() }),
    }
}

/// `[rows, columns]` row-major → `[columns, rows]` row-major, in blocks that fit the first-level cache.
///
/// `values` holds rows·columns numbers; a longer or shorter slice leaves the rest of the result 0.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    const BLOCK: usize = 32;
    let mut transposed = vec![0.0; values.len()];
    for row_block in (0..rows).step_by(BLOCK) {
        for column_block in (0..columns).step_by(BLOCK) {
            for row in row_block..(row_block + BLOCK).min(rows) {
                for column in column_block..(column_block + BLOCK).min(columns) {
                    if let (Some(to), Some(from)) =
                        (transposed.get_mut(column * rows + row), values.get(row * columns + column))
                    {
                        *to = *from;
                    }
                }
            }
        }
    }
    transposed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn transposing_moves_every_element(rows in 1usize..80, columns in 1usize..80) {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let transposed = transpose(&values, rows, columns);
            for row in 0..rows {
                for column in 0..columns {
                    prop_assert_eq!(transposed[column * rows + row], values[row * columns + column]);
                }
            }
        }
    }

    #[test]
    fn a_size_that_overflows_is_an_error() {
        let shape = vec![usize::MAX, 3];
        let made = StoredTensor::new(shape.clone(), Encoding::F32, SharedBytes::from(Vec::new()));
        assert_eq!(made.err(), Some(TensorProblem::TooLarge { shape }));
    }

    #[test]
    fn rows_of_a_matrix_without_rows_are_not_there() {
        let made = StoredTensor::new(vec![0, 1 << 48], Encoding::F32, SharedBytes::from(Vec::new()));
        let rows = made.expect("no bytes").rows_f32(&[0, 1]);
        assert_eq!(rows.err(), Some(TensorProblem::NoSuchRow { row: 0, rows: 0 }));
    }

    #[test]
    fn a_partial_block_is_an_error() {
        let made = StoredTensor::new(vec![2, 48], Encoding::Q8_0, SharedBytes::from(vec![0; 102]));
        assert!(matches!(made, Err(TensorProblem::PartialBlock { block: 32, .. })));
    }

    #[test]
    fn nan_is_reported_with_its_position() {
        let bytes: Vec<u8> = [1.0f32, f32::NAN, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
        let tensor = StoredTensor::new(vec![3], Encoding::F32, SharedBytes::from(bytes)).expect("12 bytes");
        assert_eq!(tensor.to_finite_f32().err(), Some(TensorProblem::NotFinite { index: 1, value: "NaN".to_string() }));
    }
}
