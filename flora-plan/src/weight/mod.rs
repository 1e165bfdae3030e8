//! A base weight in the form that kernels and the host read: floats, or quantised words that lie so that neighbouring outputs are
//! neighbours in memory, as the tiles of a matrix product want them. GGUF's blocks lie along an output's inputs; packing them
//! moves bits and changes none.

mod error;

pub use error::WeightError;
use half::{bf16, f16};

use crate::layer::{Element, LayerShape, Quantisation, WeightFormat};

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
    /// `[d / per_word, k]`, rounded up: a word holds consecutive inputs of one output, the first in the lowest bits.
    Words(Vec<u32>),
}

impl PackedWeight {
    /// Rounds or quantises values `[d, k]`, row-major. Quantising takes the largest magnitude (or the range) of each block as GGUF
    /// does, so that packing what was dequantised gives it back.
    ///
    /// # Errors
    /// No inputs or outputs, a wrong number of values, an incomplete block, a value that isn't finite or too large for the format.
    pub fn from_f32(format: WeightFormat, shape: LayerShape, values: &[f32]) -> Result<Self, WeightError> {
        check_extents(shape)?;
        check_size(format, shape, values.len(), u64::from(shape.d) * u64::from(shape.k), "numbers")?;
        let k = shape.k as usize;
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            let value = values[position];
            return Err(WeightError::NotFinite { value, input: position / k, output: position % k });
        }
        let too_large = |position: usize| WeightError::TooLarge {
            format,
            value: values[position],
            input: position / k,
            output: position % k,
        };
        let Some(quantisation) = format.quantisation() else {
            let values = match format {
                WeightFormat::Float(Element::F16) => {
                    WeightValues::F16(values.iter().map(|value| f16::from_f32(*value)).collect())
                }
                WeightFormat::Float(Element::Bf16) => {
                    WeightValues::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect())
                }
                _ => WeightValues::F32(values.to_vec()),
            };
            let packed = Self { shape, format, values, scales: Vec::new() };
            let overflow = packed.iter().position(|value| !value.is_finite());
            return match overflow {
                Some(position) => Err(too_large(position)),
                None => Ok(packed),
            };
        };
        check_blocks(format, shape)?;
        let mut packed = Self::empty(format, shape);
        let block = quantisation.block.unwrap_or(shape.d) as usize;
        for output in 0..k {
            for first in (0..shape.d as usize).step_by(block) {
                let inputs = first..(first + block).min(shape.d as usize);
                let block_values = || inputs.clone().map(|input| values[input * k + output]);
                let (scale, minimum) = quantisation.scale_of(block_values());
                if !(scale.is_finite() && minimum.is_finite()) {
                    let magnitude = |input: &usize| values[input * k + output].abs();
                    let largest = inputs.clone().max_by(|left, right| magnitude(left).total_cmp(&magnitude(right)));
                    return Err(too_large(largest.unwrap_or(first) * k + output));
                }
                packed.set_scale(quantisation, first / block, output, scale, minimum);
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let largest = (1u32 << quantisation.bits) - 1;
                for (position, value) in block_values().enumerate() {
                    let stored = ((value - minimum) * inverse).round() as i32 + quantisation.zero as i32;
                    packed.set(quantisation, first + position, output, (stored.max(0) as u32).min(largest));
                }
            }
        }
        Ok(packed)
    }

    /// Packs GGUF blocks as the file has them: for each of k outputs, d / 32 blocks.
    ///
    /// # Errors
    /// A format without blocks, no inputs or outputs, a wrong number of bytes, an incomplete block, a scale that isn't finite.
    pub fn from_blocks(format: WeightFormat, shape: LayerShape, blocks: &[u8]) -> Result<Self, WeightError> {
        let Some(quantisation @ Quantisation { block: Some(block), .. }) = format.quantisation() else {
            return Err(WeightError::NoBlocks(format));
        };
        let header = if quantisation.minimum { 4 } else { 2 };
        let block_bytes = header + (block * quantisation.bits / 8) as usize;
        check_extents(shape)?;
        check_blocks(format, shape)?;
        let blocks_per_output = (shape.d / block) as usize;
        let expected = (u64::from(shape.k) * blocks_per_output as u64).saturating_mul(block_bytes as u64);
        check_size(format, shape, blocks.len(), expected, "bytes")?;
        let mut packed = Self::empty(format, shape);
        for (position, bytes) in blocks.chunks_exact(block_bytes).enumerate() {
            let (output, at) = (position / blocks_per_output, position % blocks_per_output);
            let half = |first: usize| f16::from_le_bytes([bytes[first], bytes[first + 1]]).to_f32();
            let (scale, minimum) = (half(0), if quantisation.minimum { half(2) } else { 0.0 });
            let input = at * block as usize;
            if let Some(value) = [scale, minimum].into_iter().find(|value| !value.is_finite()) {
                return Err(WeightError::NotFinite { value, input, output });
            }
            packed.set_scale(quantisation, at, output, scale, minimum);
            for position in 0..block as usize {
                let body = &bytes[header..];
                let stored = match quantisation.bits {
                    // The first half of a block lies in the low nibbles, the second in the high ones.
                    4 => body[position % 16] >> (4 * (position / 16)) & 15,
                    // Signed in the file.
                    _ => body[position].wrapping_add(128),
                };
                packed.set(quantisation, input + position, output, u32::from(stored));
            }
        }
        Ok(packed)
    }

    /// Of a quantised format. What was passed has been compared with the shape before: a wrong shape must not take memory.
    fn empty(format: WeightFormat, shape: LayerShape) -> Self {
        let values = WeightValues::Words(vec![0; format.values(shape) as usize]);
        Self { shape, format, values, scales: vec![0; format.scale_words(shape) as usize] }
    }

    fn set(&mut self, quantisation: Quantisation, input: usize, output: usize, stored: u32) {
        let (per_word, k) = (quantisation.per_word() as usize, self.shape.k as usize);
        if let WeightValues::Words(words) = &mut self.values {
            words[input / per_word * k + output] |= stored << (quantisation.bits as usize * (input % per_word));
        }
    }

    fn set_scale(&mut self, quantisation: Quantisation, block: usize, output: usize, scale: f32, minimum: f32) {
        let k = self.shape.k as usize;
        let half = |value: f32| u32::from(f16::from_f32(value).to_bits());
        match (quantisation.block, quantisation.minimum) {
            (None, _) => self.scales[output] = scale.to_bits(),
            (Some(_), true) => self.scales[block * k + output] = half(scale) | half(minimum) << 16,
            (Some(_), false) => self.scales[block / 2 * k + output] |= half(scale) << (16 * (block % 2)),
        }
    }

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

    /// The scales of a quantised weight. Of `Int8`: the bits of an f32 for each output. Of blocks without a minimum: for each pair
    /// of blocks and output two f16, the even block's in the low half. Of blocks with one: for each block and output the f16 scale
    /// in the low half, the f16 minimum in the high one.
    pub fn scales(&self) -> &[u32] {
        &self.scales
    }

    /// The scale and the minimum of an input of an output; (1, 0) for floats.
    pub fn scale(&self, input: usize, output: usize) -> (f32, f32) {
        let k = self.shape.k as usize;
        let half = |word: u32, high: bool| f16::from_bits((word >> (16 * u32::from(high))) as u16).to_f32();
        match self.format.quantisation() {
            None => (1.0, 0.0),
            Some(Quantisation { block: None, .. }) => (f32::from_bits(self.scales[output]), 0.0),
            Some(Quantisation { block: Some(block), minimum, .. }) => {
                let block = input / block as usize;
                if minimum {
                    let word = self.scales[block * k + output];
                    (half(word, false), half(word, true))
                } else {
                    (half(self.scales[block / 2 * k + output], block % 2 == 1), 0.0)
                }
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
            (WeightValues::Words(words), Some(quantisation)) => {
                let per_word = quantisation.per_word() as usize;
                let word = words[input / per_word * k + output];
                let mask = (1u32 << quantisation.bits) - 1;
                let stored = word >> (quantisation.bits as usize * (input % per_word)) & mask;
                let (scale, minimum) = self.scale(input, output);
                scale * (stored as f32 - quantisation.zero as f32) + minimum
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
    match format.quantisation().and_then(|quantisation| quantisation.block) {
        Some(block) if !format.fits(shape) => Err(WeightError::PartialBlock { format, block, d: shape.d }),
        _ => Ok(()),
    }
}

fn check_size(
    format: WeightFormat,
    shape: LayerShape,
    found: usize,
    expected: u64,
    unit: &'static str,
) -> Result<(), WeightError> {
    let (d, k, found) = (shape.d, shape.k, found as u64);
    if found == expected { Ok(()) } else { Err(WeightError::WrongSize { d, k, format, expected, found, unit }) }
}

impl Quantisation {
    /// The scale and minimum of a block, rounded as they are stored.
    fn scale_of(self, values: impl Iterator<Item = f32>) -> (f32, f32) {
        let (mut least, mut most, mut extreme) = (f32::INFINITY, f32::NEG_INFINITY, 0.0f32);
        for value in values {
            (least, most) = (least.min(value), most.max(value));
            if value.abs() > extreme.abs() {
                extreme = value;
            }
        }
        let stored = |value: f32| f16::from_f32(value).to_f32();
        match (self.block, self.minimum, self.bits) {
            // A subnormal scale has too few bits for half a step, its inverse may be infinite, and devices take it for 0. The
            // column is 0 then: its largest value is below 2e-36.
            (None, ..) => (Some(extreme.abs() / 127.0).filter(|scale| scale.is_normal()).unwrap_or(0.0), 0.0),
            (Some(_), true, _) => (stored((most - least) / 15.0), stored(least)),
            // The extreme value is −8 scales, so that all 16 numbers are of use.
            (Some(_), false, 4) => (stored(extreme / -8.0), 0.0),
            (Some(_), false, _) => (stored(extreme.abs() / 127.0), 0.0),
        }
    }
}

#[cfg(test)]
mod tests;
