//! What follows the products: φ(value + bias) + residual, on a run of outputs while they are in cache.

use std::ops::Range;

use flora_ir::Activation;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;

use crate::layout::STRIP;
use crate::values::Values;
use crate::vectorise::vectorised;
use crate::widen::widen_bf16;

/// An epilogue and its operands.
#[derive(Clone, Copy, Default)]
pub(crate) struct Finish<'a> {
    /// `[k]`
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
    /// `[tokens, k]`
    pub(crate) residual: Option<Values<'a>>,
}

impl Finish<'_> {
    /// Finishes outputs of `row` from column `first` on; `k` is the row's length, `spare` as long as `outputs`.
    pub(crate) fn apply<S: Simd>(
        &self,
        simd: S,
        (row, first, k): (usize, usize, usize),
        outputs: &mut [f32],
        spare: &mut [f32],
    ) {
        vectorised(
            simd,
            #[inline(always)]
            || {
                if let Some(bias) = self.bias {
                    add(outputs, &bias[first..first + outputs.len()]);
                }
                activate::<S>(outputs, self.activation);
                match self.residual {
                    None => {}
                    Some(Values::F32(residual)) => add(outputs, &residual[row * k + first..][..outputs.len()]),
                    Some(residual) => {
                        residual.widen(row * k + first, spare);
                        add(outputs, spare);
                    }
                }
            },
        );
    }

    /// The same for a strip of the rows from `first` on, within a loop that is compiled for the instruction set. What is beyond the
    /// columns has no meaning.
    #[inline(always)]
    pub(crate) fn apply_to_strip<S: Simd>(
        &self,
        (first, columns, k): (usize, Range<usize>, usize),
        outputs: &mut [[f32; STRIP]],
    ) {
        if let Some(bias) = self.bias {
            let bias = &bias[columns.clone()];
            outputs.iter_mut().for_each(|outputs| add(outputs, bias));
        }
        activate::<S>(outputs.as_flattened_mut(), self.activation);
        let places = (first..).map(|row| row * k + columns.start..row * k + columns.end);
        let rows = outputs.iter_mut().zip(places);
        match self.residual {
            None => {}
            Some(Values::F32(residual)) => rows.for_each(|(outputs, place)| add(outputs, &residual[place])),
            Some(Values::F16(residual)) => {
                let mut wide = [0.0; STRIP];
                rows.for_each(|(outputs, place)| {
                    let wide = &mut wide[..place.len()];
                    residual[place].convert_to_f32_slice(wide);
                    add(outputs, wide);
                });
            }
            Some(Values::Bf16(residual)) => rows.for_each(|(outputs, place)| {
                outputs.iter_mut().zip(&residual[place]).for_each(|(out, value)| *out += widen_bf16(*value));
            }),
        }
    }
}

#[inline(always)]
fn add(outputs: &mut [f32], values: &[f32]) {
    outputs.iter_mut().zip(values).for_each(|(out, value)| *out += value);
}

/// φ of every number.
#[inline(always)]
pub(crate) fn activate<S: Simd>(outputs: &mut [f32], activation: Activation) {
    match activation {
        Activation::Identity => {}
        // NaN stays, and says that something is wrong.
        Activation::Relu => outputs.iter_mut().for_each(|out| *out = if *out < 0.0 { 0.0 } else { *out }),
        Activation::Silu => outputs.iter_mut().for_each(|out| *out *= sigmoid::<S>(*out)),
        // ½(1 + tanh z) = sigmoid(2z)
        Activation::GeluTanh => outputs.iter_mut().for_each(|out| {
            const TWICE: f32 = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2; // 2·√(2/π)
            *out *= sigmoid::<S>(TWICE * (*out + 0.044_715 * *out * *out * *out));
        }),
        Activation::GeluErf => outputs.iter_mut().for_each(|out| {
            *out *= 0.5 * (1.0 + libm::erff(*out * std::f32::consts::FRAC_1_SQRT_2));
        }),
    }
}

#[inline(always)]
fn sigmoid<S: Simd>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<S>(-x))
}

/// eˣ as 2ⁿ·eʳ with |r| ≤ ½ ln 2, whose Taylor series to r⁷ is off by less than 6e-9. Without branches, so that it is
/// computed for a vector at a time, as the standard library's is not.
#[inline(always)]
pub(crate) fn exp<S: Simd>(x: f32) -> f32 {
    // 2ⁿ has no f32 beyond these. Below, the result is as good as 0 to who adds 1; above, it is infinite. NaN passes.
    let is_large = x > 88.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if is_large { 88.0 } else { x };
    // To the nearest whole number, which the sum's last bits are: a conversion would take longer, for what it does with numbers that
    // are too large.
    const WHOLE: f32 = 12_582_912.0;
    let rounded = multiply_add::<S>(x, std::f32::consts::LOG2_E, WHOLE);
    let n = rounded - WHOLE;
    // ln 2 in two parts, the first with few enough bits for an exact product.
    let r = multiply_add::<S>(n, 2.121_944_4e-4, multiply_add::<S>(n, -355.0 / 512.0, x));
    let series = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let mut sum = 1.0f32 / 5040.0;
    for coefficient in series {
        sum = multiply_add::<S>(sum, r, coefficient);
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(WHOLE.to_bits()).wrapping_add(127) << 23);
    if is_large { f32::INFINITY } else { sum * power }
}

/// a · b + c, fused where that is one instruction.
#[inline(always)]
fn multiply_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::IS_SCALAR { a * b + c } else { a.mul_add(b, c) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_those_of_the_oracle() {
        activations_are_right::<pulp::Scalar>();
        #[cfg(target_arch = "x86_64")]
        activations_are_right::<pulp::x86::V3>();
    }

    fn activations_are_right<S: Simd>() {
        for activation in Activation::ALL {
            for step in -4000..=4000 {
                let x = step as f32 * 0.025;
                let mut out = [x];
                activate::<S>(&mut out, activation);
                let right = flora_ir::evaluate::apply_activation(activation, f64::from(x));
                // Of the argument: what rounding φ's operands leaves, a few units in the last place of x.
                let error = (f64::from(out[0]) - right).abs();
                assert!(error <= 4e-7 * f64::from(x.abs()).max(1e-3), "{activation:?}({x}) = {} not {right}", out[0]);
            }
            let mut odd = [f32::NAN, f32::INFINITY, 1e30, -1e30];
            activate::<S>(&mut odd, activation);
            assert!(odd[0].is_nan() && odd[1] == f32::INFINITY && odd[2] == 1e30, "{activation:?}: {odd:?}");
            assert!(activation == Activation::Identity || odd[3] == 0.0, "{activation:?}: {odd:?}");
        }
    }
}
