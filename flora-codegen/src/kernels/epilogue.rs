//! The last arithmetic on output elements, shared by every kernel that finishes rows: bias, then φ, then the residual, then the
//! cast to the output's type.

use cubecl::prelude::*;
use flora_ir::Activation;
use flora_plan::layer::Epilogue;

/// φ(value + bias) + residual. `column` and `at` count vectors: of a line, and of the whole output.
#[cube]
pub(crate) fn finish<Y: Float, N: Size>(
    value: Vector<f32, N>,
    bias: &Array<Vector<f32, N>>,
    residual: &Array<Vector<Y, N>>,
    column: u32,
    at: u32,
    #[comptime] epilogue: Epilogue,
) -> Vector<Y, N> {
    let mut result = value;
    if comptime!(epilogue.bias) {
        result += bias[column as usize];
    }
    result = activate::<N>(result, comptime!(epilogue.activation));
    if comptime!(epilogue.residual) {
        result += Vector::cast_from(residual[at as usize]);
    }
    Vector::cast_from(result)
}

#[cube]
fn activate<N: Size>(value: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    let mut result = value;
    let zero = Vector::<f32, N>::new(0.0);
    let one = Vector::<f32, N>::new(1.0);
    if comptime!(activation == Activation::Relu) {
        // Not the maximum, which loses a NaN.
        result = select_many(value.less_than(zero), zero, value);
    }
    if comptime!(activation == Activation::GeluErf) {
        // 1/√2
        let inner = value * Vector::new(0.707_106_77f32);
        result = Vector::new(0.5f32) * value * (one + Vector::erf(inner));
    }
    if comptime!(activation == Activation::GeluTanh) {
        // √(2/π); tanh is clamped by its argument, whose exponential would overflow on devices that expand it
        let cubic = Vector::new(0.044715f32) * value * value * value;
        let inner = Vector::new(0.797_884_6f32) * (value + cubic);
        let bounded = clamp(inner, Vector::new(-15.0f32), Vector::new(15.0f32));
        result = Vector::new(0.5f32) * value * (one + bounded.tanh());
    }
    if comptime!(activation == Activation::Silu) {
        result = value / (one + (zero - value).exp());
    }
    result
}
