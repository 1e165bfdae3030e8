//! Cross-entropy of some rows of logits, and its gradient in their place. A caller passes as many rows at a time as it wants in memory.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::elements::PARALLEL_NUMBERS;
use crate::HostEngine;
use crate::decoder::error::OperationError;
use crate::decoder::norm::{LANES, sum};
use crate::finish::exp;
use crate::vectorise::vectorised;

impl HostEngine {
    /// −ln softmax(logits) at the target of every row of `logits` `[rows, vocabulary]`, in nats, with a target for each row. The logits
    /// become the gradient of the sum of these losses, softmax(logits) − one-hot(target).
    ///
    /// # Errors
    /// Another number of logits; a target beyond the vocabulary. Nothing is written then.
    pub fn cross_entropy(
        &self,
        logits: &mut [f32],
        vocabulary: usize,
        targets: &[u32],
    ) -> Result<Vec<f64>, OperationError> {
        OperationError::length("the logits", logits.len(), targets.len() * vocabulary)?;
        if let Some(target) = targets.iter().find(|target| **target as usize >= vocabulary) {
            return Err(OperationError::NoTarget { target: *target, vocabulary });
        }
        let mut losses = vec![0.0; targets.len()];
        if vocabulary > 0 {
            self.arch().dispatch(Rows { logits, vocabulary, targets, losses: &mut losses });
        }
        Ok(losses)
    }
}

/// Rows that have been checked.
struct Rows<'a> {
    logits: &'a mut [f32],
    vocabulary: usize,
    targets: &'a [u32],
    losses: &'a mut [f64],
}

impl WithSimd for Rows<'_> {
    type Output = ();

    fn with_simd<S: Simd>(self, simd: S) {
        let Self { logits, vocabulary, targets, losses } = self;
        let one = |((logits, target), loss): ((&mut [f32], &u32), &mut f64)| {
            *loss = vectorised(
                simd,
                #[inline(always)]
                || row::<S>(logits, *target as usize),
            );
        };
        if logits.len() < PARALLEL_NUMBERS {
            logits.chunks_exact_mut(vocabulary).zip(targets).zip(losses).for_each(one);
        } else {
            logits.par_chunks_exact_mut(vocabulary).zip(targets).zip(losses).for_each(one);
        }
    }
}

/// One row's loss; its logits become their gradient.
#[inline(always)]
fn row<S: Simd>(logits: &mut [f32], target: usize) -> f64 {
    let largest = largest(logits);
    let below = f64::from(largest) - f64::from(logits[target]);
    logits.iter_mut().for_each(|logit| *logit = exp::<S>(*logit - largest));
    let total = sum(logits, |power| power);
    let scale = 1.0 / total;
    logits.iter_mut().for_each(|power| *power *= scale);
    logits[target] -= 1.0;
    below + f64::from(total).ln()
}

/// Of numbers that aren't NaN; what is NaN shows in the sum of powers.
#[inline(always)]
fn largest(numbers: &[f32]) -> f32 {
    let larger = |one: f32, other: f32| if other > one { other } else { one };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = numbers.as_chunks::<LANES>();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, number)| *lane = larger(*lane, *number));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, number)| *lane = larger(*lane, *number));
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}
