//! Scratch memory that outlives a call. Buffers grow to what the largest call needed and are then used again, so that a call
//! allocates nothing once the engine is warm.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use bytemuck::{Pod, Zeroable};
use flora_plan::schedule::{LowRankRows, VirtualRow};

use crate::factors::PackedSegment;
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
        self.numbers_mut(len)
    }

    /// The first `len` numbers, likewise.
    pub(crate) fn numbers_mut<T: Pod>(&mut self, len: usize) -> &mut [T] {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        if self.0.len() < lines {
            self.0.reserve_exact(lines - self.0.len());
            prefer_large_pages(&self.0);
            self.0.resize(lines, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// All there are.
    pub(crate) fn numbers<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Asks for large pages where they pay: a weight is read through thousands of small ones, each of which has to be looked up. What
/// the system makes of it changes no number.
fn prefer_large_pages(lines: &Vec<Line>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        const WORTHWHILE: usize = 4 << 20;
        let (first, bytes) = (lines.as_ptr() as usize, lines.capacity() * size_of::<Line>());
        let (start, end) = (first.next_multiple_of(PAGE), (first + bytes) / PAGE * PAGE);
        if bytes >= WORTHWHILE {
            // SAFETY: whole pages within the vector's memory, whose contents the advice leaves alone.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = lines;
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", size_of_val(self.0.as_slice()))
    }
}

/// What one thread computes a panel with.
#[derive(Default)]
pub(crate) struct Scratch {
    /// A part of a strip of W0, decoded.
    pub(crate) decoded: Buffer,
    /// A part of a strip of W_i.
    pub(crate) composed: Buffer,
    /// Packed rows of x.
    pub(crate) x: Buffer,
    /// In-vectors of segments.
    pub(crate) inner: Buffer,
    /// Out-vectors of segments, or expand vectors, strip by strip.
    pub(crate) outer: Buffer,
    /// Out-scales of rows that can't be read where they lie.
    pub(crate) scales: Buffer,
    /// The outputs of a block of rows.
    pub(crate) sums: Buffer,
    /// Products with a part of a strip.
    pub(crate) products: Buffer,
    /// A row of the panel on its way.
    pub(crate) row: Buffer,
    /// Where each packed row's sums begin.
    pub(crate) places: Vec<usize>,
    /// Where each packed row's out-scales begin.
    pub(crate) scale_places: Vec<usize>,
    /// The segments of a block.
    pub(crate) segments: Vec<PackedSegment>,
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
