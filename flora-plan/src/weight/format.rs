//! How base weights may be stored, in one table. Whoever decodes a weight, on a device or on the host, goes by a format's
//! [`Quantisation`] and knows no format's name.

use serde::{Deserialize, Serialize};

use crate::layer::{Element, LayerShape};

/// How a base weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(non_camel_case_types, reason = "the names that the formats are known by")]
pub enum WeightFormat {
    /// As floats.
    Float(Element),
    /// 8 bits and one scale for each output.
    Int8,
    /// GGUF's 8 bits and one scale for each 32 inputs of an output.
    Q8_0,
    /// GGUF's 4 bits and one scale for each 32 inputs.
    Q4_0,
    /// GGUF's 4 bits, one scale and one minimum for each 32 inputs.
    Q4_1,
    /// GGUF's 5 bits and one scale for each 32 inputs.
    Q5_0,
    /// GGUF's 5 bits, one scale and one minimum for each 32 inputs.
    Q5_1,
    /// GGUF's 2 bits, with 4-bit scales and minima for each 16 of 256 inputs.
    #[serde(rename = "q2_k")]
    Q2_K,
    /// GGUF's 3 bits, with 6-bit scales for each 16 of 256 inputs.
    #[serde(rename = "q3_k")]
    Q3_K,
    /// GGUF's 4 bits, with 6-bit scales and minima for each 32 of 256 inputs.
    #[serde(rename = "q4_k")]
    Q4_K,
    /// GGUF's 5 bits, with 6-bit scales and minima for each 32 of 256 inputs.
    #[serde(rename = "q5_k")]
    Q5_K,
    /// GGUF's 6 bits, with 8-bit scales for each 16 of 256 inputs.
    #[serde(rename = "q6_k")]
    Q6_K,
    /// GGUF's 16 uneven levels and one scale for each 32 inputs.
    #[serde(rename = "iq4_nl")]
    IQ4_NL,
    /// The same levels, with 6-bit scales for each 32 of 256 inputs.
    #[serde(rename = "iq4_xs")]
    IQ4_XS,
    /// 4-bit floats and a power of two for each 32 inputs.
    #[serde(rename = "mxfp4")]
    MXFP4,
}

/// How a quantised format decodes: value = scale · level(stored) + minimum, with `stored` an unsigned number.
///
/// 32 consecutive inputs of an output are `bits` words: first those of the lower plane of their bits, with the first input in the
/// lowest bits, then those of the upper one. A width that divides a word has a lower plane alone. The upper bits of every other
/// input of a lower word are as far apart as those inputs' lower bits, so that one shift brings them all beside these: they are
/// interleaved with those of the inputs between, then with those of the next lower word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantisation {
    /// Bits of a stored number: 2 to 6, or 8.
    pub bits: u32,
    /// What stored numbers stand for.
    pub levels: Levels,
    /// What levels are multiplied by, and what is added.
    pub scales: Scales,
}

/// What stored numbers stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// stored − zero
    Linear {
        /// What stands for 0.
        zero: u32,
    },
    /// One of 16, of 4 bits.
    Codebook([i8; 16]),
}

/// How the scales and minima of a weight are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scales {
    /// An f32 for each output.
    Outputs,
    /// 16 bits for each block of an output's inputs.
    Blocks {
        /// Inputs of a block.
        inputs: u32,
        /// What the 16 bits are.
        kind: ScaleKind,
        /// Whether every scale has a minimum beside it.
        minimum: bool,
    },
    /// Integers for each block, times an f16 for some blocks together.
    Nested(Nested),
}

/// What 16 bits of a scale are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// An f16.
    F16,
    /// A bf16, which is a power of two.
    PowerOfTwo,
}

/// Scales in two levels: that of a block is (stored − zero) · the super-block's, its minimum stored · the super-block's. Inputs, blocks
/// and bits are powers of two: a processor finds a block's field for every 16 inputs that it decodes, and divisions would take as long
/// as decoding them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Nested {
    /// Inputs of a block.
    pub inputs: u32,
    /// Blocks of a super-block.
    pub blocks: u32,
    /// Bits of a block's scale, and of its minimum.
    pub bits: u32,
    /// What stands for a scale of 0.
    pub zero: u32,
    /// Whether every scale has a minimum beside it.
    pub minimum: bool,
}

/// `value` / `power`, a power of two.
const fn over(value: u32, power: u32) -> u32 {
    value >> power.trailing_zeros()
}

impl Nested {
    /// Inputs of a super-block.
    pub const fn super_block(self) -> u32 {
        self.inputs * self.blocks
    }

    /// Bits of a block: its scale, and above it its minimum.
    pub const fn field(self) -> u32 {
        if self.minimum { 2 * self.bits } else { self.bits }
    }

    /// Blocks of a word.
    #[inline]
    pub const fn per_word(self) -> u32 {
        over(32, self.field())
    }

