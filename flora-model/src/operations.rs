//! What a decoder computes beside its projections, as a trait: natively on the host, and through Burn on the devices that it has
//! backends for. Numbers are buffers of the device, matrices in row-major order, so that projections take them as they are.

use std::ops::Range;

use flora_host::decoder::{Heads, RotaryFrequencies};
use flora_plan::layer::Element;
use flora_runtime::{Buffer, Device};

use crate::error::ServeError;

/// The operations of one model on one device.
pub(crate) trait Operations: Sized + Send + Sync {
    /// A norm with its parameters.
    type Norm: Send + Sync;
    /// Keys and values of one sequence in one layer.
    type Cache: Send + Sync;
    /// What attention of all layers of a step shares.
    type Positions: Send + Sync;

    /// For a model with this attention, whose activations, keys and values are kept in `element`.
    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError>;

    /// A norm of rows of as many numbers as gamma has.
    fn norm(&self, parameters: NormParameters) -> Result<Self::Norm, ServeError>;

    /// x `[rows, d]`, the result the same.
    fn normalise(&self, norm: &Self::Norm, x: &Buffer) -> Result<Buffer, ServeError>;

    /// one ∘ other
    fn multiply(&self, one: Buffer, other: Buffer) -> Result<Buffer, ServeError>;

    /// Some rows of x `[of, d]`, in that order.
    fn select(&self, x: &Buffer, of: usize, rows: &[usize]) -> Result<Buffer, ServeError>;

    /// A cache without tokens.
    fn cache(&self) -> Self::Cache;

    /// Bytes that a token takes in a cache.
    fn cache_bytes_per_token(&self) -> u64;

    /// Prepares a step's attention.
    fn positions(&self, segments: &[SegmentRows]) -> Result<Self::Positions, ServeError>;

    /// Rotates queries and keys where the model does, appends keys and values to the segments' caches, and attends: the result is
    /// `[rows, query heads · size]`. A row's numbers depend on its own sequence alone, and on no more of it than the last `window`
    /// tokens up to its own.
    fn attend(
        &self,
        inputs: &AttentionInputs,
        window: Option<usize>,
        segments: &[SegmentRows],
        positions: &Self::Positions,
        caches: &mut [&mut Self::Cache],
    ) -> Result<Buffer, ServeError>;

    /// Runs a whole step where its operations are best started from.
    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        step()
    }

    /// Both results, computed at the same time where that gets further.
    fn both<X: Send, Y: Send>(one: impl FnOnce() -> X + Send, other: impl FnOnce() -> Y + Send) -> (X, Y) {
        (one(), other())
    }
}

/// How a model attends.
#[derive(Clone, Debug)]
pub(crate) struct AttentionConfig {
    pub(crate) heads: Heads,
    /// `None` where positions are in the embedding.
    pub(crate) rotary: Option<RotaryFrequencies>,
    /// Tokens by which caches grow, where they are moved as they do.
    #[cfg_attr(not(feature = "burn"), expect(dead_code, reason = "the host's caches don't move"))]
    pub(crate) block_tokens: usize,
}

/// A norm's numbers, `[d]` each.
#[derive(Clone, Debug)]
pub(crate) struct NormParameters {
    pub(crate) gamma: Vec<f32>,
    /// `None`: the root of the mean square, without an offset.
    pub(crate) beta: Option<Vec<f32>>,
    pub(crate) epsilon: f32,
}

/// Queries, keys and values of a step's rows.
pub(crate) enum AttentionInputs {
    /// `[rows, its heads · size]` each.
    Separate { queries: Buffer, keys: Buffer, values: Buffer },
    /// A row has its queries, then its keys, then its values.
    Joined(Buffer),
}

/// The rows of one segment.
#[derive(Clone, Debug)]
pub(crate) struct SegmentRows {
    /// Its rows in the batch; those of all segments follow one another.
    pub(crate) rows: Range<usize>,
    /// The position of the first.
    pub(crate) first_position: usize,
    /// How many of them are a prompt's. Where rows attend together, those do; each of the others attends by itself, as it did or
    /// will when it is the last token of its sequence.
    #[cfg_attr(
        not(feature = "burn"),
        expect(dead_code, reason = "a row's bits are the same on the host whatever it attends with")
    )]
    pub(crate) prompt_rows: usize,
}

impl SegmentRows {
    /// The positions of its rows.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first_position..self.first_position + self.rows.len()
    }
}
