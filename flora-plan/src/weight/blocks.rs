//! Packs blocks of quantised numbers, as a file has them, one after the other. Bits are moved, none is changed; 6-bit scales get
//! eight bits of room.

use half::{bf16, f16};

use super::error::WeightError;
use super::{PackedWeight, WeightValues, check_blocks, check_extents};
use crate::layer::{LayerShape, Quantisation, ScaleKind, Scales, WeightFormat};

/// As many consecutive inputs of one output as the format stores together. Input i, of block b, is
/// scale · scales\[b\] · level(stored\[i\]) + minimum · minima\[b\].
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// A number that the format's scales can hold, such as an f16.
    pub scale: f32,
    /// An f16; 0 where the format has no minima.
    pub minimum: f32,
    /// The integers of a format with two levels of scales; those of others are not read.
    pub scales: &'a [i16],
    /// Likewise.
    pub minima: &'a [u8],
    /// The numbers.
    pub stored: &'a [u8],
}

/// A weight `[d, k]` whose blocks are being packed: those of the first output, along its inputs, then those of the next.
#[derive(Debug)]
pub struct BlockPacker {
    packed: PackedWeight,
    quantisation: Quantisation,
    /// Inputs of a block.
    unit: u32,
    blocks: u64,
    expected: u64,
}

impl BlockPacker {
    /// Takes memory for a weight that has so many blocks.
    ///
    /// # Errors
    /// A format without blocks, no inputs or outputs, an incomplete block, another number of blocks than the shape has.
    pub fn new(format: WeightFormat, shape: LayerShape, blocks: u64) -> Result<Self, WeightError> {
        let with_unit = format.quantisation().and_then(|quantisation| Some((quantisation, quantisation.unit()?)));
        let (quantisation, unit) = with_unit.ok_or(WeightError::NoBlocks(format))?;
        check_extents(shape)?;
        check_blocks(format, shape)?;
        let expected = u64::from(shape.d / unit) * u64::from(shape.k);
        // A wrong shape must not take memory.
        super::check_size(format, shape, blocks, expected, "blocks")?;
        Ok(Self { packed: PackedWeight::empty(format, shape), quantisation, unit, blocks: 0, expected })
    }

    /// Packs the next block.
    ///
    /// # Errors
    /// A scale or minimum that isn't finite, a block that the format doesn't have, or more blocks than were announced.
    pub fn push(&mut self, block: Block<'_>) -> Result<(), WeightError> {
        let PackedWeight { shape, format, .. } = self.packed;
        let per_output = u64::from(shape.d / self.unit);
        let (output, first) = (self.blocks / per_output, (self.blocks % per_output) as u32 * self.unit);
        let other = || WeightError::OtherBlock { format, input: first as usize, output: output as usize };
        let mask = (1u32 << self.quantisation.bits) - 1;
        let fits =
            block.stored.len() == self.unit as usize && block.stored.iter().all(|stored| u32::from(*stored) <= mask);
        if self.blocks == self.expected || !fits {
            return Err(other());
        }
        if let Some(value) = [block.scale, block.minimum].into_iter().find(|value| !value.is_finite()) {
            return Err(WeightError::NotFinite { value, input: first as usize, output: output as usize });
        }
        let output = output as usize;
        self.packed.set_block_scales(self.quantisation, first, output, block).ok_or_else(other)?;
        for (stored, first) in block.stored.chunks(32).zip((first..).step_by(32)) {
            self.packed.set_together(self.quantisation, first, output, stored);
        }
        self.blocks += 1;
        Ok(())
    }

    /// The weight.
    ///
    /// # Errors
    /// Fewer blocks than were announced.
    pub fn finish(self) -> Result<PackedWeight, WeightError> {
        super::check_size(self.packed.format, self.packed.shape, self.blocks, self.expected, "blocks")?;
        Ok(self.packed)
    }
}

impl PackedWeight {
    /// Of a quantised format. What was passed has been compared with the shape before: a wrong shape must not take memory.
    pub(super) fn empty(format: WeightFormat, shape: LayerShape) -> Self {
        let values = WeightValues::Words(vec![0; format.values(shape) as usize]);
        Self { shape, format, values, scales: vec![0; format.scale_words(shape) as usize] }
    }