    /// Words of a super-block: its f16 scale with its f16 minimum above it, then the fields of its blocks.
    pub const fn words(self) -> u32 {
        1 + over(self.blocks, self.per_word())
    }

    /// The row of words that holds the super-block of `input`.
    pub const fn super_row(self, input: u32) -> u32 {
        over(input, self.super_block()) * self.words()
    }

    /// The row of words that holds the field of `input`'s block.
    pub const fn field_row(self, input: u32) -> u32 {
        self.super_row(input) + 1 + over(over(input & (self.super_block() - 1), self.inputs), self.per_word())
    }

    /// Where in its word that field begins.
    pub const fn field_shift(self, input: u32) -> u32 {
        (over(input, self.inputs) & (self.per_word() - 1)) * self.field()
    }
}

impl Quantisation {
    /// Bits of the two planes; 0 where there is no upper one.
    #[inline]
    pub const fn planes(self) -> (u32, u32) {
        match self.bits {
            3 => (2, 1),
            5 => (4, 1),
            6 => (4, 2),
            bits => (bits, 0),
        }
    }

    /// Numbers of a word of the lower plane.
    #[inline]
    pub const fn per_word(self) -> u32 {
        32 / self.planes().0
    }

    /// The row of words that holds the lower bits of `input`.
    #[inline]
    pub const fn row(self, input: u32) -> u32 {
        input / 32 * self.bits + input % 32 / self.per_word()
    }

    /// Bits from every other input of a word of the lower plane to the next.
    #[inline]
    pub const fn pair(self) -> u32 {
        2 * self.planes().0
    }

    /// Which of the interleaved runs of upper bits holds those of `input`: counted from its 32 inputs' first.
    #[inline]
    const fn upper_run(self, input: u32) -> u32 {
        input % 32 / self.per_word() * 2 + input % 2
    }

    /// The row of words that holds its upper bits, where there is an upper plane.
    #[inline]
    pub const fn upper_row(self, input: u32) -> u32 {
        let (lower, upper) = self.planes();
        input / 32 * self.bits + lower + self.upper_run(input) * upper / self.pair()
    }

    /// Where in its word the upper bits of `input` begin.
    #[inline]
    pub const fn upper_shift(self, input: u32) -> u32 {
        let (_, upper) = self.planes();
        input % self.per_word() / 2 * self.pair() + self.upper_run(input) * upper % self.pair()
    }

    /// Rows of words of a weight.
    pub const fn rows(self, d: u32) -> u32 {
        d / 32 * self.bits + (d % 32).div_ceil(self.per_word())
    }

    /// Inputs that share a scale; `None`: all of an output's.
    pub const fn block(self) -> Option<u32> {
        match self.scales {
            Scales::Outputs => None,
            Scales::Blocks { inputs, .. } | Scales::Nested(Nested { inputs, .. }) => Some(inputs),
        }
    }

    /// Inputs that are stored together, so that a weight has a multiple of them; `None`: any number.
    pub const fn unit(self) -> Option<u32> {
        match self.scales {
            Scales::Outputs => None,
            Scales::Blocks { inputs, .. } => Some(inputs),
            Scales::Nested(nested) => Some(nested.super_block()),
        }
    }

    /// Whether something is added to scaled levels.
    pub const fn minimum(self) -> bool {
        match self.scales {
            Scales::Outputs => false,
            Scales::Blocks { minimum, .. } | Scales::Nested(Nested { minimum, .. }) => minimum,
        }
    }

    /// Rows of words of the scales.
    pub const fn scale_rows(self, d: u32) -> u32 {
        match self.scales {
            Scales::Outputs => 1,
            Scales::Blocks { inputs, minimum: true, .. } => d / inputs,
            Scales::Blocks { inputs, minimum: false, .. } => d.div_ceil(2 * inputs),
            Scales::Nested(nested) => d / nested.super_block() * nested.words(),
        }
    }

    /// What a stored number stands for.
    pub fn level(self, stored: u32) -> f32 {
        match self.levels {
            Levels::Linear { zero } => stored as f32 - zero as f32,
            Levels::Codebook(levels) => f32::from(levels[stored as usize % levels.len()]),
        }
    }
}

/// Of IQ4_NL and IQ4_XS.
const NON_LINEAR: Levels = Levels::Codebook([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]);
/// Halves, of MXFP4.
const E2M1: Levels = Levels::Codebook([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]);

const fn linear(bits: u32, zero: u32, scales: Scales) -> Option<Quantisation> {
    Some(Quantisation { bits, levels: Levels::Linear { zero }, scales })
}

const fn codebook(levels: Levels, scales: Scales) -> Option<Quantisation> {
    Some(Quantisation { bits: 4, levels, scales })
}

