//! Scratch memory that outlives a call. Buffers grow to what the largest call needed and are then used again, so that a call
//! allocates nothing once the engine is warm.

use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};
use flora_plan::schedule::{LowRankRows, VirtualRow};

use crate::low_rank::Shrink;

/// A cache line: vectors that are loaded from a buffer never straddle two.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// A buffer of floats on a cache line.
#[derive(Default)]
pub(crate) struct Buffer(Vec<Line>);

impl Buffer {
    /// The first `len` floats, with whatever the last use left in them.
    pub(crate) fn floats(&mut self, len: usize) -> &mut [f32] {
        let lines = len.div_ceil(16);
        if self.0.len() < lines {
            self.0.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }
}

/// What one thread computes a panel with.
#[derive(Default)]
pub(crate) struct Scratch {
    /// A slice of W0's panel, strip by strip.
    pub(crate) panel: Buffer,
    /// A strip of W_i.
    pub(crate) composed: Buffer,
    /// Packed rows of x.
    pub(crate) x: Buffer,
    /// In-vectors of a segment.
    pub(crate) inner: Buffer,
    /// Out-vectors of a segment, or expand vectors, strip by strip.
    pub(crate) outer: Buffer,
    /// Out-scales of a tile.
    pub(crate) scales: Buffer,
    /// The outputs of a block of rows.
    pub(crate) sums: Buffer,
    /// The products of a tile with a weight that is read where it lies.
    pub(crate) products: Buffer,
    /// A row of the panel on its way.
    pub(crate) row: Buffer,
}

/// What one call needs beside its threads' scratch.
#[derive(Default)]
pub(crate) struct CallMemory {
    /// Outputs that later steps add to, where y itself is too narrow for sums.
    pub(crate) stage: Buffer,
    pub(crate) lent: Lent,
}

/// What the steps of a call use one after the other.
#[derive(Default)]
pub(crate) struct Lent {
    /// The shrunk rows of every low-rank sum.
    pub(crate) hidden: Buffer,
    /// A materialised W_i.
    pub(crate) weight: Buffer,
    /// Row tiles to shrink.
    pub(crate) shrinks: Vec<Shrink>,
    /// Rows of a pass that the schedule doesn't list.
    pub(crate) rows: Vec<VirtualRow>,
    /// Low-rank sums that the schedule lists in another form.
    pub(crate) runs: Vec<LowRankRows>,
}

/// Memory that is lent and comes back.
pub(crate) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

impl<T: Default> Pool<T> {
    /// Lends one to `work`. Nothing is locked meanwhile.
    pub(crate) fn lend<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let idle = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut lent = idle.unwrap_or_default();
        let result = work(&mut lent);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(lent);
        result
    }
}
