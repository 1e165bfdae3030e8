//! A base weight in the form that kernels and the host read: floats, or quantised words that lie so that neighbouring outputs are
//! neighbours in memory, as the tiles of a matrix product want them. GGUF's blocks lie along an output's inputs; packing them
//! moves bits and changes none.

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

/// Why a weight can't be packed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WeightError {
    /// Another number of values or bytes than the shape has.
    #[error("a weight [{d}, {k}] in {format} takes {expected} {unit}, and there are {found}")]
    WrongSize {
        /// Inputs.
        d: u32,
        /// Outputs.
        k: u32,
        /// The format.
        format: WeightFormat,
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
        /// "numbers" or "bytes".
        unit: &'static str,
    },
    /// A number of inputs that leaves a block incomplete.
    #[error("{format} keeps blocks of {block} inputs and the weight has {d}; keep it in f16, or in int8")]
    PartialBlock {
        /// The format.
        format: WeightFormat,
        /// Inputs of a block.
        block: u32,
        /// Inputs of the weight.
        d: u32,
    },
    /// No weight has such a value, and it would spread to every output.
    #[error("the weight holds {value} at input {input} of output {output}; the file is damaged")]
    NotFinite {
        /// The value.
        value: f32,
        /// Which input.
        input: usize,
        /// Which output.
        output: usize,
    },
    /// The format has no blocks to read.
    #[error("{0} is not a block format; it is packed from f32")]
    NoBlocks(WeightFormat),
}

