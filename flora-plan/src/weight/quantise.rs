//! Floats to a weight's format. The scale of a block follows from its largest magnitude, or from its range, as in GGUF; of two
//! levels, the upper one from the largest of the lower. No better scale is searched for: weights that are worth it come from files.

use half::{bf16, f16};

use super::blocks::Block;
use super::error::WeightError;
use super::{PackedWeight, WeightValues, check_blocks, check_extents, check_size};
use crate::layer::{Element, LayerShape, Levels, Nested, Quantisation, ScaleKind, Scales, WeightFormat};

impl PackedWeight {
    /// Rounds or quantises values `[d, k]`, row-major. Where blocks have scales of their own, packing what was dequantised gives it
    /// back.
    ///
    /// # Errors
    /// No inputs or outputs, a wrong number of values, an incomplete block, a value that isn't finite or too large for the format.
    pub fn from_f32(format: WeightFormat, shape: LayerShape, values: &[f32]) -> Result<Self, WeightError> {
        check_extents(shape)?;
        check_size(format, shape, values.len() as u64, u64::from(shape.d) * u64::from(shape.k), "numbers")?;
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
            let packed = Self { shape, format, values: rounded(format, values), scales: Vec::new() };
            let overflow = packed.iter().position(|value| !value.is_finite());
            return match overflow {
                Some(position) => Err(too_large(position)),
                None => Ok(packed),
            };
        };
        check_blocks(format, shape)?;
        let mut packed = Self::empty(format, shape);
        let unit = quantisation.unit().unwrap_or(shape.d) as usize;
        for output in 0..k {
            for first in (0..shape.d as usize).step_by(unit) {
                let column: Vec<f32> = (first..first + unit).map(|input| values[input * k + output]).collect();
                let fitted = packed.fit(quantisation, first as u32, output, &column);
                if fitted.is_none() {
                    let largest = (0..unit).max_by(|left, right| column[*left].abs().total_cmp(&column[*right].abs()));
                    return Err(too_large((first + largest.unwrap_or(0)) * k + output));
                }
            }
        }
        Ok(packed)
    }

    /// Quantises what is stored together from input `first` on; `None` where its scales aren't finite.
    fn fit(&mut self, quantisation: Quantisation, first: u32, output: usize, values: &[f32]) -> Option<()> {
        let block = quantisation.block().map_or(values.len(), |block| block as usize);
        let fitted: Vec<_> = values.chunks(block).map(|values| quantisation.fit(values)).collect();
        let (mut scales, mut minima) = ([0; MOST_BLOCKS], [0; MOST_BLOCKS]);
        let (scale, minimum) = match quantisation.scales {
            Scales::Nested(nested) => {
                nested.fit(&fitted, ((1u32 << quantisation.bits) - 1) as f32, &mut scales, &mut minima)
            }
            _ => fitted.first().copied().unwrap_or_default(),
        };
        if !(scale.is_finite() && minimum.is_finite()) {
            return None;
        }
        let (scales, minima) = (&scales[..fitted.len()], &minima[..fitted.len()]);
        let scales = Block { scale, minimum, scales, minima, stored: &[] };
        self.set_block_scales(quantisation, first, output, scales)?;
        for (value, input) in values.iter().zip(first..) {
            let (scale, minimum) = self.scale(input as usize, output);
            let stored = quantisation.nearest(value - minimum, if scale == 0.0 { 0.0 } else { 1.0 / scale });
            self.set(quantisation, input, output, stored);
        }
        Some(())
    }
}

/// The most blocks of a super-block.
const MOST_BLOCKS: usize = 16;

fn rounded(format: WeightFormat, values: &[f32]) -> WeightValues {
    match format {
        WeightFormat::Float(Element::F16) => {
            WeightValues::F16(values.iter().map(|value| f16::from_f32(*value)).collect())
        }
        WeightFormat::Float(Element::Bf16) => {
            WeightValues::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect())
        }
        _ => WeightValues::F32(values.to_vec()),
    }
}

fn half(value: f32) -> f32 {
    f16::from_f32(value).to_f32()
}