    /// Sets a number that hasn't been set.
    pub(super) fn set(&mut self, quantisation: Quantisation, input: u32, output: usize, stored: u32) {
        let k = self.shape.k as usize;
        let WeightValues::Words(words) = &mut self.values else { return };
        let (lower, upper) = quantisation.planes();
        let low = stored & ((1 << lower) - 1);
        words[quantisation.row(input) as usize * k + output] |= low << (lower * (input % quantisation.per_word()));
        if upper > 0 {
            let word = &mut words[quantisation.upper_row(input) as usize * k + output];
            *word |= stored >> lower << quantisation.upper_shift(input);
        }
    }

    /// Sets 32 numbers from `first`, a multiple of 32, on: word after word, where one number after the other would change a word, far
    /// from those before it and after it, up to sixteen times.
    fn set_together(&mut self, quantisation: Quantisation, first: u32, output: usize, stored: &[u8]) {
        let (k, row) = (self.shape.k as usize, quantisation.row(first) as usize);
        let WeightValues::Words(all) = &mut self.values else { return };
        let (lower, upper) = quantisation.planes();
        let mut words = [0; 8];
        for (word, stored) in words.iter_mut().zip(stored.chunks(quantisation.per_word() as usize)) {
            if let ([one, two, three, four], 8) = (stored, lower) {
                *word = u32::from_le_bytes([*one, *two, *three, *four]);
                continue;
            }
            let low = |stored: &u8| u32::from(*stored) & ((1 << lower) - 1);
            *word = stored.iter().rev().fold(0, |word, stored| word << lower | low(stored));
        }
        if upper > 0 {
            for (input, stored) in (0..).zip(stored) {
                let word = &mut words[quantisation.upper_row(input) as usize % 8];
                *word |= u32::from(*stored) >> lower << quantisation.upper_shift(input);
            }
        }
        for (at, word) in words.into_iter().enumerate().take(quantisation.bits as usize) {
            all[(row + at) * k + output] = word;
        }
    }

    /// Sets the scales of the block that begins at `first`; `None` where they don't fit the format.
    pub(super) fn set_block_scales(
        &mut self,
        quantisation: Quantisation,
        first: u32,
        output: usize,
        block: Block<'_>,
    ) -> Option<()> {
        let k = self.shape.k as usize;
        let half = |value: f32| u32::from(f16::from_f32(value).to_bits());
        match quantisation.scales {
            Scales::Outputs => self.scales[output] = block.scale.to_bits(),
            Scales::Blocks { inputs, kind, minimum } => {
                let at = first / inputs;
                let scale = match kind {
                    ScaleKind::F16 => half(block.scale),
                    ScaleKind::PowerOfTwo => u32::from(bf16::from_f32(block.scale).to_bits()),
                };
                match minimum {
                    true => self.scales[at as usize * k + output] = scale | half(block.minimum) << 16,
                    false => self.scales[at as usize / 2 * k + output] |= scale << (16 * (at % 2)),
                }
            }
            Scales::Nested(nested) => {
                let blocks = nested.blocks as usize;
                if block.scales.len() != blocks || block.minima.len() != blocks {
                    return None;
                }
                self.scales[nested.super_row(first) as usize * k + output] =
                    half(block.scale) | half(block.minimum) << 16;
                for (at, (scale, minimum)) in (0..).zip(block.scales.iter().zip(block.minima)) {
                    let input = first + at * nested.inputs;
                    let scale = u32::try_from(i32::from(*scale) + nested.zero as i32).ok()?;
                    let minimum = if nested.minimum { u32::from(*minimum) } else { 0 };
                    if scale.max(minimum) >> nested.bits != 0 {
                        return None;
                    }
                    let field = scale | minimum << nested.bits;
                    self.scales[nested.field_row(input) as usize * k + output] |= field << nested.field_shift(input);
                }
            }
        }
        Some(())
    }
}
