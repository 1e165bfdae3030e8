//! Rotary position embedding in Hugging Face's order: pair i of a head is (i, i + size/2). Angles are taken for the rows of a step and
//! not for every position that a model knows, of which there may be a million.

use rayon::prelude::*;

use crate::decoder::error::OperationError;

/// By how much the pairs of a head turn from one position to the next.
#[derive(Clone, Debug)]
pub struct RotaryFrequencies {
    /// `[pairs]`
    frequencies: Vec<f64>,
    factor: f64,
}

/// Cosines and sines of some rows' positions.
#[derive(Clone, Debug)]
pub struct RotaryRows {
    rows: usize,
    /// Pairs of a head.
    pairs: usize,
    /// `[rows, pairs]`
    cosines: Vec<f32>,
    /// `[rows, pairs]`
    sines: Vec<f32>,
}

/// Angles from which on threads share them.
const PARALLEL_ANGLES: usize = 1 << 12;

impl RotaryFrequencies {
    /// Pair i of a head turns by position · `frequencies[i]`, and what is turned is multiplied by `factor`.
    pub fn new(frequencies: Vec<f64>, factor: f64) -> Self {
        Self { frequencies, factor }
    }

    /// Those of rows at these positions. Angles are taken in f64, and what is kept of them is rounded once.
    pub fn rows(&self, positions: &[usize]) -> RotaryRows {
        let (pairs, rows) = (self.frequencies.len(), positions.len());
        let (mut cosines, mut sines) = (vec![0.0; rows * pairs], vec![0.0; rows * pairs]);
        let turn = |((cosines, sines), position): ((&mut [f32], &mut [f32]), &usize)| {
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(&self.frequencies) {
                let angle = *position as f64 * frequency;
                *cosine = (angle.cos() * self.factor) as f32;
                *sine = (angle.sin() * self.factor) as f32;
            }
        };
        // A head without pairs has nothing to turn.
        let pitch = pairs.max(1);
        if rows * pairs < PARALLEL_ANGLES {
            let rows = cosines.chunks_exact_mut(pitch).zip(sines.chunks_exact_mut(pitch));
            rows.zip(positions).for_each(turn);
        } else {
            let rows = cosines.par_chunks_exact_mut(pitch).zip(sines.par_chunks_exact_mut(pitch));
            rows.zip(positions).for_each(turn);
        }
        RotaryRows { rows, pairs, cosines, sines }
    }
}

impl RotaryRows {
    /// Pairs of a head.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// `[rows, pairs]`
    pub fn cosines(&self) -> &[f32] {
        &self.cosines
    }

    /// `[rows, pairs]`
    pub fn sines(&self) -> &[f32] {
        &self.sines
    }

    /// Whether `rows` rows of heads of `size` numbers can be turned.
    pub(super) fn check(&self, size: usize, rows: usize) -> Result<(), OperationError> {
        if size != 2 * self.pairs {
            return Err(OperationError::WrongRotation { size, expected: 2 * self.pairs });
        }
        OperationError::length("the rows' rotations", self.rows, rows)
    }

    /// Turns a head of row `row` in place: (a, b) becomes (a · cos − b · sin, b · cos + a · sin).
    #[inline(always)]
    pub(super) fn rotate(&self, row: usize, head: &mut [f32]) {
        let own = row * self.pairs..(row + 1) * self.pairs;
        let (first, second) = head.split_at_mut(self.pairs);
        let angles = self.cosines[own.clone()].iter().zip(&self.sines[own]);
        for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(angles) {
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }

    /// The gradient of what [`Self::rotate`] made of a head becomes that of the head, in place: the transposed turn.
    #[inline(always)]
    pub(super) fn rotate_adjoint(&self, row: usize, head: &mut [f32]) {
        let own = row * self.pairs..(row + 1) * self.pairs;
        let (first, second) = head.split_at_mut(self.pairs);
        let angles = self.cosines[own.clone()].iter().zip(&self.sines[own]);
        for ((a, b), (cosine, sine)) in first.iter_mut().zip(second).zip(angles) {
            (*a, *b) = (*a * cosine + *b * sine, *b * cosine - *a * sine);
        }
    }
}
