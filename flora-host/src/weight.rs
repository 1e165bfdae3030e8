//! A base weight as the processor reads it: cut into strips of columns once, when it is loaded. A strip is one run of memory from
//! the first input to the last, in the order in which its numbers are multiplied, so that a pass packs nothing.

use std::ops::Range;

use bytemuck::Pod;
use flora_plan::layer::{Element, LayerShape, Quantisation, WeightFormat};
use flora_plan::weight::{PackedWeight, WeightError, WeightValues};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

use crate::block_scales::{BlockScales, PIECE};
use crate::buffer::Buffer;
use crate::decode::{GROUP, Words};
use crate::fetch::Pieces;
use crate::layout::{STRIP, strips_len};
use crate::pairs::{pair, widen_pairs};
use crate::products::Pairs;
use crate::stored_bytes::{ByteColumns, GROUP_QUADS};
use crate::transpose::transpose;
use crate::widen::{widen, widen_f16};

/// W0 `[d, k]` in strips: as many numbers as it has, but for the last strip's padding.
#[derive(Debug)]
pub struct Weight {
    shape: LayerShape,
    format: WeightFormat,
    /// `[strips, d, STRIP]`; of bf16 pairs of inputs, `[strips, Pairs::padded(d), STRIP]`; of a quantised weight its words,
    /// `[strips, rows, STRIP]`.
    values: Buffer,
    /// `[strips, rows, STRIP]` with the rows of [`PackedWeight::scales`].
    scales: Buffer,
}

impl Weight {
    /// Copies a weight into strips. No bit of a number changes.
    pub fn new(weight: &PackedWeight) -> Self {
        let (shape, format) = (weight.shape(), weight.format());
        let k = shape.k as usize;
        let values = match weight.values() {
            WeightValues::F32(values) => cut(values, k),
            WeightValues::F16(values) => cut(values, k),
            WeightValues::Bf16(values) => cut(&in_pairs(values, k), k),
            WeightValues::Words(words) => cut(words, k),
        };
        Self { shape, format, values, scales: cut(weight.scales(), k) }
    }

    /// The weight whose strips these are.
    pub(crate) fn of_strips(shape: LayerShape, values: Buffer) -> Result<Self, WeightError> {
        let made = Self { shape, format: WeightFormat::default(), values, scales: Buffer::default() };
        let (d, k) = (shape.d as usize, shape.k as usize);
        let numbers: &[f32] = made.values.numbers();
        for (row, numbers) in numbers.chunks_exact(STRIP).enumerate() {
            let (first, input) = (row / d * STRIP, row % d);
            let columns = &numbers[..STRIP.min(k.saturating_sub(first))];
            if let Some((column, value)) = columns.iter().enumerate().find(|(_, value)| !value.is_finite()) {
                return Err(WeightError::NotFinite { value: *value, input, output: first + column });
            }
        }
        Ok(made)
    }

    /// Extents.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// How its numbers are kept.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// All of its numbers, `[d, k]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        let mut numbers = vec![0.0; d * k];
        Arch::new().dispatch(Unpacking { strips: self.strips(), k, numbers: &mut numbers });
        numbers
    }

    pub(crate) fn strips(&self) -> Strips<'_> {
        let numbers = match (self.format, self.format.quantisation()) {
            (_, Some(quantisation)) => {
                Numbers::Words { words: self.values.numbers(), scales: self.scales.numbers(), quantisation }
            }
            (WeightFormat::Float(Element::F16), None) => Numbers::F16(self.values.numbers()),
            (WeightFormat::Float(Element::Bf16), None) => Numbers::Bf16(self.values.numbers()),
            _ => Numbers::F32(self.values.numbers()),
        };
        let inputs = self.shape.d as usize;
        Strips { count: (self.shape.k as usize).div_ceil(STRIP), inputs, numbers, walk: Walk::Along }
    }
}

/// [`Weight::to_f32`].
struct Unpacking<'a> {
    strips: Strips<'a>,
    k: usize,
    /// `[d, k]`
    numbers: &'a mut [f32],
}

impl WithSimd for Unpacking<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { strips, k, numbers } = self;
        let mut decoded = Buffer::default();
        for at in 0..strips.count {
            let columns = at * STRIP..k.min((at + 1) * STRIP);
            // A multiple of what scales lie along.
            for (first, rows) in (0..strips.inputs).step_by(256).zip(numbers.chunks_mut(256 * k)) {
                let depth = first..strips.inputs.min(first + 256);
                let strip = strips.read(simd, at, depth, &mut decoded);
                for (row, strip) in rows.chunks_exact_mut(k).zip(strip.chunks_exact(STRIP)) {
                    row[columns.clone()].copy_from_slice(&strip[..columns.len()]);
                }
            }
        }
    }
}

