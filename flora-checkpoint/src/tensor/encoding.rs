//! The element types and block formats that can be decoded, in one table.

use super::TensorProblem;
use std::fmt;

/// How the elements of a tensor are stored.
///
/// The quantised formats are ggml's: a run of elements of one row shares a scale, and in some formats a minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the names that the formats are known by")]
#[non_exhaustive]
pub enum Encoding {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    BF16,
    /// 4 bits, a scale per 32 elements.
    Q4_0,
    /// 4 bits, a scale and a minimum per 32 elements.
    Q4_1,
    /// 5 bits, a scale per 32 elements.
    Q5_0,
    /// 5 bits, a scale and a minimum per 32 elements.
    Q5_1,
    /// 8 bits, a scale per 32 elements.
    Q8_0,
    /// 2 bits, 256 elements in sixteen groups with 4-bit scales and minima.
    Q2_K,
    /// 3 bits, 256 elements in sixteen groups with 6-bit scales.
    Q3_K,
    /// 4 bits, 256 elements in eight groups with 6-bit scales and minima.
    Q4_K,
    /// 5 bits, 256 elements in eight groups with 6-bit scales and minima.
    Q5_K,
    /// 6 bits, 256 elements in sixteen groups with 8-bit scales.
    Q6_K,
    /// 16 levels that aren't evenly spaced, a scale per 32 elements.
    IQ4_NL,
    /// The same levels, 256 elements in eight groups with 6-bit scales.
    IQ4_XS,
    /// 4-bit floats (E2M1), a power of two per 32 elements.
    MXFP4,
}

struct Row {
    encoding: Encoding,
    name: &'static str,
    ggml_id: u32,
    block_elements: usize,
    groups: usize,
    block_bytes: usize,
}

const fn row(
    encoding: Encoding,
    name: &'static str,
    ggml_id: u32,
    (block_elements, groups): (usize, usize),
    block_bytes: usize,
) -> Row {
    Row { encoding, name, ggml_id, block_elements, groups, block_bytes }
}

/// In the order of the enum, which [`Encoding::row`] relies on (a test checks it).
const TABLE: [Row; 16] = [
    row(Encoding::F32, "F32", 0, (1, 1), 4),
    row(Encoding::F16, "F16", 1, (1, 1), 2),
    row(Encoding::BF16, "BF16", 30, (1, 1), 2),
    row(Encoding::Q4_0, "Q4_0", 2, (32, 1), 18),
    row(Encoding::Q4_1, "Q4_1", 3, (32, 1), 20),
    row(Encoding::Q5_0, "Q5_0", 6, (32, 1), 22),
    row(Encoding::Q5_1, "Q5_1", 7, (32, 1), 24),
    row(Encoding::Q8_0, "Q8_0", 8, (32, 1), 34),
    row(Encoding::Q2_K, "Q2_K", 10, (256, 16), 84),
    row(Encoding::Q3_K, "Q3_K", 11, (256, 16), 110),
    row(Encoding::Q4_K, "Q4_K", 12, (256, 8), 144),
    row(Encoding::Q5_K, "Q5_K", 13, (256, 8), 176),
    row(Encoding::Q6_K, "Q6_K", 14, (256, 16), 210),
    row(Encoding::IQ4_NL, "IQ4_NL", 20, (32, 1), 18),
    row(Encoding::IQ4_XS, "IQ4_XS", 23, (256, 8), 136),
    row(Encoding::MXFP4, "MXFP4", 39, (32, 1), 17),
];

impl Encoding {
    /// Every encoding.
    pub fn all() -> impl Iterator<Item = Encoding> {
        TABLE.iter().map(|row| row.encoding)
    }

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// The name, as in file formats.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The elements of a block; 1 for the plain types.
    pub fn block_elements(self) -> usize {
        self.row().block_elements
    }

    /// The groups of a block, each with a scale of its own.
    pub(crate) fn groups(self) -> usize {
        self.row().groups
    }

    /// The bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().block_bytes
    }

    /// Whether elements share scales.
    pub fn is_quantised(self) -> bool {
        self.block_elements() > 1
    }

    /// The encoding that GGUF numbers `id`.
    pub(crate) fn from_ggml(id: u32) -> Option<Encoding> {
        TABLE.iter().find(|row| row.ggml_id == id).map(|row| row.encoding)
    }

    /// The number that GGUF gives the encoding.
    pub fn ggml_id(self) -> u32 {
        self.row().ggml_id
    }

    /// The encoding of a safetensors type.
    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Encoding> {
        match dtype {
            safetensors::Dtype::F32 => Some(Encoding::F32),
            safetensors::Dtype::F16 => Some(Encoding::F16),
            safetensors::Dtype::BF16 => Some(Encoding::BF16),
            _ => None,
        }
    }

    /// The bytes of a tensor of `shape`.
    pub(crate) fn byte_count(self, shape: &[usize]) -> Result<usize, TensorProblem> {
        let block = self.block_elements();
        if self.is_quantised() && !shape.last().is_some_and(|extent| extent.is_multiple_of(block)) {
            return Err(TensorProblem::PartialBlock { shape: shape.to_vec(), encoding: self, block });
        }
        shape
            .iter()
            .try_fold(1usize, |product, extent| product.checked_mul(*extent))
            .and_then(|elements| (elements / block).checked_mul(self.block_bytes()))
            .ok_or_else(|| TensorProblem::TooLarge { shape: shape.to_vec() })
    }

    /// All names, for messages.
    pub(crate) fn names() -> String {
        TABLE.iter().map(|row| row.name).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (position, row) in TABLE.iter().enumerate() {
            assert_eq!(row.encoding as usize, position);
            assert_eq!(format!("{:?}", row.encoding), row.name);
        }
    }
}
