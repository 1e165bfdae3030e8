//! The last arithmetic on an output element, shared by every kernel that finishes rows: bias, then φ.

use cubecl::prelude::*;
use flora_ir::Activation;

/// What a kernel applies before it writes `y`. Part of every finishing kernel's blueprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// Add the shared bias `[k]`.
    pub bias: bool,
    /// φ of Eq. 2.
    pub activation: Activation,
}

impl Epilogue {
    /// Whether the epilogue leaves its input as it is.
    pub fn is_identity(self) -> bool {
        self == Self::default()
    }
}

/// φ(value + bias\[column\])
#[cube]
pub(crate) fn finish(value: f32, bias: &Array<f32>, column: u32, #[comptime] epilogue: Epilogue) -> f32 {
    let mut result = value;
    if comptime!(epilogue.bias) {
        result += bias[column as usize];
    }
    activate(result, comptime!(epilogue.activation))
}

#[cube]
fn activate(value: f32, #[comptime] activation: Activation) -> f32 {
    let mut result = value;
    if comptime!(activation == Activation::Relu) {
        // Not the maximum, which loses a NaN.
        result = select(value < 0.0, 0.0, value);
    }
    if comptime!(activation == Activation::GeluErf) {
        // 1/√2
        result = 0.5 * value * (1.0 + Erf::erf(value * 0.707_106_77));
    }
    if comptime!(activation == Activation::GeluTanh) {
        // √(2/π); tanh is clamped by its argument, whose exponential would overflow on devices that expand it
        let inner = 0.797_884_6 * (value + 0.044715 * value * value * value);
        result = 0.5 * value * (1.0 + clamp(inner, -15.0, 15.0).tanh());
    }
    if comptime!(activation == Activation::Silu) {
        result = value / (1.0 + (-value).exp());
    }
    result
}
