//! Why a call with attached adapters can't be answered.

/// A mistake in what was passed. Nothing has been written then.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachedError {
    /// A layer that computes nothing.
    #[error(
        "a layer with {inputs} inputs and parts of {parts:?} outputs can't have adapters; give at least one of each"
    )]
    EmptyLayer {
        /// Its inputs.
        inputs: usize,
        /// Its parts' outputs.
        parts: Vec<usize>,
    },
    /// A table that is too large.
    #[error("{slots} slots are more than the {most} that a layer may have")]
    TooManySlots {
        /// What was asked for.
        slots: u32,
        /// The most.
        most: u32,
    },
    /// A slot beyond the table.
    #[error("there is no slot {slot}; the layer has {slots}, counted from 0")]
    NoSlot {
        /// What was asked for.
        slot: usize,
        /// How many there are.
        slots: usize,
    },
    /// A part that the layer doesn't have.
    #[error("there is no part {part}; the layer has {parts}, counted from 0")]
    NoPart {
        /// What was asked for.
        part: usize,
        /// How many there are.
        parts: usize,
    },
    /// A row with a slot beyond the table.
    #[error("row {row} asks for slot {slot}, and the layer has {slots}, counted from 0; -1 is the base")]
    RowSlot {
        /// The row.
        row: usize,
        /// What it asks for.
        slot: i64,
        /// How many there are.
        slots: usize,
    },
    /// A vector of another length than the layer's.
    #[error("the {what} of an adapter has {found} numbers, and the layer takes {expected}")]
    WrongVector {
        /// Which vector.
        what: &'static str,
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// An adapter that does more than scale and add low-rank sums.
    #[error(
        "the adapter multiplies rows by sparse matrices, which can't be done around a product that somebody else computes"
    )]
    Sparse,
    /// Memory that doesn't hold the rows that it is said to hold.
    #[error("{what} has room for {found} numbers, and {rows} rows of {width} numbers, {pitch} apart, take {expected}")]
    WrongMemory {
        /// Which matrix.
        what: &'static str,
        /// Its rows.
        rows: usize,
        /// Numbers of a row.
        width: usize,
        /// Numbers from one row to the next.
        pitch: usize,
        /// What it should have at least.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// Another number of products than the batch has groups.
    #[error("the batch has {expected} groups of parts and came with the products of {found}")]
    WrongGroups {
        /// What it should have.
        expected: usize,
        /// What it has.
        found: usize,
    },
    /// Rows that are scaled, where only sums can be added.
    #[error(
        "row {row} scales its inputs or outputs, so that its product with the base can't be added to; use expand and combine"
    )]
    Scaled {
        /// The row.
        row: usize,
    },
}
