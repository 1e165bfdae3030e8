//! What a model in training tells beside losses: of each target, and of what its adapted projections read. Both are computed as
//! training computes, by the adapters that are placed.

use flora_train::TrainSegment;

use super::output::Beside;
use super::recorder::Recorded;
use super::tape::{buffer, floats};
use super::{Rows, Step, TrainError, TrainedModel, on_first_thread};
use crate::operations::Operations;

/// What the model gives one target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetScore {
    /// −ln p(target), in nats.
    pub nats: f64,
    /// The token with the largest logit, of equal ones the first: what would be generated there without temperature.
    pub likeliest: u32,
}

impl TrainedModel {
    /// The scores of every target, in the order of a segment's tokens; tokens without a target have none.
    ///
    /// # Errors
    /// As [`Trainee::gradients`](flora_train::Trainee::gradients).
    pub fn scores(&self, batch: &[TrainSegment<'_>]) -> Result<Vec<Vec<TargetScore>>, TrainError> {
        on_first_thread(|| {
            let (rows, found, _) = self.run(batch, Beside::Likeliest)?;
            let score = |(nats, likeliest): (&f64, &u32)| TargetScore { nats: *nats, likeliest: *likeliest };
            let nats = rows.by_segment(&found.nats).zip(rows.by_segment(&found.likeliest));
            Ok(nats.map(|(nats, likeliest)| nats.iter().zip(likeliest).map(score).collect()).collect())
        })
    }

    /// Runs a batch and tells `read` of every projection that some of its rows adapt: the module's path, and what it reads,
    /// `[rows, d]`, rows of other adapters and of none included.
    ///
    /// # Errors
    /// As [`Trainee::gradients`](flora_train::Trainee::gradients).
    pub fn adapted_inputs(
        &self,
        batch: &[TrainSegment<'_>],
        mut read: impl FnMut(&str, &[f32]) + Send,
    ) -> Result<(), TrainError> {
        on_first_thread(|| {
            let rows = self.rows(batch)?;
            let recorder = &self.parts.operations;
            let positions = recorder.positions(&rows.segments)?;
            let step = Step { operations: recorder, batch: &rows.batch, segments: &rows.segments, positions };
            let mut x = Recorded { buffer: buffer(&self.device, self.embed(batch, &rows)?)?, place: None };
            for block in &self.parts.blocks {
                let (output, tape) = recorder.record(x, |x| block.forward(x, &step, &mut []))?;
                for (path, input) in tape.adapted() {
                    read(path, floats(input)?);
                }
                // A tape holds places of this block alone.
                x = Recorded { buffer: output.buffer, place: None };
            }
            Ok(())
        })
    }

    /// The rows of a batch, checked.
    pub(super) fn rows(&self, batch: &[TrainSegment<'_>]) -> Result<Rows, TrainError> {
        let positions = |job| self.jobs.get(&job).map(|job| job.position);
        Rows::of(batch, positions, (self.parts.vocabulary, self.parts.context_length))
    }
}
