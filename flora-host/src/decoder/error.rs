//! Why an operation can't be done.

use flora_plan::layer::Element;

/// A mistake in what was passed. Nothing has been written then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OperationError {
    /// An operand of another length.
    #[error("{what} has {found} numbers and takes {expected}")]
    WrongLength {
        /// Which operand.
        what: &'static str,
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// An operand that isn't whole rows.
    #[error("{found} numbers aren't whole rows of {width}")]
    PartialRow {
        /// Numbers of a row.
        width: usize,
        /// What there are.
        found: usize,
    },
    /// Columns that a matrix doesn't have.
    #[error("the columns up to {end} of a matrix with {width} were asked for")]
    NoColumn {
        /// One past the last.
        end: usize,
        /// What there are.
        width: usize,
    },
    /// Another type than the cache has.
    #[error(
        "keys and values are {found}, and their cache is kept in {expected}; make it in the type of the activations"
    )]
    WrongElement {
        /// The cache's.
        expected: Element,
        /// The keys' or the values'.
        found: Element,
    },
    /// Heads that attention can't be computed with, or another cache's.
    #[error(
        "attention of {queries} query heads over {keys} key-value heads of {size} numbers, with a cache for {cached_keys} of \
         {cached_size}; query heads are a multiple of key-value heads, and the cache has the same of these"
    )]
    WrongHeads {
        /// Query heads.
        queries: usize,
        /// Key-value heads.
        keys: usize,
        /// Numbers of a head.
        size: usize,
        /// Key-value heads of the cache.
        cached_keys: usize,
        /// Numbers of one of them.
        cached_size: usize,
    },
    /// Segments that leave out rows, or share them.
    #[error("a segment begins at row {found} where row {expected} is next")]
    WrongSegment {
        /// The first row that no segment has.
        expected: usize,
        /// Where it begins, or how many rows there are.
        found: usize,
    },
    /// A target that there is no logit of.
    #[error("the target {target} of a vocabulary of {vocabulary}")]
    NoTarget {
        /// The target.
        target: u32,
        /// Logits of a row.
        vocabulary: usize,
    },
    /// A window that no key is in.
    #[error("a window of 0 tokens was asked for; a token sees itself at least")]
    EmptyWindow,
    /// Heads that pairs of numbers can't be rotated in.
    #[error("heads of {size} numbers can't be turned by rotations for heads of {expected}")]
    WrongRotation {
        /// Numbers of a head.
        size: usize,
        /// What the rotations are for.
        expected: usize,
    },
}

impl OperationError {
    pub(super) fn length(what: &'static str, found: usize, expected: usize) -> Result<(), Self> {
        if found == expected { Ok(()) } else { Err(Self::WrongLength { what, expected, found }) }
    }
}