/// A matrix `[rows, k]` in strips, the last one padded with zeros.
fn cut<T: Pod>(values: &[T], k: usize) -> Buffer {
    let Some(rows) = values.len().checked_div(k) else { return Buffer::default() };
    let mut buffer = Buffer::default();
    let strips = buffer.numbers_mut(strips_len(rows, k));
    for (at, strip) in strips.chunks_exact_mut((rows * STRIP).max(1)).enumerate() {
        let columns = at * STRIP..k.min((at + 1) * STRIP);
        for (out, row) in strip.chunks_exact_mut(STRIP).zip(values.chunks_exact(k)) {
            out[..columns.len()].copy_from_slice(&row[columns.clone()]);
        }
    }
    buffer
}

/// A matrix `[d, k]` as rows of pairs, and rows of zeros after them.
fn in_pairs(values: &[bf16], k: usize) -> Vec<u32> {
    let padded = Pairs::padded(values.len().checked_div(k).unwrap_or(0)) * k;
    let mut pairs = Vec::with_capacity(padded);
    for rows in values.chunks((2 * k).max(1)) {
        let (first, second) = rows.split_at(k);
        let second = second.iter().copied().chain(std::iter::repeat(bf16::ZERO));
        pairs.extend(first.iter().zip(second).map(|(first, second)| pair(*first, second)));
    }
    pairs.resize(padded, 0);
    pairs
}

/// Strips to read: those of W0, or of its transposed, whose inputs are W0's outputs.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// How many W0 has.
    count: usize,
    /// Of W0.
    inputs: usize,
    numbers: Numbers<'a>,
    walk: Walk,
}

/// The order in which strips are read.
#[derive(Clone, Copy)]
enum Walk {
    /// As they lie.
    Along,
    /// Across: a strip of the transposed is [`STRIP`] inputs of every strip of W0, turned while they are in cache.
    Across,
}

/// Their numbers, one strip after the other.
#[derive(Clone, Copy)]
enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    /// In pairs of inputs.
    Bf16(&'a [u32]),
    Words {
        words: &'a [u32],
        scales: &'a [u32],
        quantisation: Quantisation,
    },
}

impl<'a> Strips<'a> {
    /// Strips of floats with `k` columns, [`strips_len`] of them.
    pub(crate) fn floats(k: usize, values: &'a [f32]) -> Self {
        let count = k.div_ceil(STRIP);
        let inputs = values.len().checked_div(count * STRIP).unwrap_or(0);
        Self { count, inputs, numbers: Numbers::F32(values), walk: Walk::Along }
    }

    /// Those of the transposed weight, over the same memory.
    pub(crate) fn transposed(self) -> Self {
        let walk = match self.walk {
            Walk::Along => Walk::Across,
            Walk::Across => Walk::Along,
        };
        Self { walk, ..self }
    }

    /// Whether numbers have to be decoded or turned before they are multiplied.
    pub(crate) fn are_encoded(&self) -> bool {
        match (self.walk, self.numbers) {
            (Walk::Along, Numbers::F32(_)) => false,
            (Walk::Along | Walk::Across, _) => true,
        }
    }

