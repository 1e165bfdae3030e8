//! Softmax on the fly: scores come a span of keys at a time, and what was summed before is scaled down where a larger one comes.

use std::ops::Range;

use pulp::Simd;

use crate::decoder::cache::KEYS;
use crate::finish::exp;

/// What is known of one row's scores so far.
#[derive(Clone, Copy)]
pub(super) struct Softmax {
    /// The largest.
    largest: f32,
    /// Σ exp(score − largest) over every [`KEYS`]th key. They are summed once, at the end: that takes longer than the products with a
    /// few keys.
    sums: [f32; KEYS],
}

impl Softmax {
    /// Of no scores.
    pub(super) const NONE: Self = Self { largest: f32::NEG_INFINITY, sums: [0.0; KEYS] };

    /// Σ exp(score − largest)
    pub(super) fn sum(&self) -> f32 {
        fold(self.sums, |one, other| one + other)
    }

    /// ln Σ exp(score)
    pub(super) fn log_sum(&self) -> f32 {
        self.largest + self.sum().ln()
    }

    /// Turns the next scores, of which those in `seen` are keys that the row sees, at least one, into their weights:
    /// exp(score − largest), 0 for the others. The result is what sums over the keys before have to be multiplied by. NaN among the
    /// scores stays NaN.
    #[inline(always)]
    pub(super) fn add<S: Simd>(&mut self, scores: &mut [[f32; KEYS]], seen: Range<usize>) -> f32 {
        let Range { start, end } = seen;
        hide(scores, start..end, f32::NEG_INFINITY);
        let larger = |one: f32, other: f32| if other > one { other } else { one };
        let mut lanes = [self.largest; KEYS];
        for scores in &*scores {
            for lane in 0..KEYS {
                lanes[lane] = larger(lanes[lane], scores[lane]);
            }
        }
        let largest = fold(lanes, larger);
        for scores in &mut *scores {
            scores.iter_mut().for_each(|score| *score = exp::<S>(*score - largest));
        }
        hide(scores, start..end, 0.0);
        let scale = exp::<S>(self.largest - largest);
        let mut sums = self.sums;
        sums.iter_mut().for_each(|sum| *sum *= scale);
        for scores in &*scores {
            for lane in 0..KEYS {
                sums[lane] += scores[lane];
            }
        }
        *self = Self { largest, sums };
        scale
    }
}

/// Gives the numbers that aren't in `seen` a value.
#[inline(always)]
fn hide(numbers: &mut [[f32; KEYS]], seen: Range<usize>, value: f32) {
    let numbers = numbers.as_flattened_mut();
    // Most rows see all keys of most spans, which is quicker asked than filling nothing.
    if seen.start > 0 {
        numbers[..seen.start].fill(value);
    }
    if seen.end < numbers.len() {
        numbers[seen.end..].fill(value);
    }
}

/// All numbers in one, halves on halves.
#[inline(always)]
fn fold(mut lanes: [f32; KEYS], both: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = KEYS / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = both(lanes[lane], lanes[lane + half]);
        }
        half /= 2;
    }
    lanes[0]
}
