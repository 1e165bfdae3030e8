//! Types and lowerings as arguments: the names that the crates below give them.

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use flora::prelude::*;
use flora_adapters::BaseForm;
use flora_plan::lowering::TABLE;

/// Parses the name of an element type.
pub(crate) fn element() -> impl TypedValueParser<Value = Element> {
    let named = |name: String| Element::ALL.into_iter().find(|element| element.name() == name);
    PossibleValuesParser::new(Element::ALL.map(Element::name)).try_map(move |name| named(name).ok_or("no such type"))
}

/// Parses the name of a weight format.
pub(crate) fn weight_format() -> impl TypedValueParser<Value = WeightFormat> {
    PossibleValuesParser::new(WeightFormat::ALL.map(|(name, _)| name))
        .try_map(|name| WeightFormat::from_name(&name).ok_or("no such format"))
}

/// The form in which a device keeps base weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Base {
    /// As the model's file has them, where the device can decode that as it multiplies
    Stored,
    /// Dequantised
    F32,
    /// Rounded to 8 bits with a scale for each output
    Int8,
}

impl From<Base> for BaseForm {
    fn from(base: Base) -> Self {
        match base {
            Base::Stored => Self::Stored,
            Base::F32 => Self::F32,
            Base::Int8 => Self::Int8,
        }
    }
}

/// Parses the name of a lowering.
pub(crate) fn lowering() -> impl TypedValueParser<Value = Lowering> {
    let mut names: Vec<_> = TABLE.iter().map(|row| row.lowering().name()).collect();
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(*name));
    PossibleValuesParser::new(names).try_map(|name| Lowering::from_name(&name).ok_or("no such lowering"))
}

/// Layer formats of every type of activations and adapters with every format of the base weight; that of the activations where
/// none is given.
pub(crate) fn formats(dtypes: &[Element], weights: &[WeightFormat]) -> Vec<LayerFormat> {
    let mut formats = Vec::new();
    for dtype in dtypes {
        let own = [WeightFormat::Float(*dtype)];
        for weight in if weights.is_empty() { &own[..] } else { weights } {
            formats.push(LayerFormat { weight: *weight, ..LayerFormat::uniform(*dtype) });
        }
    }
    formats
}
