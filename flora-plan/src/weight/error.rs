//! What keeps a weight from being packed.

use crate::layer::WeightFormat;

/// Why a weight can't be packed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightError {
    /// Another number of values or bytes than the shape has.
    #[error("a weight [{d}, {k}] in {format} takes {expected} {unit}, and there are {found}")]
    WrongSize {
        /// Inputs.
        d: u32,
        /// Outputs.
        k: u32,
        /// The format.
        format: WeightFormat,
        /// What it should have.
        expected: u64,
        /// What it has.
        found: u64,
        /// "numbers" or "blocks".
        unit: &'static str,
    },
    /// No inputs or no outputs.
    #[error("a weight [{d}, {k}] has no numbers; leave the layer out, or give both extents")]
    NoExtent {
        /// Inputs.
        d: u32,
        /// Outputs.
        k: u32,
    },
    /// A number of inputs that leaves a block incomplete.
    #[error("{format} keeps blocks of {block} inputs and the weight has {d}; keep it in f16, or in int8")]
    PartialBlock {
        /// The format.
        format: WeightFormat,
        /// Inputs of a block.
        block: u32,
        /// Inputs of the weight.
        d: u32,
    },
    /// No weight has such a value, and it would spread to every output.
    #[error("the weight holds {value} at input {input} of output {output}; the file is damaged")]
    NotFinite {
        /// The value.
        value: f32,
        /// Which input.
        input: usize,
        /// Which output.
        output: usize,
    },
    /// A block that a format doesn't have.
    #[error(
        "the block at input {input} of output {output} is none of {format}: another number of inputs or scales, or one that is too large"
    )]
    OtherBlock {
        /// The format.
        format: WeightFormat,
        /// The block's first input.
        input: usize,
        /// Which output.
        output: usize,
    },
    /// A finite value that the format can't hold.
    #[error("the weight holds {value} at input {input} of output {output}, too large for {format}; keep it in f32")]
    TooLarge {
        /// The format.
        format: WeightFormat,
        /// The value.
        value: f32,
        /// Which input.
        input: usize,
        /// Which output.
        output: usize,
    },
    /// The format has no blocks to read.
    #[error("{0} is not a block format; it is packed from f32")]
    NoBlocks(WeightFormat),
}
