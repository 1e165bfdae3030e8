//! Which terms of W_i = W0 ∘ Σ_v in_v out_vᵀ a weight is made of.

use std::ops::Range;

use flora_plan::schedule::Scale;

/// A segment of a block: its rows, and its terms among those that were gathered.
#[derive(Clone, Debug)]
pub(crate) struct PackedSegment {
    /// Of the packed rows.
    pub(crate) rows: Range<usize>,
    pub(crate) terms: Terms,
}

/// offset + Σ_v in_v out_vᵀ over some of the terms that were gathered.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    /// Among the terms that were gathered.
    pub(crate) range: Range<usize>,
    /// The number of terms without scales.
    pub(crate) offset: f32,
}

impl Terms {
    /// Of virtual rows; their scaled terms follow the first `before` that are gathered.
    pub(crate) fn of(scales: impl Iterator<Item = Scale> + Clone, before: usize) -> Self {
        let count = scales.clone().filter(is_scaled).count();
        Self { range: before..before + count, offset: (scales.count() - count) as f32 }
    }

    pub(crate) fn end(&self) -> usize {
        self.range.end
    }
}

/// Whether a virtual row has vectors to gather; one without is a term of ones.
pub(crate) fn is_scaled(scale: &Scale) -> bool {
    scale.in_slot > 0 || scale.out_slot > 0
}
