//! What a thread computes with. All kernels of a thread share one, because what one of them left behind is of no use to the next.

use crate::buffer::Buffer;
use crate::terms::PackedSegment;

/// What one thread computes a panel with.
#[derive(Default)]
pub(crate) struct Scratch {
    /// A part of a strip of W0, decoded.
    pub(crate) decoded: Buffer,
    /// A part of a strip of W_i.
    pub(crate) composed: Buffer,
    /// The same in pairs.
    pub(crate) pairs: Buffer,
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
