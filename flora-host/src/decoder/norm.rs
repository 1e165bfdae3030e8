//! Norms over the numbers of a row.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::partition::PARALLEL_MACS;
use crate::values::{Sink, Values, ValuesMut};
use crate::vectorise::vectorised;

/// Sums that are kept side by side: two vectors of the widest registers.
pub(super) const LANES: usize = 32;

impl HostEngine {
    /// x / √(mean(x²) + epsilon) ∘ gamma for every row of x `[rows, d]`, where d is the length of gamma.
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn rms_norm(
        &self,
        x: Values<'_>,
        gamma: &[f32],
        epsilon: f32,
        out: ValuesMut<'_>,
    ) -> Result<(), OperationError> {
        self.normalise(x, Norm { gamma, beta: None, epsilon }, out)
    }

    /// (x − mean(x)) / √(var(x) + epsilon) ∘ gamma + beta for every row of x `[rows, d]`, where d is the length of gamma and beta.
    ///
    /// # Errors
    /// Operands of other lengths; nothing is written then.
    pub fn layer_norm(
        &self,
        x: Values<'_>,
        [gamma, beta]: [&[f32]; 2],
        epsilon: f32,
        out: ValuesMut<'_>,
    ) -> Result<(), OperationError> {
        OperationError::length("the norm's beta", beta.len(), gamma.len())?;
        self.normalise(x, Norm { gamma, beta: Some(beta), epsilon }, out)
    }

    fn normalise(&self, x: Values<'_>, norm: Norm<'_>, mut out: ValuesMut<'_>) -> Result<(), OperationError> {
        let width = norm.gamma.len();
        OperationError::length("the normalised rows", out.len(), x.len())?;
        if x.is_empty() {
            return Ok(());
        }
        if x.len().checked_rem(width).is_none_or(|rest| rest != 0) {
            return Err(OperationError::PartialRow { width, found: x.len() });
        }
        self.arch().dispatch(Rows { x, norm, sink: Sink::new(&mut out) });
        Ok(())
    }
}

/// A norm's numbers.
#[derive(Clone, Copy)]
struct Norm<'a> {
    gamma: &'a [f32],
    /// `None`: the mean isn't taken off, and nothing is added.
    beta: Option<&'a [f32]>,
    epsilon: f32,
}

/// Rows that have been checked.
struct Rows<'a> {
    x: Values<'a>,
    norm: Norm<'a>,
    sink: Sink,
}

impl WithSimd for Rows<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, norm, sink } = self;
        let width = norm.gamma.len();
        let one = |own: &mut Vec<f32>, row: usize| {
            own.resize(width, 0.0);
            vectorised(
                simd,
                #[inline(always)]
                || {
                    x.widen(row * width, own);
                    norm.apply(own);
                },
            );
            // SAFETY: the output outlives the rows, which don't overlap.
            unsafe { sink.write(simd, row * width, own) };
        };
        let rows = x.len() / width;
        if (x.len() as u64) < PARALLEL_MACS {
            let mut own = Vec::new();
            (0..rows).for_each(|row| one(&mut own, row));
        } else {
            (0..rows).into_par_iter().for_each_init(Vec::new, one);
        }
    }
}

impl Norm<'_> {
    #[inline(always)]
    fn apply(&self, row: &mut [f32]) {
        let width = row.len() as f32;
        if self.beta.is_some() {
            let mean = sum(row, |number| number) / width;
            row.iter_mut().for_each(|number| *number -= mean);
        }
        let scale = 1.0 / (sum(row, |number| number * number) / width + self.epsilon).sqrt();
        row.iter_mut().zip(self.gamma).for_each(|(number, gamma)| *number = *number * scale * gamma);
        if let Some(beta) = self.beta {
            row.iter_mut().zip(beta).for_each(|(number, beta)| *number += beta);
        }
    }
}

/// Sums in lanes, then halves on halves.
#[inline(always)]
pub(super) fn sum(row: &[f32], of: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, number)| *lane += of(*number));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, number)| *lane += of(*number));
    halves(lanes)
}

/// All lanes in one.
#[inline(always)]
pub(super) fn halves(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
