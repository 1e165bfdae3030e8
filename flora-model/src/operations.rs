//! What a decoder computes, as a trait: by the host's engine, by the kernels of other devices, and in training recorded beside being
//! computed. In serving, numbers are buffers of the device, matrices in row-major order, so that projections
//! take them as they are.

use std::ops::Range;

use flora_host::decoder::{Heads, RotaryFrequencies};
use flora_plan::layer::Element;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Buffer, Device, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::form::{Finish, ProjectionForm};

/// The operations of one model on one device.
pub(crate) trait Operations: Sized + Send + Sync {
    /// A matrix that they read and make.
    type Matrix: Send + Sync;
    /// A projection and what follows it.
    type Linear: Linear;
    /// A norm with its parameters.
    type Norm: Send + Sync;
    /// What is kept of one sequence in one layer.
    type Cache: Send + Sync;
    /// What attention of all layers of a step shares.
    type Positions: Send + Sync;

    /// For a model with this attention, whose activations, keys and values are kept in `element`.
    fn new(device: &Device, attention: AttentionConfig, element: Element) -> Result<Self, ServeError>;

    /// x `[rows, d]`, the result `[rows, k]`, with a residual `[rows, k]` where the projection adds one.
    fn project(
        &self,
        linear: &Self::Linear,
        x: &Self::Matrix,
        batch: &StepBatch,
        residual: Option<&Self::Matrix>,
    ) -> Result<Self::Matrix, ServeError>;

    /// A norm of rows of as many numbers as gamma has.
    fn norm(&self, parameters: NormParameters) -> Result<Self::Norm, ServeError>;

    /// x `[rows, d]`, the result the same.
    fn normalise(&self, norm: &Self::Norm, x: &Self::Matrix) -> Result<Self::Matrix, ServeError>;

    /// one ∘ other
    fn multiply(&self, one: Self::Matrix, other: Self::Matrix) -> Result<Self::Matrix, ServeError>;

    /// Some rows of x `[of, d]`, in that order.
    fn select(&self, x: &Self::Matrix, of: usize, rows: &[usize]) -> Result<Self::Matrix, ServeError>;

    /// Prepares a step's attention.
    fn positions(&self, segments: &[SegmentRows]) -> Result<Self::Positions, ServeError>;

    /// Rotates queries and keys where the model does and attends: the result is `[rows, query heads · size]`. A row's numbers depend
    /// on its own sequence alone, and on no more of it than the last `window` tokens up to its own. In serving, keys and values are
    /// appended to the segments' caches; in training there are none, because segments are whole.
    fn attend(
        &self,
        inputs: AttentionInputs<Self::Matrix>,
        window: Option<usize>,
        segments: &[SegmentRows],
        positions: &Self::Positions,
        caches: &mut [&mut Self::Cache],
    ) -> Result<Self::Matrix, ServeError>;

    /// Both results, computed at the same time where that gets further.
    fn both<X: Send, Y: Send>(one: impl FnOnce() -> X + Send, other: impl FnOnce() -> Y + Send) -> (X, Y) {
        (one(), other())
    }
}

/// A projection of a decoder, and what follows it.
pub(crate) trait Linear: Sized + Send + Sync {
    /// Of the module at `path`.
    fn of(
        form: &ProjectionForm,
        path: &str,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        finish: Finish,
    ) -> Result<Self, ServeError>;

    /// The projection itself, with the adapters of its module.
    fn projection(&self) -> &PlannedProjection;
}

/// All of it in the projection's epilogue.
impl Linear for PlannedProjection {
    fn of(
        form: &ProjectionForm,
        _path: &str,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        finish: Finish,
    ) -> Result<Self, ServeError> {
        Ok(form.projection(weight, bias, finish)?)
    }

    fn projection(&self) -> &PlannedProjection {
        self
    }
}

/// What serving asks beside that.
pub(crate) trait Serving: Operations<Matrix = Buffer, Linear = PlannedProjection> {
    /// A cache without tokens of a layer.
    ///
    /// # Errors
    /// The device has no room.
    fn cache(&self, layer: usize) -> Result<Self::Cache, ServeError>;

    /// Bytes that a token takes in a cache.
    fn cache_bytes_per_token(&self) -> u64;

    /// Keys and values of some tokens in one layer, which several caches may have.
    type Block: Clone + Send + Sync;

    /// Tokens of such a block.
    const BLOCK_TOKENS: u32;

    /// The blocks of tokens at these positions; the first is the first of a block.
    fn blocks(cache: &Self::Cache, positions: Range<usize>) -> Vec<Self::Block>;

    /// Gives a cache these blocks, which hold the same, in place of its own from the token `first` on.
    fn replace(cache: &mut Self::Cache, first: usize, blocks: &[Self::Block]);

    /// A cache of a layer that begins with the first `tokens` tokens of its blocks.
    ///
    /// # Errors
    /// The device has no room.
    fn beginning(&self, layer: usize, blocks: &[Self::Block], tokens: usize) -> Result<Self::Cache, ServeError>;

    /// Runs a whole step where its operations are best started from.
    fn run<R: Send>(step: impl FnOnce() -> R + Send) -> R {
        step()
    }
}

/// How a model attends.
#[derive(Clone, Debug)]
pub(crate) struct AttentionConfig {
    pub(crate) heads: Heads,
    /// `None` where positions are in the embedding.
    pub(crate) rotary: Option<RotaryFrequencies>,
    /// Tokens that all sequences have at most, as far as is known.
    pub(crate) cache_tokens: usize,
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
pub(crate) enum AttentionInputs<M> {
    /// `[rows, its heads · size]` each.
    Separate { queries: M, keys: M, values: M },
    /// A row has its queries, then its keys, then its values.
    Joined(M),
}

impl<M> AttentionInputs<M> {
    /// The same of something else that each has.
    pub(crate) fn map<N>(&self, of: impl Fn(&M) -> N) -> AttentionInputs<N> {
        match self {
            Self::Separate { queries, keys, values } => {
                AttentionInputs::Separate { queries: of(queries), keys: of(keys), values: of(values) }
            }
            Self::Joined(joined) => AttentionInputs::Joined(of(joined)),
        }
    }

    /// Whether something is so of one of them.
    pub(crate) fn any(&self, is: impl Fn(&M) -> bool) -> bool {
        match self {
            Self::Separate { queries, keys, values } => is(queries) || is(keys) || is(values),
            Self::Joined(joined) => is(joined),
        }
    }
}

/// The rows of one segment.
#[derive(Clone, Debug)]
pub(crate) struct SegmentRows {
    /// Its rows in the batch; those of all segments follow one another.
    pub(crate) rows: Range<usize>,
    /// The position of the first.
    pub(crate) first_position: usize,
}

impl SegmentRows {
    /// The positions of its rows.
    pub(crate) fn positions(&self) -> Range<usize> {
        self.first_position..self.first_position + self.rows.len()
    }
}
