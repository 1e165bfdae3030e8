//! What a layer is made of, apart from its numbers: extents, element types, and what follows the products.

pub use crate::weight::format::{Levels, Nested, Quantisation, ScaleKind, Scales, WeightFormat};
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

impl LayerShape {
    /// Of the transposed weight.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self { d: self.k, k: self.d }
    }
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
