//! The rows of a batch of segments, checked.

use flora_runtime::StepBatch;
use flora_train::{JobId, SegmentLoss, TrainSegment};

use crate::operations::SegmentRows;
use crate::training::error::TrainError;

/// A batch as the blocks see it, and what its loss is taken of.
pub(crate) struct Rows {
    pub(crate) batch: StepBatch,
    pub(crate) segments: Vec<SegmentRows>,
    /// The rows that have a target, rising.
    pub(crate) selected: Vec<usize>,
    /// Of each of these.
    pub(crate) targets: Vec<u32>,
    /// Of each segment.
    counts: Vec<usize>,
}

impl Rows {
    /// The rows of segments, whose jobs' positions in the tables of the projections `position_of` knows.
    pub(crate) fn of(
        batch: &[TrainSegment<'_>],
        position_of: impl Fn(JobId) -> Option<u32>,
        (vocabulary, context_length): (usize, usize),
    ) -> Result<Self, TrainError> {
        let mut all = Self {
            batch: StepBatch::default(),
            segments: Vec::with_capacity(batch.len()),
            selected: Vec::new(),
            targets: Vec::new(),
            counts: Vec::with_capacity(batch.len()),
        };
        let mut positions = Vec::with_capacity(batch.len());
        let mut next = 0;
        for (segment, TrainSegment { job, tokens, targets }) in batch.iter().enumerate() {
            let wrong = |reason: String| Err(TrainError::Segment { segment, reason });
            if tokens.is_empty() {
                return wrong("has no tokens; leave it out".to_owned());
            }
            if tokens.len() != targets.len() {
                return wrong(format!(
                    "has {} targets for {} tokens; give each one, or none",
                    targets.len(),
                    tokens.len()
                ));
            }
            if tokens.len() > context_length {
                return wrong(format!("has {} tokens, and the model knows {context_length}; cut it", tokens.len()));
            }
            if let Some(token) =
                tokens.iter().chain(targets.iter().flatten()).find(|token| **token as usize >= vocabulary)
            {
                return wrong(format!("has the token {token} of a vocabulary of {vocabulary}"));
            }
            let position = match job {
                None => 0,
                Some(job) => position_of(*job).ok_or(TrainError::UnknownJob { segment, job: *job })?,
            };
            positions.push((position, tokens.len() as u32));
            all.segments.push(SegmentRows { rows: next..next + tokens.len(), first_position: 0 });
            let before = all.targets.len();
            for (row, target) in targets.iter().enumerate() {
                if let Some(target) = target {
                    all.selected.push(next + row);
                    all.targets.push(*target);
                }
            }
            all.counts.push(all.targets.len() - before);
            next += tokens.len();
        }
        all.batch = StepBatch::new(positions);
        Ok(all)
    }

    /// The losses of the segments from those of their targets, added in order.
    pub(crate) fn losses(&self, nats: &[f64]) -> Vec<SegmentLoss> {
        let sum = |own: &[f64]| own.iter().fold(0.0, |sum, nats| sum + nats);
        let parts = self.by_segment(nats).zip(&self.counts);
        parts.map(|(own, count)| SegmentLoss { nats: sum(own), targets: *count as u64 }).collect()
    }

    /// What there is of each target, a segment after the other.
    pub(crate) fn by_segment<'a, T>(&'a self, mut of_targets: &'a [T]) -> impl Iterator<Item = &'a [T]> {
        self.counts.iter().map(move |count| {
            let (own, others) = of_targets.split_at((*count).min(of_targets.len()));
            of_targets = others;
            own
        })
    }
}
