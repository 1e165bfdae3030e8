//! A base weight in the form that kernels and the host read: floats, or quantised words that lie so that neighbouring outputs are
//! neighbours in memory, as the tiles of a matrix product want them. GGUF's blocks lie along an output's inputs; packing them
//! moves bits and changes none.

mod blocks;
mod error;
pub(crate) mod format;
mod quantise;

pub use blocks::{Block, BlockPacker};
pub use error::WeightError;
use half::{bf16, f16};

use crate::layer::{LayerShape, ScaleKind, Scales, WeightFormat};

/// W0 `[d, k]`.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedWeight {
    shape: LayerShape,
    format: WeightFormat,
    values: WeightValues,
    scales: Vec<u32>,
}

/// The numbers of a weight.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightValues {
    /// `[d, k]`
    F32(Vec<f32>),
    /// `[d, k]`
    F16(Vec<f16>),
    /// `[d, k]`
    Bf16(Vec<bf16>),
    /// `[rows, k]`: a word holds consecutive inputs of one output, or some of their bits; see
    /// [`Quantisation`](crate::layer::Quantisation).
    Words(Vec<u32>),
}

impl PackedWeight {
    /// Extents.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// The format.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The numbers.
    pub fn values(&self) -> &WeightValues {
        &self.values
    }

    /// The scales of a quantised weight, `[scale_rows, k]`, as its [`Scales`] have them. Of outputs: the bits of an f32. Of blocks
    /// without a minimum: for each pair of blocks two scales, the even block's in the low half. Of blocks with one: for each block
    /// the f16 scale in the low half, the f16 minimum in the high one. Nested ones: see
    /// [`Nested`](crate::layer::Nested).
    pub fn scales(&self) -> &[u32] {
        &self.scales
    }

    /// The scale and the minimum of an input of an output; (1, 0) for floats.
    pub fn scale(&self, input: usize, output: usize) -> (f32, f32) {
        let Some(quantisation) = self.format.quantisation() else { return (1.0, 0.0) };
        let word = |row: u32| self.scales[row as usize * self.shape.k as usize + output];
        let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
        let input = input as u32;
        match quantisation.scales {
            Scales::Outputs => (f32::from_bits(word(0)), 0.0),
            Scales::Blocks { inputs, minimum: true, .. } => {
                let word = word(input / inputs);
                (half(word), half(word >> 16))
            }
            Scales::Blocks { inputs, kind, minimum: false } => {
                let block = input / inputs;
                let bits = word(block / 2) >> (16 * (block % 2));
                let scale = match kind {
                    ScaleKind::F16 => half(bits),
                    ScaleKind::PowerOfTwo => bf16::from_bits(bits as u16).to_f32(),
                };
                (scale, 0.0)
            }
            Scales::Nested(nested) => {
                let of_all = word(nested.super_row(input));
                let field = word(nested.field_row(input)) >> nested.field_shift(input);
                let number = |first: u32| (field >> first & ((1 << nested.bits) - 1)) as f32;
                let minimum = if nested.minimum { half(of_all >> 16) * number(nested.bits) } else { 0.0 };
                (half(of_all) * (number(0) - nested.zero as f32), minimum)
            }
        }
    }

    /// The stored number of an input of an output; 0 for floats.
    fn stored(&self, input: usize, output: usize) -> u32 {
        let (WeightValues::Words(words), Some(quantisation)) = (&self.values, self.format.quantisation()) else {
            return 0;
        };
        let (input, (lower, upper)) = (input as u32, quantisation.planes());
        let word = |row: u32| words[row as usize * self.shape.k as usize + output];
        let low = word(quantisation.row(input)) >> (lower * (input % quantisation.per_word())) & ((1 << lower) - 1);
        match upper {
            0 => low,
            _ => {
                low | (word(quantisation.upper_row(input)) >> quantisation.upper_shift(input) & ((1 << upper) - 1))
                    << lower
            }
        }
    }

    /// The value of one weight, as kernels decode it, in f32 arithmetic.
    ///
    /// # Panics
    /// Beyond the shape.
    pub fn value(&self, input: usize, output: usize) -> f32 {
        let k = self.shape.k as usize;
        match (&self.values, self.format.quantisation()) {
            (WeightValues::F32(values), _) => values[input * k + output],
            (WeightValues::F16(values), _) => values[input * k + output].to_f32(),
            (WeightValues::Bf16(values), _) => values[input * k + output].to_f32(),
            (WeightValues::Words(_), Some(quantisation)) => {
                let (scale, minimum) = self.scale(input, output);
                scale * quantisation.level(self.stored(input, output)) + minimum
            }
            (WeightValues::Words(_), None) => f32::NAN,
        }
    }

    fn iter(&self) -> impl Iterator<Item = f32> + '_ {
        let k = self.shape.k as usize;
        (0..self.shape.d as usize * k).map(move |position| values_at(self, position, k))
    }

    /// All values, `[d, k]`: what oracles compare with. Kernels never make it.
    pub fn to_f32(&self) -> Vec<f32> {
        self.iter().collect()
    }
}

fn values_at(weight: &PackedWeight, position: usize, k: usize) -> f32 {
    weight.value(position / k, position % k)
}

fn check_extents(LayerShape { d, k }: LayerShape) -> Result<(), WeightError> {
    if d > 0 && k > 0 { Ok(()) } else { Err(WeightError::NoExtent { d, k }) }
}

fn check_blocks(format: WeightFormat, shape: LayerShape) -> Result<(), WeightError> {
    match format.quantisation().and_then(|quantisation| quantisation.unit()) {
        Some(block) if !format.fits(shape) => Err(WeightError::PartialBlock { format, block, d: shape.d }),
        _ => Ok(()),
    }
}

fn check_size(
    format: WeightFormat,
    shape: LayerShape,
    found: u64,
    expected: u64,
    unit: &'static str,
) -> Result<(), WeightError> {
    let LayerShape { d, k } = shape;
    if found == expected { Ok(()) } else { Err(WeightError::WrongSize { d, k, format, expected, found, unit }) }
}

#[cfg(test)]
mod tests;
