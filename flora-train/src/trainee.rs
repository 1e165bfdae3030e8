//! What training asks of a model: where adapters may sit, and losses and gradients of a batch of segments.

use std::error::Error;

use flora_ir::algebra::FoldedAdapter;
use flora_ir::gradient::FoldedGradient;
use flora_plan::layer::LayerShape;

/// One adapter that is trained: a number that the trainer gives out, unique among the jobs that a [`Trainee`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u32);

/// Consecutive tokens of one document, from position 0. Attention doesn't leave it: packing is several segments.
#[derive(Clone, Copy, Debug)]
pub struct TrainSegment<'a> {
    /// Whose adapter; `None` for the base model alone.
    pub job: Option<JobId>,
    /// At least one token.
    pub tokens: &'a [u32],
    /// As many as `tokens`: what should follow each, or `None` where that isn't in the loss.
    pub targets: &'a [Option<u32>],
}

/// A linear layer of the model that adapters may change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetLayer {
    /// The module's path in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Inputs and outputs.
    pub shape: LayerShape,
    /// Whether the model adds a bias to its outputs.
    pub has_bias: bool,
}

/// The loss of one segment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SegmentLoss {
    /// The sum over the segment's targets of −ln p(target), in nats.
    pub nats: f64,
    /// How many targets there are.
    pub targets: u64,
}

/// The gradients of one job's adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct JobGradients {
    /// Whose.
    pub job: JobId,
    /// Of the sum of the losses of the job's segments in nats, in the order in which the job's layers were placed.
    pub layers: Vec<FoldedGradient>,
}

/// What [`Trainee::gradients`] gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchGradients {
    /// In the order of the segments.
    pub losses: Vec<SegmentLoss>,
    /// Of every job that has a segment in the batch, in the order of the jobs' first segments.
    pub jobs: Vec<JobGradients>,
}

/// A model with a frozen base, whose adapters are trained.
///
/// A job's results depend on its own segments, their order, and its own adapter alone, bit for bit, whatever else is in the batch.
pub trait Trainee {
    /// Why a batch failed, or an adapter can't be placed.
    type Error: Error + Send + Sync + 'static;

    /// The layers that adapters may change.
    fn layers(&self) -> &[TargetLayer];

    /// The base weight of a layer by its index in [`Self::layers`], `[d, k]` row-major: what adapters are folded with whose equation
    /// reads it when they are loaded, as DoRA's norm does.
    ///
    /// # Errors
    /// There is no such layer, or its weight can't be read.
    fn base_weight(&self, layer: usize) -> Result<Vec<f32>, Self::Error>;

    /// What tells this model, in the form in which its base weights are multiplied, from any other: a job's state is of one of them.
    ///
    /// # Errors
    /// Its files can't be read.
    fn identity(&self) -> Result<String, Self::Error>;

    /// Makes these the job's adapters from now on, each with the index of its layer in [`Self::layers`]; the former ones are gone.
    ///
    /// # Errors
    /// A layer that there isn't or that is named twice, or an adapter that doesn't fit it or memory; the job has no adapters then.
    fn place(&mut self, job: JobId, layers: &[(usize, FoldedAdapter)]) -> Result<(), Self::Error>;

    /// Forgets a job's adapters; nothing where there are none.
    fn remove(&mut self, job: JobId);

    /// Losses and gradients. Numbers of a job that are not finite are no error: they are in that job's results.
    ///
    /// # Errors
    /// A segment without tokens, with other than one target for each, with a token or target beyond the vocabulary, longer than the
    /// model's context, or of a job that has no adapters; or the device fails.
    fn gradients(&mut self, batch: &[TrainSegment<'_>]) -> Result<BatchGradients, Self::Error>;

    /// Losses alone, in the order of the segments.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn losses(&mut self, batch: &[TrainSegment<'_>]) -> Result<Vec<SegmentLoss>, Self::Error>;
}
