//! Rotary position embedding in Hugging Face's order: pair i of a head is (i, i + size/2).

use crate::decoder::error::OperationError;

/// Cosines and sines of every position that a model knows.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    /// Pairs of a head.
    pairs: usize,
    /// `[positions, pairs]`
    cosines: Vec<f32>,
    /// `[positions, pairs]`
    sines: Vec<f32>,
}

impl RotaryTable {
    /// Angles position · base^(−2i/size), taken in f64, for heads of `size` numbers.
    pub fn new(positions: usize, size: usize, base: f64) -> Self {
        let pairs = size / 2;
        let angles =
            |position: usize| (0..pairs).map(move |pair| position as f64 * base.powf(-2.0 * pair as f64 / size as f64));
        let table = |function: fn(f64) -> f64| (0..positions).flat_map(angles).map(|a| function(a) as f32).collect();
        Self { pairs, cosines: table(f64::cos), sines: table(f64::sin) }
    }

    /// Whether heads of `size` numbers can be rotated at all positions before `tokens`.
    pub(super) fn check(&self, size: usize, tokens: usize) -> Result<(), OperationError> {
        if size != 2 * self.pairs {
            return Err(OperationError::WrongRotation { size, expected: 2 * self.pairs });
        }
        let positions = self.cosines.len().checked_div(self.pairs).unwrap_or(tokens);
        if tokens > positions { Err(OperationError::NoPosition { tokens, positions }) } else { Ok(()) }
    }

    /// Rotates a head in place: (a, b) becomes (a · cos − b · sin, b · cos + a · sin).
    #[inline(always)]
    pub(super) fn rotate(&self, position: usize, head: &mut [f32]) {
        let own = position * self.pairs..(position + 1) * self.pairs;
        let (first, second) = head.split_at_mut(self.pairs);
        let angles = self.cosines[own.clone()].iter().zip(&self.sines[own]);
        for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(angles) {
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}
