//! One layer of a decoder, as data: families differ in which norms, which projections and which feed-forward network a block has and
//! how far it sees, and a further one is another way to fill the same fields.

use flora_runtime::{Buffer, PlannedProjection, StepBatch};

use crate::error::ServeError;
use crate::operations::{AttentionInputs, Operations, SegmentRows};

/// x + attention(norm(x)), then + feed-forward(norm(·)).
pub(crate) struct Block<O: Operations> {
    pub(crate) attention_norm: O::Norm,
    pub(crate) inputs: InputProjections<O>,
    /// How many tokens a token attends to, itself and those before it; `None`: all.
    pub(crate) window: Option<usize>,
    /// Adds the residual in its epilogue.
    pub(crate) attention_output: PlannedProjection,
    pub(crate) feed_forward_norm: O::Norm,
    pub(crate) feed_forward: FeedForward,
}

/// What makes queries, keys and values.
pub(crate) enum InputProjections<O: Operations> {
    /// A projection for each.
    Separate {
        queries: PlannedProjection,
        keys: PlannedProjection,
        values: PlannedProjection,
        /// Of every head of queries, and of every head of keys.
        norms: Option<[O::Norm; 2]>,
    },
    /// One projection, whose output is the queries, then the keys, then the values.
    Joined(PlannedProjection),
}

/// Both add the residual in their last projection's epilogue; activations are in the epilogue of the first.
pub(crate) enum FeedForward {
    /// down(activated gate(x) ∘ up(x))
    Gated { gate: PlannedProjection, up: PlannedProjection, down: PlannedProjection },
    /// down(activated up(x))
    Plain { up: PlannedProjection, down: PlannedProjection },
}

/// What every block of one step sees.
pub(crate) struct Step<'a, O: Operations> {
    pub(crate) operations: &'a O,
    pub(crate) batch: &'a StepBatch,
    pub(crate) segments: &'a [SegmentRows],
    pub(crate) positions: O::Positions,
}

impl<O: Operations> Block<O> {
    /// x `[rows, d]`, the result the same.
    pub(crate) fn forward(
        &self,
        x: &Buffer,
        step: &Step<'_, O>,
        caches: &mut [&mut O::Cache],
    ) -> Result<Buffer, ServeError> {
        let Step { operations, batch, segments, positions } = step;
        let normed = operations.normalise(&self.attention_norm, x)?;
        let inputs = self.inputs.forward(*operations, &normed, batch)?;
        let attended = operations.attend(&inputs, self.window, segments, positions, caches)?;
        let x = self.attention_output.forward(&attended, batch, Some(x))?;
        let normed = operations.normalise(&self.feed_forward_norm, &x)?;
        self.feed_forward.forward(*operations, &normed, &x, batch)
    }
}

impl<O: Operations> InputProjections<O> {
    fn forward(&self, operations: &O, x: &Buffer, batch: &StepBatch) -> Result<AttentionInputs, ServeError> {
        Ok(match self {
            Self::Separate { queries, keys, values, norms } => {
                let of = |projection: &PlannedProjection| projection.forward(x, batch, None);
                let (queries, (keys, values)) = O::both(|| of(queries), || O::both(|| of(keys), || of(values)));
                let (mut queries, mut keys) = (queries?, keys?);
                if let Some([of_queries, of_keys]) = norms {
                    // A norm takes rows of as many numbers as it has: those of a head.
                    queries = operations.normalise(of_queries, &queries)?;
                    keys = operations.normalise(of_keys, &keys)?;
                }
                AttentionInputs::Separate { queries, keys, values: values? }
            }
            Self::Joined(joined) => AttentionInputs::Joined(joined.forward(x, batch, None)?),
        })
    }
}

impl FeedForward {
    fn forward<O: Operations>(
        &self,
        operations: &O,
        x: &Buffer,
        residual: &Buffer,
        batch: &StepBatch,
    ) -> Result<Buffer, ServeError> {
        let (inner, down) = match self {
            Self::Gated { gate, up, down } => {
                let (gate, up) = O::both(|| gate.forward(x, batch, None), || up.forward(x, batch, None));
                (operations.multiply(gate?, up?)?, down)
            }
            Self::Plain { up, down } => (up.forward(x, batch, None)?, down),
        };
        Ok(down.forward(&inner, batch, Some(residual))?)
    }
}