    /// Strip `at` of floats that can be multiplied as they lie, `[inputs, STRIP]`; nothing of others.
    pub(crate) fn unencoded(&self, at: usize) -> &'a [f32] {
        match self.numbers {
            Numbers::F32(values) if !self.are_encoded() => self.strip(values, at),
            _ => &[],
        }
    }

    /// Whether they are pairs that can be multiplied as they lie.
    pub(crate) fn are_pairs(&self) -> bool {
        matches!((self.walk, self.numbers), (Walk::Along, Numbers::Bf16(_)))
    }

    /// The pairs of inputs `depth` of strip `at`, where they are: `[Pairs::padded(depth), STRIP]`. The first input is the first of a
    /// step, and the last one the last of a step or of all.
    pub(crate) fn pairs(&self, at: usize, depth: Range<usize>) -> &'a [u32] {
        match self.numbers {
            Numbers::Bf16(values) if self.are_pairs() => {
                &self.strip(values, at)[depth.start / 2 * STRIP..Pairs::padded(depth.end) * STRIP]
            }
            _ => &[],
        }
    }

    /// Strip `at` of a quantised weight as it lies.
    pub(crate) fn words(&self, at: usize) -> Option<Words<'a>> {
        match (self.walk, self.numbers) {
            (Walk::Along, Numbers::Words { words, scales, quantisation }) => {
                Some(Words { words: self.strip(words, at), scales: self.strip(scales, at), quantisation })
            }
            _ => None,
        }
    }

    /// How numbers are stored, where it is as quantised ones that can be multiplied as they lie.
    pub(crate) fn quantisation(&self) -> Option<Quantisation> {
        match (self.walk, self.numbers) {
            (Walk::Along, Numbers::Words { quantisation, .. }) => Some(quantisation),
            _ => None,
        }
    }

    /// Inputs `depth` of strip `at` of such a weight, from a multiple of 32 on, as bytes.
    pub(crate) fn bytes<'b, S: Simd>(
        &self,
        simd: S,
        at: usize,
        depth: Range<usize>,
        decoded: &'b mut Buffer,
    ) -> Option<ByteColumns<'b>>
    where
        'a: 'b,
    {
        let words = self.words(at)?;
        let quads = depth.len().div_ceil(GROUP) * GROUP_QUADS * STRIP;
        let scales = depth.len().div_ceil(PIECE) * BlockScales::FLOATS;
        let (quads, scales) = decoded.floats(quads + scales).split_at_mut(quads);
        Some(words.bytes(simd, depth, bytemuck::cast_slice_mut(quads), bytemuck::cast_slice_mut(scales)))
    }

    /// Inputs `depth` of strip `at`, `[depth, STRIP]`: where they lie, or decoded into `decoded`. Of an encoded weight the first
    /// input is a multiple of 32.
    pub(crate) fn read<'b, S: Simd>(
        &self,
        simd: S,
        at: usize,
        depth: Range<usize>,
        decoded: &'b mut Buffer,
    ) -> &'b [f32]
    where
        'a: 'b,
    {
        match self.walk {
            Walk::Along => {
                let len = if self.are_encoded() { depth.len() * STRIP } else { 0 };
                let (out, scales) = decoded.floats(len + BlockScales::FLOATS).split_at_mut(len);
                self.read_along(simd, at, depth, out, scales)
            }
            Walk::Across => {
                let (len, block) = (depth.len() * STRIP, STRIP * STRIP);
                let (out, rest) = decoded.floats(len + block + BlockScales::FLOATS).split_at_mut(len);
                let (block, scales) = rest.split_at_mut(block);
                self.read_across(simd, at, depth, out, (block, scales))
            }
        }
    }

    /// [`Self::read`] of W0 itself. `out` holds the numbers where they have to be decoded.
    fn read_along<'b, S: Simd>(
        &self,
        simd: S,
        at: usize,
        depth: Range<usize>,
        out: &'b mut [f32],
        scales: &mut [f32],
    ) -> &'b [f32]
    where
        'a: 'b,
    {
        let numbers = depth.start * STRIP..depth.end * STRIP;
        let in_pairs = depth.start / 2 * STRIP..Pairs::of(depth.end) * STRIP;
        match self.numbers {
            Numbers::F32(values) => &self.strip(values, at)[numbers],
            Numbers::F16(values) => widen(simd, &self.strip(values, at)[numbers], widen_f16, out),
            Numbers::Bf16(values) => widen_pairs(simd, &self.strip(values, at)[in_pairs], out),
            Numbers::Words { words, scales: all, quantisation } => {
                let strip = Words { words: self.strip(words, at), scales: self.strip(all, at), quantisation };
                let scales: &mut [BlockScales] = bytemuck::cast_slice_mut(scales);
                strip.decode(simd, depth, out, &mut scales[0])
            }
        }
    }

    /// [`Self::read`] of the transposed: block after block of W0, turned.
    fn read_across<'b, S: Simd>(
        &self,
        simd: S,
        at: usize,
        depth: Range<usize>,
        out: &'b mut [f32],
        (block, scales): (&mut [f32], &mut [f32]),
    ) -> &'b [f32] {
        let inputs = at * STRIP..self.inputs.min((at + 1) * STRIP);
        let strips = depth.start / STRIP..depth.end.div_ceil(STRIP);
        for (strip, out) in strips.zip(out.chunks_mut(STRIP * STRIP)) {
            let numbers = self.read_along(simd, strip, inputs.clone(), &mut block[..inputs.len() * STRIP], scales);
            transpose(simd, numbers, out);
        }
        out
    }

    /// The memory of inputs `depth` of strip `at`, but for scales.
    pub(crate) fn stored(&self, at: usize, depth: Range<usize>) -> Pieces<'a> {
        match self.numbers {
            Numbers::F32(values) => self.pieces(values, (at, depth), |input| input),
            Numbers::F16(values) => self.pieces(values, (at, depth), |input| input),
            Numbers::Bf16(values) => self.pieces(values, (at, depth), Pairs::of),
            Numbers::Words { words, quantisation, .. } => {
                self.pieces(words, (at, depth), |input| quantisation.rows(input as u32) as usize)
            }
        }
    }

    /// The same of numbers that have so many rows up to an input of W0.
    fn pieces<T: Pod>(
        &self,
        values: &'a [T],
        (at, depth): (usize, Range<usize>),
        rows: impl Fn(usize) -> usize,
    ) -> Pieces<'a> {
        let (inputs, strips) = match self.walk {
            Walk::Along => (depth, at..at + 1),
            Walk::Across => {
                let inputs = at * STRIP..self.inputs.min((at + 1) * STRIP);
                (inputs, depth.start / STRIP..depth.end.div_ceil(STRIP))
            }
        };
        let (pitch, numbers) = (values.len() / self.count, rows(inputs.start) * STRIP..rows(inputs.end) * STRIP);
        let all = &values[strips.start * pitch + numbers.start..(strips.end - 1) * pitch + numbers.end];
        Pieces::new(bytemuck::cast_slice(all), strips.len(), size_of::<T>() * numbers.len(), size_of::<T>() * pitch)
    }

    fn strip<'v, T>(&self, values: &'v [T], at: usize) -> &'v [T] {
        let len = values.len() / self.count;
        &values[at * len..(at + 1) * len]
    }
}