impl Quantisation {
    /// The scale and minimum of a block, rounded as they are stored unless they are nested.
    fn fit(self, values: &[f32]) -> (f32, f32) {
        let (mut least, mut most, mut extreme) = (f32::INFINITY, f32::NEG_INFINITY, 0.0f32);
        for value in values.iter().copied() {
            (least, most) = (least.min(value), most.max(value));
            if value.abs() > extreme.abs() {
                extreme = value;
            }
        }
        let largest = ((1u32 << self.bits) - 1) as f32;
        // What the value of largest magnitude becomes: the level of largest magnitude, so that all numbers are of use.
        let symmetric = match self.levels {
            Levels::Linear { .. } if self.bits == 8 => extreme.abs() / 127.0,
            Levels::Linear { zero } => extreme / -(zero as f32),
            Levels::Codebook(levels) => {
                extreme / f32::from(levels.into_iter().max_by_key(|level| level.unsigned_abs()).unwrap_or(1))
            }
        };
        match self.scales {
            // A subnormal scale has too few bits for half a step, its inverse may be infinite, and devices take it for 0. The
            // column is 0 then: its largest value is below 2e-36.
            Scales::Outputs => (Some(symmetric).filter(|scale| scale.is_normal()).unwrap_or(0.0), 0.0),
            Scales::Blocks { minimum: true, .. } => (half((most - least) / largest), half(least)),
            Scales::Blocks { kind: ScaleKind::F16, .. } => (half(symmetric), 0.0),
            Scales::Blocks { kind: ScaleKind::PowerOfTwo, .. } => (self.within(power_above(symmetric.abs())), 0.0),
            // What is added to is never above 0, because a super-block's minima have one sign.
            Scales::Nested(Nested { minimum: true, .. }) => {
                let least = least.min(0.0);
                ((most.max(least) - least) / largest, least)
            }
            Scales::Nested(_) => (symmetric, 0.0),
        }
    }

    /// A scale, or infinity where it makes a level infinite.
    fn within(self, scale: f32) -> f32 {
        let finite = (0..1 << self.bits).all(|stored| (scale * self.level(stored)).is_finite());
        if finite { scale } else { f32::INFINITY }
    }

    /// The stored number whose level is the nearest to `value` · `inverse`.
    fn nearest(self, value: f32, inverse: f32) -> u32 {
        let level = value * inverse;
        match self.levels {
            Levels::Linear { zero } => {
                let stored = level.round() as i32 + zero as i32;
                (stored.max(0) as u32).min((1 << self.bits) - 1)
            }
            Levels::Codebook(levels) => {
                let distance = |stored: &u32| (f32::from(levels[*stored as usize]) - level).abs();
                (0..16).min_by(|left, right| distance(left).total_cmp(&distance(right))).unwrap_or(0)
            }
        }
    }
}

/// The least power of two that isn't below `value` and is a normal number; 0 of 0.
fn power_above(value: f32) -> f32 {
    match value {
        0.0 => 0.0,
        _ if value <= f32::MIN_POSITIVE => f32::MIN_POSITIVE,
        // The mantissa's bits carry into the exponent.
        _ => f32::from_bits((value.to_bits() + 0x007f_ffff) & 0xff80_0000),
    }
}

impl Nested {
    /// The super-block's scale and minimum, and the integers of its blocks: those that make no scale less than it has to be, so that
    /// no value lies beyond its block's numbers, but for the roundings to f16. `levels` are those of the largest number.
    fn fit(self, fitted: &[(f32, f32)], levels: f32, scales: &mut [i16], minima: &mut [u8]) -> (f32, f32) {
        let all = ((1u32 << self.bits) - 1) as f32;
        let largest = if self.zero == 0 { all } else { self.zero as f32 - 1.0 };
        let unit = |most: f32, largest: f32| half(most / largest);
        let integer =
            |value: f32, unit: f32, largest: f32| if unit == 0.0 { 0.0 } else { (value / unit).ceil().min(largest) };
        let minimum = unit(fitted.iter().fold(0.0, |most, (_, least)| most.max(-least)), all);
        for ((_, least), out) in fitted.iter().zip(&mut *minima) {
            *out = integer(-least, minimum, all) as u8;
        }
        // A minimum that became less has its block's numbers further apart.
        let magnitude = |at: usize| {
            let (scale, least) = fitted[at];
            scale.abs() + (least + minimum * f32::from(minima[at])).max(0.0) / levels
        };
        let scale = unit((0..fitted.len()).map(magnitude).fold(0.0, f32::max), largest);
        for (at, out) in scales.iter_mut().enumerate().take(fitted.len()) {
            let integer = integer(magnitude(at), scale, largest) as i16;
            *out = if fitted[at].0 < 0.0 { -integer } else { integer };
        }
        (scale, -minimum)
    }
}
