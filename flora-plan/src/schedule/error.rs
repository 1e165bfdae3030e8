//! What keeps a batch from being scheduled.

/// Why a batch can't be scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// A segment names an adapter that the table lacks.
    #[error(
        "segment {segment} names adapter {adapter}, but the batch has {adapters}; load it or send the segment to the base"
    )]
    UnknownAdapter {
        /// Position of the segment.
        segment: usize,
        /// What it names.
        adapter: u32,
        /// Length of the table.
        adapters: usize,
    },
    /// An adapter that leaves its rows unwritten.
    #[error(
        "adapter {adapter} has no virtual row, so that nothing would write its rows; give it one with a zero out-scale"
    )]
    NoVirtualRow {
        /// Position in the table.
        adapter: usize,
    },
    /// A merged weight serves its own adapter alone.
    #[error(
        "`merged` serves one adapter and the batch names {adapters}; use another lowering, or send the others apart"
    )]
    NotOneAdapter {
        /// Distinct adapters of the batch.
        adapters: u64,
    },
    /// An index would not fit.
    #[error("{what} would have {elements} elements, and kernels index 2^31; split the batch")]
    TooLarge {
        /// Which buffer.
        what: &'static str,
        /// Its size.
        elements: u64,
    },
}
