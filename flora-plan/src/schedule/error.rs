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
    /// A layer has one resident weight, which is one adapter's.
    #[error(
        "the weights of the adapters {first} and {second} are both said to be resident, and a layer keeps one; say it of one alone"
    )]
    NotOneAdapter {
        /// Position in the table.
        first: u32,
        /// Position in the table.
        second: u32,
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
