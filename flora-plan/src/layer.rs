//! What a layer is made of, apart from its numbers: extents, element types, and what follows the products.

use flora_ir::ElementType;
pub use flora_ir::algebra::Epilogue;
use serde::{Deserialize, Serialize};

/// Extents of one base weight `[d, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerShape {
    /// Inputs.
    pub d: u32,
    /// Outputs.
    pub k: u32,
}

/// The type of the numbers in a buffer. Sums are f32 whatever the buffers hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Element {
    /// 32-bit float.
    #[default]
    F32,
    /// 16-bit IEEE float.
    F16,
    /// 16-bit float with f32's range.
    Bf16,
}

impl Element {
    /// Every element type.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The name in the command line, reports and errors.
    pub fn name(self) -> &'static str {
        match self {
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::Bf16 => "bf16",
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> u64 {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }

    /// The nearest number of this type.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Element::F32 => value,
            Element::F16 => half::f16::from_f32(value).to_f32(),
            Element::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// The element type that an equation names.
    pub fn of(written: ElementType) -> Self {
        match written {
            ElementType::F32 => Self::F32,
            ElementType::F16 => Self::F16,
            ElementType::BF16 => Self::Bf16,
        }
    }

    /// The relative error of rounding to this type: half a unit in the last place.
    pub fn rounding(self) -> f64 {
        match self {
            Element::F32 => f64::from(f32::EPSILON) / 2.0,
            Element::F16 => 2f64.powi(-11),
            Element::Bf16 => 2f64.powi(-8),
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// How a base weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
}

/// How a quantised format decodes: value = scale · (stored − zero) + minimum, with `stored` an unsigned number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantisation {
    /// Bits of a stored number: 8 or 4.
    pub bits: u32,
    /// What stands for 0.
    pub zero: u32,
    /// Inputs that share a scale; `None`: all of an output's.
    pub block: Option<u32>,
    /// Whether every scale has a minimum beside it.
    pub minimum: bool,
}

impl Quantisation {
    /// Stored numbers in a 32-bit word: consecutive inputs of one output, the first in the lowest bits.
    pub fn per_word(self) -> u32 {
        32 / self.bits
    }
}

impl Default for WeightFormat {
    fn default() -> Self {
        WeightFormat::Float(Element::F32)
    }
}

impl WeightFormat {
    /// Every format, with its name in the command line, reports and errors.
    pub const ALL: [(&'static str, Self); 7] = [
        ("f32", WeightFormat::Float(Element::F32)),
        ("f16", WeightFormat::Float(Element::F16)),
        ("bf16", WeightFormat::Float(Element::Bf16)),
        ("int8", WeightFormat::Int8),
        ("q8_0", WeightFormat::Q8_0),
        ("q4_0", WeightFormat::Q4_0),
        ("q4_1", WeightFormat::Q4_1),
    ];

    /// How it decodes; `None` for floats.
    pub fn quantisation(self) -> Option<Quantisation> {
        match self {
            WeightFormat::Float(_) => None,
            WeightFormat::Int8 => Some(Quantisation { bits: 8, zero: 128, block: None, minimum: false }),
            WeightFormat::Q8_0 => Some(Quantisation { bits: 8, zero: 128, block: Some(32), minimum: false }),
            WeightFormat::Q4_0 => Some(Quantisation { bits: 4, zero: 8, block: Some(32), minimum: false }),
            WeightFormat::Q4_1 => Some(Quantisation { bits: 4, zero: 0, block: Some(32), minimum: true }),
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
        self.quantisation()
            .and_then(|quantisation| quantisation.block)
            .is_none_or(|block| shape.d.is_multiple_of(block))
    }

    /// 32-bit words or floats that hold a weight.
    pub fn values(self, shape: LayerShape) -> u64 {
        let per_value = self.quantisation().map_or(1, Quantisation::per_word);
        u64::from(shape.d.div_ceil(per_value)) * u64::from(shape.k)
    }

    /// 32-bit words that hold its scales.
    pub fn scale_words(self, shape: LayerShape) -> u64 {
        let k = u64::from(shape.k);
        match self.quantisation() {
            None => 0,
            Some(Quantisation { block: None, .. }) => k,
            Some(Quantisation { block: Some(block), minimum: true, .. }) => u64::from(shape.d / block) * k,
            Some(Quantisation { block: Some(block), minimum: false, .. }) => u64::from(shape.d.div_ceil(2 * block)) * k,
        }
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

/// The types of a layer's operands on a device. The bias is f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerFormat {
    /// x, y and the residual; matrices are multiplied in this type.
    pub activations: Element,
    /// The adapters' vectors.
    pub adapters: Element,
    /// W0.
    pub weight: WeightFormat,
    /// Whether half types are multiplied in the device's fragments (tensor cores) where it has them.
    pub fragments: bool,
}

impl LayerFormat {
    /// Everything in one type.
    pub fn uniform(element: Element) -> Self {
        Self { activations: element, adapters: element, weight: WeightFormat::Float(element), fragments: true }
    }
}

impl Default for LayerFormat {
    fn default() -> Self {
        Self::uniform(Element::F32)
    }
}

impl std::fmt::Display for LayerFormat {
    /// `activations/adapters/weight`
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.activations, self.adapters, self.weight)
    }
}
