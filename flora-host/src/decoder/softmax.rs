//! Softmax on the fly: scores come a block of keys at a time, and what was summed before is scaled down where a larger one comes.

use std::ops::Range;

use crate::decoder::cache::KEYS;
use crate::finish::exp;

/// What is known of one row's scores so far.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    /// The largest.
    largest: f32,
    /// Σ exp(score − largest)
    pub(super) sum: f32,
}

impl Softmax {
    /// Of no scores.
    pub(super) const NONE: Self = Self { largest: f32::NEG_INFINITY, sum: 0.0 };

    /// ln Σ exp(score)
    pub(super) fn log_sum(&self) -> f32 {
        self.largest + self.sum.ln()
    }

    /// Turns the next scores, of which those in `seen` are keys that the row sees, at least one, into their weights:
    /// exp(score − largest), 0 for the others. The result is what sums over the keys before have to be multiplied by. NaN among the
    /// scores stays NaN.
    #[inline(always)]
    pub(super) fn add(&mut self, scores: &mut [f32; KEYS], seen: Range<usize>) -> f32 {
        let Range { start, end } = seen;
        if start > 0 {
            scores[..start].fill(f32::NEG_INFINITY);
        }
        if end < KEYS {
            scores[end..].fill(f32::NEG_INFINITY);
        }
        let larger = |one: f32, other: f32| if other > one { other } else { one };
        let largest = larger(self.largest, fold(scores, larger));
        scores.iter_mut().for_each(|score| *score = exp(*score - largest));
        if start > 0 {
            scores[..start].fill(0.0);
        }
        if end < KEYS {
            scores[end..].fill(0.0);
        }
        let scale = exp(self.largest - largest);
        *self = Self { largest, sum: self.sum * scale + fold(scores, |one, other| one + other) };
        scale
    }
}

/// All numbers in one, halves on halves.
#[inline(always)]
fn fold(numbers: &[f32; KEYS], both: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = *numbers;
    let mut half = KEYS / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = both(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}
