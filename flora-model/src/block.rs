//! One layer of a decoder, as data: families differ in which norms, which projections and which feed-forward network a block has and
//! how far it sees, and a further one is another way to fill the same fields.

use flora_engine::phases::{ATTENTION, GATES, NORMS, PROJECTIONS};
use flora_runtime::StepBatch;
use tracing::trace_span;

use crate::error::ServeError;
use crate::operations::{AttentionInputs, Operations, SegmentRows};

/// x + attention(norm(x)), then + feed-forward(norm(·)).
pub(crate) struct Block<O: Operations> {
    pub(crate) attention_norm: O::Norm,
    pub(crate) inputs: InputProjections<O>,
    /// How many tokens a token attends to, itself and those before it; `None`: all.
    pub(crate) window: Option<usize>,
    /// Adds the residual in its epilogue.
    pub(crate) attention_output: O::Linear,
    pub(crate) feed_forward_norm: O::Norm,
    pub(crate) feed_forward: FeedForward<O>,
}

/// What makes queries, keys and values.
pub(crate) enum InputProjections<O: Operations> {
    /// A projection for each.
    Separate {
        queries: O::Linear,
        keys: O::Linear,
        values: O::Linear,
        /// Of every head of queries, and of every head of keys.
        norms: Option<[O::Norm; 2]>,
    },
    /// One projection, whose output is the queries, then the keys, then the values.
    Joined(O::Linear),
}

/// Both add the residual in their last projection's epilogue; activations follow the first.
pub(crate) enum FeedForward<O: Operations> {
    /// down(activated gate(x) ∘ up(x))
    Gated { gate: O::Linear, up: O::Linear, down: O::Linear },
    /// down(activated up(x))
    Plain { up: O::Linear, down: O::Linear },
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
        x: &O::Matrix,
        step: &Step<'_, O>,
        caches: &mut [&mut O::Cache],
    ) -> Result<O::Matrix, ServeError> {
        let attended = self.attended(x, step, caches)?;
        self.finish(step.operations, x, &attended, step.batch)
    }

    /// What its heads attend to, `[rows, query heads · size]`; the keys and values of x are in the caches then.
    pub(crate) fn attended(
        &self,
        x: &O::Matrix,
        step: &Step<'_, O>,
        caches: &mut [&mut O::Cache],
    ) -> Result<O::Matrix, ServeError> {
        let Step { operations, batch, segments, positions } = step;
        let normed = trace_span!(NORMS).in_scope(|| operations.normalise(&self.attention_norm, x))?;
        let inputs = trace_span!(PROJECTIONS).in_scope(|| self.inputs.forward(operations, &normed, batch))?;
        let attend = || operations.attend(inputs, self.window, segments, positions, caches);
        trace_span!(ATTENTION).in_scope(attend)
    }

    /// The block's result for rows of x and what they attended to, which need not be all.
    pub(crate) fn finish(
        &self,
        operations: &O,
        x: &O::Matrix,
        attended: &O::Matrix,
        batch: &StepBatch,
    ) -> Result<O::Matrix, ServeError> {
        let output = || operations.project(&self.attention_output, attended, batch, Some(x));
        let x = trace_span!(PROJECTIONS).in_scope(output)?;
        let normed = trace_span!(NORMS).in_scope(|| operations.normalise(&self.feed_forward_norm, &x))?;
        self.feed_forward.forward(operations, &normed, &x, batch)
    }
}

impl<O: Operations> InputProjections<O> {
    fn forward(
        &self,
        operations: &O,
        x: &O::Matrix,
        batch: &StepBatch,
    ) -> Result<AttentionInputs<O::Matrix>, ServeError> {
        Ok(match self {
            Self::Separate { queries, keys, values, norms } => {
                let of = |linear: &O::Linear| operations.project(linear, x, batch, None);
                let (queries, (keys, values)) = O::both(|| of(queries), || O::both(|| of(keys), || of(values)));
                let (mut queries, mut keys) = (queries?, keys?);
                if let Some([of_queries, of_keys]) = norms {
                    // A norm takes rows of as many numbers as it has: those of a head.
                    queries = operations.normalise(of_queries, &queries)?;
                    keys = operations.normalise(of_keys, &keys)?;
                }
                AttentionInputs::Separate { queries, keys, values: values? }
            }
            Self::Joined(joined) => AttentionInputs::Joined(operations.project(joined, x, batch, None)?),
        })
    }
}

impl<O: Operations> FeedForward<O> {
    fn forward(
        &self,
        operations: &O,
        x: &O::Matrix,
        residual: &O::Matrix,
        batch: &StepBatch,
    ) -> Result<O::Matrix, ServeError> {
        let of = |linear: &O::Linear| operations.project(linear, x, batch, None);
        let (inner, down) = match self {
            Self::Gated { gate, up, down } => {
                let (gate, up) = trace_span!(PROJECTIONS).in_scope(|| O::both(|| of(gate), || of(up)));
                let (gate, up) = (gate?, up?);
                (trace_span!(GATES).in_scope(|| operations.multiply(gate, up))?, down)
            }
            Self::Plain { up, down } => (trace_span!(PROJECTIONS).in_scope(|| of(up))?, down),
        };
        trace_span!(PROJECTIONS).in_scope(|| operations.project(down, &inner, batch, Some(residual)))
    }
}
