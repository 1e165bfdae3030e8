//! What a step's time is spent on, as names of `tracing` spans of the level TRACE. Spans of one step don't overlap, apart from
//! [`STEP`], which holds those of the decoder.

/// The decoder's step, from the segments to the logits.
pub const STEP: &str = "step";
/// Tokens to rows.
pub const EMBEDDING: &str = "embedding";
/// Of a block, and before the output matrix.
pub const NORMS: &str = "norms";
/// The linear layers of the blocks, with their adapters.
pub const PROJECTIONS: &str = "projections";
/// Rotation, scores, softmax and the sum of values; keys and values put in the cache.
pub const ATTENTION: &str = "attention";
/// Products of a gated feed-forward network.
pub const GATES: &str = "gates";
/// Rows to logits.
pub const OUTPUT: &str = "output matrix";
/// Logits to tokens and text.
pub const SAMPLING: &str = "sampling";

/// Those within [`STEP`].
pub const OF_DECODER: [&str; 6] = [EMBEDDING, NORMS, PROJECTIONS, ATTENTION, GATES, OUTPUT];
