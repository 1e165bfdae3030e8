//! φ by itself, and its derivative. In serving φ is in a projection's epilogue; the derivative needs the sum that φ was taken of, so
//! in training the projection leaves that sum, and φ follows.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use flora_ir::Activation;
use pulp::Scalar;

use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::finish::{activate, exp};

impl HostEngine {
    /// φ(x)
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn activate(&self, activation: Activation, x: &[f32], out: &mut [f32]) -> Result<(), OperationError> {
        OperationError::length("φ's result", out.len(), x.len())?;
        self.elements(
            out,
            x,
            #[inline(always)]
            |out, x| {
                out.copy_from_slice(x);
                activate::<Scalar>(out, activation);
            },
        );
        Ok(())
    }

    /// The gradient of φ(x) becomes that of x: g becomes φ'(x) ∘ g.
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn activate_adjoint(&self, activation: Activation, x: &[f32], g: &mut [f32]) -> Result<(), OperationError> {
        OperationError::length("the gradient of φ", g.len(), x.len())?;
        self.elements(
            g,
            x,
            #[inline(always)]
            |g, x| differentiate(activation, x, g),
        );
        Ok(())
    }
}

#[inline(always)]
fn differentiate(activation: Activation, x: &[f32], g: &mut [f32]) {
    match activation {
        Activation::Identity => {}
        // NaN stays, and says that something is wrong.
        Activation::Relu => multiply(g, x, |x| match x {
            ..=0.0 => 0.0,
            0.0.. => 1.0,
            _ => x,
        }),
        // σ + x·σ·(1 − σ)
        Activation::Silu => multiply(g, x, |x| {
            let x = clamp(x);
            let (sigmoid, rest) = sigmoids(x);
            sigmoid + x * sigmoid * rest
        }),
        // x·σ(z) with z = 2·√(2/π)·(x + 0.044715·x³): σ + x·z'·σ·(1 − σ)
        Activation::GeluTanh => multiply(g, x, |x| {
            const TWICE: f32 = 2.0 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2;
            let x = clamp(x);
            let (sigmoid, rest) = sigmoids(clamp(TWICE * (x + 0.044_715 * x * x * x)));
            sigmoid + x * (TWICE * (1.0 + 3.0 * 0.044_715 * x * x)) * sigmoid * rest
        }),
        // x·Φ(x): Φ + x·exp(−½x²)/√(2π)
        Activation::GeluErf => multiply(g, x, |x| {
            let x = clamp(x);
            let density = 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * exp::<Scalar>(-0.5 * x * x);
            0.5 * (1.0 + libm::erff(x * FRAC_1_SQRT_2)) + x * density
        }),
    }
}

#[inline(always)]
fn multiply(g: &mut [f32], x: &[f32], slope: impl Fn(f32) -> f32) {
    g.iter_mut().zip(x).for_each(|(g, x)| *g *= slope(*x));
}

/// x where the slopes still change; beyond, they are 0 and 1 but for 1e-29. NaN passes.
#[inline(always)]
fn clamp(x: f32) -> f32 {
    const END: f32 = 80.0;
    let x = if x < -END { -END } else { x };
    if x > END { END } else { x }
}

/// σ(z) and 1 − σ(z), the latter without cancellation, for |z| ≤ 80.
#[inline(always)]
fn sigmoids(z: f32) -> (f32, f32) {
    let power = exp::<Scalar>(-z);
    let sigmoid = 1.0 / (1.0 + power);
    (sigmoid, power * sigmoid)
}

#[cfg(test)]
mod tests {
    use flora_ir::evaluate::apply_activation;

    use super::*;

    #[test]
    fn slopes_are_differences_of_the_oracle() {
        const STEP: f64 = 1e-4;
        for activation in Activation::ALL {
            for place in -4000..=4000 {
                // Relu's kink is between two places.
                let x = (place as f32 + 0.5) * 0.025;
                let at = |steps: f64| apply_activation(activation, f64::from(x) + steps * STEP);
                let difference = |steps: f64| (at(steps) - at(-steps)) / (2.0 * steps * STEP);
                let right = difference(1.0);
                // The difference's own error, and f64's rounding in it.
                let of_difference = (difference(2.0) - right).abs() / 3.0 + f64::EPSILON * f64::from(x).abs() / STEP;
                let mut found = [1.0];
                differentiate(activation, &[x], &mut found);
                // A sum of two terms of at most 1.2, each after a dozen roundings.
                let allowed = of_difference + 1.2 * 12.0 * f64::from(f32::EPSILON) / 2.0;
                let error = (f64::from(found[0]) - right).abs();
                assert!(error <= allowed, "{activation:?}'({x}) = {} not {right} ± {allowed}", found[0]);
            }
            let mut odd = [1.0; 5];
            differentiate(activation, &[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30], &mut odd);
            assert!(odd[0].is_nan() || activation == Activation::Identity, "{activation:?}: {odd:?}");
            assert!(odd[1] == 1.0 && odd[3] == 1.0, "{activation:?}: {odd:?}");
            let below = if activation == Activation::Identity { 1.0 } else { 0.0 };
            assert!((odd[2] - below).abs() < 1e-29 && (odd[4] - below).abs() < 1e-29, "{activation:?}: {odd:?}");
        }
    }
}
