//! The adapters that flora knows by name, each written in the text form. Their operands are named alike: `x` the input,
//! `w0` the base weight, `b` `[D, R]` and `a` `[R, K]` the low-rank pair, `s` the scale, `l` the IA3 vector, `m` DoRA's
//! magnitude.

use std::sync::LazyLock;

use crate::text::parse;
use crate::verify::{VerifiedLayer, verify};

const SOURCES: [(&str, &str); 8] = [
    ("linear", include_str!("linear.flora")),
    ("flora", include_str!("flora.flora")),
    ("flora_mean", include_str!("flora_mean.flora")),
    ("hira", include_str!("hira.flora")),
    ("lora", include_str!("lora.flora")),
    ("ia3", include_str!("ia3.flora")),
    ("ia3_feedforward", include_str!("ia3_feedforward.flora")),
    ("dora", include_str!("dora.flora")),
];

static LAYERS: LazyLock<Vec<(&str, VerifiedLayer)>> = LazyLock::new(|| {
    SOURCES.iter().filter_map(|(name, source)| Some((*name, verify(parse(source).ok()?).ok()?))).collect()
});

/// The built-in layer called `name`.
pub fn builtin(name: &str) -> Option<&'static VerifiedLayer> {
    LAYERS.iter().find(|(known, _)| *known == name).map(|(_, layer)| layer)
}

/// The text form of the built-in layer called `name`.
pub fn source(name: &str) -> Option<&'static str> {
    SOURCES.iter().find(|(known, _)| *known == name).map(|(_, source)| *source)
}

/// The names of the built-in layers.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|(name, _)| *name)
}
