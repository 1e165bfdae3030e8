//! One layer of a decoder, as data: the two families differ in which norm, which projections and which feed-forward network a
//! block has, and a third would be another way to fill the same fields.

use burn::nn::{LayerNorm, RmsNorm};
use burn::tensor::Tensor;
use flora_burn::{AdaptedLinear, FloraBackend, LinearError, StepBatch};

use crate::attention::{Heads, SegmentRows, attend};
use crate::cache::LayerCache;
use crate::rotary::RotaryRows;

/// x + attention(norm(x)), then + feed-forward(norm(·)).
#[derive(Debug)]
pub(crate) struct Block<B: FloraBackend> {
    pub(crate) attention_norm: Norm<B>,
    pub(crate) inputs: AttentionInputs<B>,
    /// Adds the residual in its epilogue.
    pub(crate) attention_output: AdaptedLinear<B>,
    pub(crate) feed_forward_norm: Norm<B>,
    pub(crate) feed_forward: FeedForward<B>,
}

#[derive(Debug)]
pub(crate) enum Norm<B: FloraBackend> {
    Rms(RmsNorm<B>),
    Layer(LayerNorm<B>),
}

/// What makes queries, keys and values.
#[derive(Debug)]
pub(crate) enum AttentionInputs<B: FloraBackend> {
    /// A projection for each.
    Separate { queries: AdaptedLinear<B>, keys: AdaptedLinear<B>, values: AdaptedLinear<B> },
    /// One projection, whose output is the queries, then the keys, then the values.
    Joined(AdaptedLinear<B>),
}

/// Both add the residual in their last projection's epilogue; activations are in the epilogue of the first.
#[derive(Debug)]
pub(crate) enum FeedForward<B: FloraBackend> {
    /// down(activated gate(x) ∘ up(x))
    Gated { gate: AdaptedLinear<B>, up: AdaptedLinear<B>, down: AdaptedLinear<B> },
    /// down(activated up(x))
    Plain { up: AdaptedLinear<B>, down: AdaptedLinear<B> },
}

/// What every block of one step sees.
pub(crate) struct Step<'a, B: FloraBackend> {
    pub(crate) batch: &'a StepBatch,
    pub(crate) segments: &'a [SegmentRows],
    /// `None` where positions are in the embedding.
    pub(crate) rotary: Option<RotaryRows<B>>,
    pub(crate) heads: Heads,
    pub(crate) block_tokens: usize,
}

impl<B: FloraBackend> Norm<B> {
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Rms(norm) => norm.forward(x),
            Self::Layer(norm) => norm.forward(x),
        }
    }
}

impl<B: FloraBackend> Block<B> {
    /// x `[rows, d]`, the result the same.
    pub(crate) fn forward(
        &self,
        x: Tensor<B, 2>,
        step: &Step<'_, B>,
        caches: &mut [&mut LayerCache<B>],
    ) -> Result<Tensor<B, 2>, LinearError> {
        let [queries, keys, values] = self.inputs.forward(self.attention_norm.forward(x.clone()), step)?;
        let (queries, keys) = match &step.rotary {
            Some(rotary) => rotary.rotate(queries, keys),
            None => (queries, keys),
        };
        let attended = attend(step.heads, [queries, keys, values], step.segments, caches, step.block_tokens);
        let x = self.attention_output.forward(attended, step.batch, Some(x))?;
        self.feed_forward.forward(self.feed_forward_norm.forward(x.clone()), x, step.batch)
    }
}

impl<B: FloraBackend> AttentionInputs<B> {
    /// Queries, keys and values, each `[rows, its heads, size]`.
    fn forward(&self, x: Tensor<B, 2>, step: &Step<'_, B>) -> Result<[Tensor<B, 3>; 3], LinearError> {
        let Heads { queries: query_heads, keys: key_heads, size } = step.heads;
        let rows = step.batch.rows();
        Ok(match self {
            Self::Separate { queries, keys, values } => {
                let of = |linear: &AdaptedLinear<B>, heads: usize| -> Result<Tensor<B, 3>, LinearError> {
                    Ok(linear.forward(x.clone(), step.batch, None)?.reshape([rows, heads, size]))
                };
                let keys_and_values = || both::<B, _, _>(|| of(keys, key_heads), || of(values, key_heads));
                let (queries, (keys, values)) = both::<B, _, _>(|| of(queries, query_heads), keys_and_values);
                [queries?, keys?, values?]
            }
            Self::Joined(joined) => {
                let all = joined.forward(x, step.batch, None)?;
                let (queries, keys) = (query_heads * size, key_heads * size);
                let part = |first: usize, heads: usize| {
                    all.clone().slice([0..rows, first..first + heads * size]).reshape([rows, heads, size])
                };
                [part(0, query_heads), part(queries, key_heads), part(queries + keys, key_heads)]
            }
        })
    }
}

impl<B: FloraBackend> FeedForward<B> {
    fn forward(&self, x: Tensor<B, 2>, residual: Tensor<B, 2>, batch: &StepBatch) -> Result<Tensor<B, 2>, LinearError> {
        match self {
            Self::Gated { gate, up, down } => {
                let (gate, up) =
                    both::<B, _, _>(|| gate.forward(x.clone(), batch, None), || up.forward(x.clone(), batch, None));
                down.forward(gate? * up?, batch, Some(residual))
            }
            Self::Plain { up, down } => down.forward(up.forward(x, batch, None)?, batch, Some(residual)),
        }
    }
}

/// Both results, computed at the same time where that gets further: threads that finish one early help with the other, where they
/// would wait at the end of each.
fn both<B: FloraBackend, X: Send, Y: Send>(one: impl FnOnce() -> X + Send, other: impl FnOnce() -> Y + Send) -> (X, Y) {
    if B::CONCURRENT { rayon::join(one, other) } else { (one(), other()) }
}
