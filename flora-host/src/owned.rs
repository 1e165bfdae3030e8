//! Numbers of any element type that the host owns.

use flora_plan::layer::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::values::{Values, ValuesMut};

/// Numbers of any element type, owned.
#[derive(Clone, Debug)]
pub enum OwnedValues {
    /// 32-bit floats.
    F32(Vec<f32>),
    /// 16-bit IEEE floats.
    F16(Vec<f16>),
    /// 16-bit floats with f32's range.
    Bf16(Vec<bf16>),
}

impl OwnedValues {
    /// So many zeros.
    pub fn zeros(count: usize, element: Element) -> Self {
        match element {
            Element::F32 => Self::F32(vec![0.0; count]),
            Element::F16 => Self::F16(vec![f16::ZERO; count]),
            Element::Bf16 => Self::Bf16(vec![bf16::ZERO; count]),
        }
    }

    /// These numbers, rounded.
    pub fn rounded(values: &[f32], element: Element) -> Self {
        let mut stored = Self::zeros(values.len(), element);
        match &mut stored {
            Self::F32(stored) => stored.copy_from_slice(values),
            Self::F16(stored) => stored.convert_from_f32_slice(values),
            Self::Bf16(stored) => stored.convert_from_f32_slice(values),
        }
        stored
    }

    /// To read.
    pub fn values(&self) -> Values<'_> {
        match self {
            Self::F32(values) => Values::F32(values),
            Self::F16(values) => Values::F16(values),
            Self::Bf16(values) => Values::Bf16(values),
        }
    }

    /// To write.
    pub fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Self::F32(values) => ValuesMut::F32(values),
            Self::F16(values) => ValuesMut::F16(values),
            Self::Bf16(values) => ValuesMut::Bf16(values),
        }
    }

    /// The first `count`, and zeros where there are fewer.
    pub(crate) fn resized(mut self, count: usize) -> Self {
        match &mut self {
            Self::F32(values) => resize(values, count, 0.0),
            Self::F16(values) => resize(values, count, f16::ZERO),
            Self::Bf16(values) => resize(values, count, bf16::ZERO),
        }
        self
    }

    /// Writes numbers over those from `first` on; `false`, and nothing is written, where they are of another type or too many.
    pub(crate) fn overwrite(&mut self, first: usize, values: &[f32]) -> bool {
        let Some(range) = first.checked_add(values.len()).map(|end| first..end) else { return false };
        match self {
            Self::F32(stored) => stored.get_mut(range).map(|place| place.copy_from_slice(values)).is_some(),
            Self::F16(stored) => stored.get_mut(range).map(|place| place.convert_from_f32_slice(values)).is_some(),
            Self::Bf16(stored) => stored.get_mut(range).map(|place| place.convert_from_f32_slice(values)).is_some(),
        }
    }
}

/// Memory that isn't needed any more is given back.
fn resize<T: Copy>(values: &mut Vec<T>, count: usize, zero: T) {
    values.reserve_exact(count.saturating_sub(values.len()));
    values.resize(count, zero);
    values.shrink_to_fit();
}

impl Values<'_> {
    /// A copy that is owned.
    pub fn to_owned_values(&self) -> OwnedValues {
        match self {
            Values::F32(values) => OwnedValues::F32(values.to_vec()),
            Values::F16(values) => OwnedValues::F16(values.to_vec()),
            Values::Bf16(values) => OwnedValues::Bf16(values.to_vec()),
        }
    }
}