const fn blocks(kind: ScaleKind, minimum: bool) -> Scales {
    Scales::Blocks { inputs: 32, kind, minimum }
}

const SCALE: Scales = blocks(ScaleKind::F16, false);
const SCALE_AND_MINIMUM: Scales = blocks(ScaleKind::F16, true);

/// 256 inputs in `blocks`.
const fn nested(blocks: u32, bits: u32, zero: u32, minimum: bool) -> Scales {
    Scales::Nested(Nested { inputs: 256 / blocks, blocks, bits, zero, minimum })
}

impl Default for WeightFormat {
    fn default() -> Self {
        WeightFormat::Float(Element::F32)
    }
}

impl WeightFormat {
    /// Every format, with its name in the command line, reports and errors.
    pub const ALL: [(&'static str, Self); 17] = [
        ("f32", WeightFormat::Float(Element::F32)),
        ("f16", WeightFormat::Float(Element::F16)),
        ("bf16", WeightFormat::Float(Element::Bf16)),
        ("int8", WeightFormat::Int8),
        ("q8_0", WeightFormat::Q8_0),
        ("q4_0", WeightFormat::Q4_0),
        ("q4_1", WeightFormat::Q4_1),
        ("q5_0", WeightFormat::Q5_0),
        ("q5_1", WeightFormat::Q5_1),
        ("q2_k", WeightFormat::Q2_K),
        ("q3_k", WeightFormat::Q3_K),
        ("q4_k", WeightFormat::Q4_K),
        ("q5_k", WeightFormat::Q5_K),
        ("q6_k", WeightFormat::Q6_K),
        ("iq4_nl", WeightFormat::IQ4_NL),
        ("iq4_xs", WeightFormat::IQ4_XS),
        ("mxfp4", WeightFormat::MXFP4),
    ];

    /// How it decodes; `None` for floats. Scales of blocks are as wide as in a file, or widened from 6 bits to 8.
    pub const fn quantisation(self) -> Option<Quantisation> {
        match self {
            WeightFormat::Float(_) => None,
            WeightFormat::Int8 => linear(8, 128, Scales::Outputs),
            WeightFormat::Q8_0 => linear(8, 128, SCALE),
            WeightFormat::Q4_0 => linear(4, 8, SCALE),
            WeightFormat::Q4_1 => linear(4, 0, SCALE_AND_MINIMUM),
            WeightFormat::Q5_0 => linear(5, 16, SCALE),
            WeightFormat::Q5_1 => linear(5, 0, SCALE_AND_MINIMUM),
            WeightFormat::Q2_K => linear(2, 0, nested(16, 4, 0, true)),
            WeightFormat::Q3_K => linear(3, 4, nested(16, 8, 128, false)),
            WeightFormat::Q4_K => linear(4, 0, nested(8, 8, 0, true)),
            WeightFormat::Q5_K => linear(5, 0, nested(8, 8, 0, true)),
            WeightFormat::Q6_K => linear(6, 32, nested(16, 8, 128, false)),
            WeightFormat::IQ4_NL => codebook(NON_LINEAR, SCALE),
            WeightFormat::IQ4_XS => codebook(NON_LINEAR, nested(8, 8, 128, false)),
            WeightFormat::MXFP4 => codebook(E2M1, blocks(ScaleKind::PowerOfTwo, false)),
        }
    }

    /// The name in the command line, reports and errors.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, format)| *format == self).map_or("", |(name, _)| name)
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, format)| *format)
    }

    /// Whether a weight of this shape can be stored so: blocks are whole.
    pub fn fits(self, shape: LayerShape) -> bool {
        self.quantisation().and_then(Quantisation::unit).is_none_or(|unit| shape.d.is_multiple_of(unit))
    }

    /// The least number of inputs that isn't below `d` and can be stored so.
    pub fn whole(self, d: u32) -> u32 {
        let unit = self.quantisation().and_then(Quantisation::unit).unwrap_or(1);
        d.checked_next_multiple_of(unit).unwrap_or(u32::MAX / unit * unit)
    }

    /// 32-bit words or floats that hold a weight.
    pub fn values(self, shape: LayerShape) -> u64 {
        let rows = self.quantisation().map_or(shape.d, |quantisation| quantisation.rows(shape.d));
        u64::from(rows) * u64::from(shape.k)
    }

    /// 32-bit words that hold its scales.
    pub fn scale_words(self, shape: LayerShape) -> u64 {
        let rows = self.quantisation().map_or(0, |quantisation| quantisation.scale_rows(shape.d));
        u64::from(rows) * u64::from(shape.k)
    }

    /// Bytes of a weight, scales included.
    pub fn bytes(self, shape: LayerShape) -> u64 {
        let value = match self {
            WeightFormat::Float(element) => element.bytes(),
            _ => 4,
        };
        value * self.values(shape) + 4 * self.scale_words(shape)
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