impl PackedWeight {
    /// Rounds or quantises values `[d, k]`, row-major. Quantising takes the largest magnitude (or the range) of each block as GGUF
    /// does, so that packing what was dequantised gives it back.
    ///
    /// # Errors
    /// A wrong number of values, an incomplete block, a value that isn't finite or overflows f16.
    pub fn from_f32(format: WeightFormat, shape: LayerShape, values: &[f32]) -> Result<Self, WeightError> {
        check_size(format, shape, values.len(), u64::from(shape.d) * u64::from(shape.k), "numbers")?;
        let k = shape.k as usize;
        let not_finite =
            |position: usize, value: f32| WeightError::NotFinite { value, input: position / k, output: position % k };
        if let Some(position) = values.iter().position(|value| !value.is_finite()) {
            return Err(not_finite(position, values[position]));
        }
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
                Some(position) => Err(not_finite(position, values_at(&packed, position, k))),
                None => Ok(packed),
            };
        };
        let mut packed = Self::empty(format, shape, quantisation)?;
        let block = quantisation.block.unwrap_or(shape.d) as usize;
        for output in 0..k {
            for first in (0..shape.d as usize).step_by(block) {
                let own = || (first..(first + block).min(shape.d as usize)).map(|input| values[input * k + output]);
                let (scale, minimum) = quantisation.scale_of(own());
                if !(scale.is_finite() && minimum.is_finite()) {
                    return Err(not_finite(first * k + output, scale));
                }
                packed.set_scale(quantisation, first / block, output, scale, minimum);
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                let largest = (1u32 << quantisation.bits) - 1;
                for (position, value) in own().enumerate() {
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
    /// A format without blocks, a wrong number of bytes, an incomplete block, a scale that isn't finite.
    pub fn from_blocks(format: WeightFormat, shape: LayerShape, blocks: &[u8]) -> Result<Self, WeightError> {
        let Some(quantisation @ Quantisation { block: Some(block), .. }) = format.quantisation() else {
            return Err(WeightError::NoBlocks(format));
        };
        let header = if quantisation.minimum { 4 } else { 2 };
        let block_bytes = header + (block * quantisation.bits / 8) as usize;
        let mut packed = Self::empty(format, shape, quantisation)?;
        let blocks_per_output = (shape.d / block) as usize;
        let expected = u64::from(shape.k) * blocks_per_output as u64 * block_bytes as u64;
        check_size(format, shape, blocks.len(), expected, "bytes")?;
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

    fn empty(format: WeightFormat, shape: LayerShape, quantisation: Quantisation) -> Result<Self, WeightError> {
        if let (false, Some(block)) = (format.fits(shape), quantisation.block) {
            return Err(WeightError::PartialBlock { format, block, d: shape.d });
        }
        let values = WeightValues::Words(vec![0; format.values(shape) as usize]);
        Ok(Self { shape, format, values, scales: vec![0; format.scale_words(shape) as usize] })
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
            (None, ..) => (extreme.abs() / 127.0, 0.0),
            (Some(_), true, _) => (stored((most - least) / 15.0), stored(least)),
            // The extreme value is −8 scales, so that all 16 numbers are of use.
            (Some(_), false, 4) => (stored(extreme / -8.0), 0.0),
            (Some(_), false, _) => (stored(extreme.abs() / 127.0), 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUANTISED: [WeightFormat; 4] =
        [WeightFormat::Int8, WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4_1];

    proptest! {
        #[test]
        fn values_come_back_within_a_step(blocks in 1usize..4, k in 1usize..9, seed in any::<u32>()) {
            let shape = LayerShape { d: 32 * blocks as u32, k: k as u32 };
            let mut state = seed;
            let values: Vec<f32> = (0..shape.d as usize * k)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect();
            for format in QUANTISED {
                let packed = PackedWeight::from_f32(format, shape, &values).unwrap();
                for (position, value) in values.iter().enumerate() {
                    let (input, output) = (position / k, position % k);
                    let (scale, _) = packed.scale(input, output);
                    // Half a step; a whole one at the end that Q4_0's 16 numbers don't reach.
                    let error = (packed.value(input, output) - value).abs();
                    prop_assert!(error <= scale.abs() * 1.01, "{format}: {error} of {scale}");
                }
                let again = PackedWeight::from_f32(format, shape, &packed.to_f32()).unwrap();
                for (one, other) in again.to_f32().iter().zip(packed.to_f32()) {
                    prop_assert!((one - other).abs() <= 2e-3 * other.abs().max(1.0), "{format}: {one} and {other}");
                }
            }
        }
    }

    #[test]
    fn blocks_of_a_file_are_read_bit_by_bit() {
        let shape = LayerShape { d: 64, k: 2 };
        let mut q8 = Vec::new();
        let mut q4 = Vec::new();
        for block in 0..4u8 {
            let scale = f16::from_f32(f32::from(block) + 0.5);
            q8.extend(scale.to_le_bytes());
            q8.extend((0..32u8).map(|position| (position as i8 - 16) as u8));
            q4.extend(scale.to_le_bytes());
            q4.extend(f16::from_f32(-1.0).to_le_bytes());
            q4.extend((0..16u8).map(|position| position | (15 - position) << 4));
        }
        let q8 = PackedWeight::from_blocks(WeightFormat::Q8_0, shape, &q8).unwrap();
        let q4 = PackedWeight::from_blocks(WeightFormat::Q4_1, shape, &q4).unwrap();
        for output in 0..2 {
            for input in 0..64 {
                let scale = (output * 2 + input / 32) as f32 + 0.5;
                let position = input % 32;
                assert_eq!(q8.value(input, output), scale * (position as f32 - 16.0));
                let nibble = if position < 16 { position } else { 15 - (position - 16) };
                assert_eq!(q4.value(input, output), scale * nibble as f32 - 1.0);
            }
        }
    }

    #[test]
    fn what_cant_be_packed_is_refused() {
        let shape = LayerShape { d: 3, k: 2 };
        assert!(PackedWeight::from_f32(WeightFormat::Q4_0, shape, &[0.0; 6]).is_err());
        assert!(PackedWeight::from_f32(WeightFormat::Int8, shape, &[0.0; 5]).is_err());
        assert!(PackedWeight::from_f32(WeightFormat::Int8, shape, &[f32::NAN; 6]).is_err());
        assert!(PackedWeight::from_f32(WeightFormat::Float(Element::F16), shape, &[1e6; 6]).is_err());
        assert!(PackedWeight::from_blocks(WeightFormat::Int8, shape, &[0; 6]).is_err());
        assert!(PackedWeight::from_blocks(WeightFormat::Q8_0, LayerShape { d: 32, k: 1 }, &[0xff; 34]).is_err());
    }
}
