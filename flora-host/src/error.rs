//! Why a schedule can't be run.

/// A mistake in what was passed. Nothing has been written then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// An operand of another length than the shape has.
    #[error("{what} has {found} numbers and takes {expected}")]
    WrongLength {
        /// Which operand.
        what: &'static str,
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// Rows that lie over one another.
    #[error("the rows of {what} begin {pitch} numbers apart and have {width}")]
    Overlap {
        /// Which operand.
        what: &'static str,
        /// From one row to the next.
        pitch: usize,
        /// Numbers of a row.
        width: usize,
    },
    /// A pool that isn't whole vectors.
    #[error("{what} has {found} numbers, which are not whole vectors of {width}")]
    PartialVector {
        /// Which pool.
        what: &'static str,
        /// Numbers of a vector.
        width: usize,
        /// What it has.
        found: usize,
    },
    /// A schedule that is too large for the layer's shape.
    #[error(transparent)]
    Schedule(#[from] flora_plan::schedule::ScheduleError),
    /// A merged weight of another shape than the base weight.
    #[error("{what} is [{found_d}, {found_k}] and the base weight is [{d}, {k}]")]
    WrongShape {
        /// Which weight.
        what: &'static str,
        /// Inputs that it should have.
        d: u32,
        /// Outputs that it should have.
        k: u32,
        /// Inputs that it has.
        found_d: u32,
        /// Outputs that it has.
        found_k: u32,
    },
    /// An operand that the schedule or the epilogue asks for.
    #[error("the layer needs {what}, and none was passed")]
    Missing {
        /// Which operand.
        what: &'static str,
    },
    /// A schedule that points beyond an operand.
    #[error(
        "the schedule names {what} {index} and there are {count}; load the adapters before the batch that uses them"
    )]
    OutOfRange {
        /// What it points to.
        what: &'static str,
        /// Where.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// Rows or slots that don't rise, or are given twice.
    #[error("the schedule's {what} don't rise at {row}")]
    NotRising {
        /// Which list.
        what: &'static str,
        /// Where.
        row: u32,
    },
    /// A weight that adapters make, with a number that no weight has.
    #[error("an adapter's own weight can't be kept: {0}; its vectors are damaged, or too large for f32")]
    NotAWeight(flora_plan::weight::WeightError),
}
