//! Norms backwards. With n = (x − mean) · s, s = 1/√(variance + ε) and h = γ ∘ g the gradient of x is s · (h − mean(h) − n · mean(h ∘ n));
//! without means where the norm is one of mean squares, but for the last.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::elements::PARALLEL_NUMBERS;
use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::decoder::norm::{LANES, halves, sum};
use crate::vectorise::vectorised;

impl HostEngine {
    /// The gradient of [`HostEngine::rms_norm`]'s result becomes that of x `[rows, d]`, in place.
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn rms_norm_adjoint(
        &self,
        x: &[f32],
        gamma: &[f32],
        epsilon: f32,
        g: &mut [f32],
    ) -> Result<(), OperationError> {
        self.norm_adjoint::<false>(x, gamma, epsilon, g)
    }

    /// The gradient of [`HostEngine::layer_norm`]'s result becomes that of x `[rows, d]`, in place. It doesn't depend on beta.
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn layer_norm_adjoint(
        &self,
        x: &[f32],
        gamma: &[f32],
        epsilon: f32,
        g: &mut [f32],
    ) -> Result<(), OperationError> {
        self.norm_adjoint::<true>(x, gamma, epsilon, g)
    }

    fn norm_adjoint<const CENTRED: bool>(
        &self,
        x: &[f32],
        gamma: &[f32],
        epsilon: f32,
        g: &mut [f32],
    ) -> Result<(), OperationError> {
        OperationError::length("the gradient of normalised rows", g.len(), x.len())?;
        if x.is_empty() {
            return Ok(());
        }
        let width = gamma.len();
        if x.len().checked_rem(width).is_none_or(|rest| rest != 0) {
            return Err(OperationError::PartialRow { width, found: x.len() });
        }
        self.arch().dispatch(Rows::<CENTRED> { x, gamma, epsilon, g });
        Ok(())
    }
}

/// Rows that have been checked.
struct Rows<'a, const CENTRED: bool> {
    x: &'a [f32],
    gamma: &'a [f32],
    epsilon: f32,
    g: &'a mut [f32],
}

impl<const CENTRED: bool> WithSimd for Rows<'_, CENTRED> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, gamma, epsilon, g } = self;
        let width = gamma.len();
        let one = |centred: &mut Vec<f32>, (x, g): (&[f32], &mut [f32])| {
            centred.resize(width, 0.0);
            vectorised(
                simd,
                #[inline(always)]
                || row::<CENTRED>(x, gamma, epsilon, centred, g),
            );
        };
        if x.len() < PARALLEL_NUMBERS {
            let mut own = Vec::new();
            x.chunks_exact(width).zip(g.chunks_exact_mut(width)).for_each(|rows| one(&mut own, rows));
        } else {
            x.par_chunks_exact(width).zip(g.par_chunks_exact_mut(width)).for_each_init(Vec::new, one);
        }
    }
}

#[inline(always)]
fn row<const CENTRED: bool>(x: &[f32], gamma: &[f32], epsilon: f32, centred: &mut [f32], g: &mut [f32]) {
    let width = x.len() as f32;
    let mean = if CENTRED { sum(x, |number| number) / width } else { 0.0 };
    centred.iter_mut().zip(x).for_each(|(centred, x)| *centred = x - mean);
    let scale = 1.0 / (sum(centred, |number| number * number) / width + epsilon).sqrt();
    g.iter_mut().zip(gamma).for_each(|(g, gamma)| *g *= gamma);
    let mean = if CENTRED { sum(g, |number| number) / width } else { 0.0 };
    // n · mean(h ∘ n), of which n is not multiplied out.
    let along = scale * scale * (dot(g, centred) / width);
    g.iter_mut().zip(&*centred).for_each(|(g, centred)| *g = scale * (*g - mean - centred * along));
}

/// Sums products in lanes, then halves on halves.
#[inline(always)]
fn dot(one: &[f32], other: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((ones, one), (others, other)) = (one.as_chunks::<LANES>(), other.as_chunks::<LANES>());
    for (ones, others) in ones.iter().zip(others) {
        lanes.iter_mut().zip(ones.iter().zip(others)).for_each(|(lane, (one, other))| *lane += one * other);
    }
    lanes.iter_mut().zip(one.iter().zip(other)).for_each(|(lane, (one, other))| *lane += one * other);
    halves(lanes)
}
