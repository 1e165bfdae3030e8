//! Which rows of a batch belong to which adapter.

use serde::{Deserialize, Serialize};

/// A run of rows that share one adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchSegment {
    /// The adapter's name, or `None` for the base weight alone.
    pub adapter: Option<String>,
    /// How many rows.
    pub rows: u32,
}

/// Segments in the order of the rows. Several segments may name one adapter; a segment may be empty, and so may the batch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Batch {
    segments: Vec<BatchSegment>,
}

/// The rows of a batch can't be what they are said to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// More rows than kernels index.
    #[error("the batch's segments add up to {0} rows and kernels index 2^32; split it")]
    TooLarge(u64),
    /// A name that no adapter has.
    #[error("segment {segment} names the adapter `{name}`, which isn't loaded; there are: {known}")]
    UnknownAdapter {
        /// Position of the segment.
        segment: usize,
        /// What it names.
        name: String,
        /// What there is, shortened.
        known: String,
    },
    /// The input has another number of rows.
    #[error("the batch has {rows} rows of {d} inputs, {expected} numbers, but {found} were passed")]
    WrongInput {
        /// Rows of the batch.
        rows: usize,
        /// Inputs of the layer.
        d: usize,
        /// rows · d
        expected: usize,
        /// What was passed.
        found: usize,
    },
}

impl Batch {
    /// Segments as (adapter or `None` for the base, rows).
    pub fn new<'a>(segments: impl IntoIterator<Item = (Option<&'a str>, u32)>) -> Self {
        let segment = |(adapter, rows): (Option<&str>, u32)| BatchSegment { adapter: adapter.map(str::to_owned), rows };
        Self { segments: segments.into_iter().map(segment).collect() }
    }

    /// The segments.
    pub fn segments(&self) -> &[BatchSegment] {
        &self.segments
    }

    /// Rows of all segments.
    ///
    /// # Errors
    /// More than kernels can index.
    pub fn rows(&self) -> Result<u32, BatchError> {
        let rows = self.segments.iter().map(|segment| u64::from(segment.rows)).sum();
        u32::try_from(rows).map_err(|_| BatchError::TooLarge(rows))
    }
}
