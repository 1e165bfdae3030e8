//! Adapters whose parts are weighed for each token: what a row's low-rank sum h = x @ b is multiplied by before it is expanded. A model
//! gives gates to a step's rows, one for each part of their adapter; a projection knows which part each rank is of.

use std::ops::Range;

use flora_plan::batch::Segment;

use crate::backend::RankGates;
use crate::device::DeviceError;
use crate::projection::{Projection, ProjectionError};
use crate::step::StepBatch;

/// Gates of some rows of a step, all of one adapter.
#[derive(Clone, Debug)]
pub struct RowGates {
    /// Which rows of the batch.
    pub rows: Range<usize>,
    /// Sets of gates that a row has: one for each projection that has its own, or a single one.
    pub layers: usize,
    /// Gates of a set: one for each part of the adapter.
    pub parts: usize,
    /// `[rows, layers, parts]`
    pub values: Vec<f32>,
}

impl RowGates {
    /// The gates of a row of the batch in a set; `None` where there are none.
    fn of(&self, row: usize, layer: usize) -> Option<&[f32]> {
        let row = row.checked_sub(self.rows.start).filter(|_| row < self.rows.end)?;
        let set = row * self.layers + layer;
        self.values.get(set * self.parts..(set + 1) * self.parts).filter(|_| layer < self.layers)
    }
}

impl Projection {
    /// Has the low-rank sums of the adapter at a position multiplied by gates, which a batch brings along
    /// ([`StepBatch::with_gates`](crate::StepBatch::with_gates)): `parts` says of each of its ranks which part of the adapter it is of,
    /// and `layer` which set of a row's gates is this projection's. [`PlannedProjection::forward`](crate::PlannedProjection::forward)
    /// runs such batches.
    ///
    /// # Errors
    /// No adapter there, or one of another rank or whose W_i is resident; a device that multiplies by no gates.
    pub fn set_gates(&mut self, position: u32, layer: usize, parts: &[u32]) -> Result<(), ProjectionError> {
        if !self.device.has_gates() {
            return Err(DeviceError::NoGates { device: self.device.info().id.clone() }.into());
        }
        if self.slots_at(position).is_some_and(|slots| slots.is_merged) {
            return Err(ProjectionError::MergedGates(position));
        }
        let rank = self.slots_at(position).map_or(0, |slots| slots.low_rank.rank);
        if rank == 0 || rank as usize != parts.len() {
            return Err(ProjectionError::WrongGates { position, rank, found: parts.len() });
        }
        self.gated.insert(position, GatedRanks { layer, parts: parts.to_vec() });
        Ok(())
    }

    /// How the adapter at a position is gated, where it is.
    pub(crate) fn gated(&self, position: u32) -> Option<&GatedRanks> {
        self.gated.get(&position)
    }

    /// Refuses batches of gated adapters where nothing would apply their gates.
    pub(crate) fn refuse_gates(&self, segments: &[Segment]) -> Result<(), ProjectionError> {
        match segments.iter().any(|segment| segment.rows > 0 && self.gated.contains_key(&segment.adapter)) {
            true => Err(ProjectionError::GatedSchedule),
            false => Ok(()),
        }
    }
}

/// By bits: what is computed with equal ones is equal.
impl PartialEq for RowGates {
    fn eq(&self, other: &Self) -> bool {
        let bits = |gates: &Self| gates.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        (&self.rows, self.layers, self.parts) == (&other.rows, other.layers, other.parts) && bits(self) == bits(other)
    }
}

impl Eq for RowGates {}

/// How a projection's adapter is gated.
#[derive(Clone, Debug)]
pub(crate) struct GatedRanks {
    /// Which set of a row's gates is this projection's.
    pub(crate) layer: usize,
    /// By rank, the part that it is of.
    pub(crate) parts: Vec<u32>,
}

/// The gates of a batch, as one projection has them.
pub(crate) struct BatchGates {
    width: usize,
    values: Vec<f32>,
}

impl BatchGates {
    /// `None` where no adapter of the batch has gates.
    pub(crate) fn of(projection: &Projection, batch: &StepBatch) -> Result<Option<Self>, ProjectionError> {
        let segments = || batch.segments().iter().filter(|segment| segment.rows > 0);
        if !segments().any(|segment| projection.gated(segment.adapter).is_some()) {
            return Ok(None);
        }
        let ranks = segments().filter_map(|segment| projection.slots_at(segment.adapter));
        let width = ranks.map(|slots| slots.low_rank.rank as usize).max().unwrap_or(0);
        let mut values = vec![1.0; batch.rows() * width];
        let mut first = 0;
        for segment in segments() {
            let rows = first..first + segment.rows as usize;
            first = rows.end;
            let Some(GatedRanks { layer, parts }) = projection.gated(segment.adapter) else { continue };
            for row in rows {
                let missing = || ProjectionError::NoGates { position: segment.adapter, row };
                let gates = batch.gates().iter().find_map(|gates| gates.of(row, *layer)).ok_or_else(missing)?;
                for (value, part) in values[row * width..].iter_mut().zip(parts) {
                    *value = *gates.get(*part as usize).ok_or_else(missing)?;
                }
            }
        }
        Ok(Some(Self { width, values }))
    }

    pub(crate) fn as_gates(&self) -> RankGates<'_> {
        RankGates { width: self.width, values: &self.values }
    }

    /// Those of some rows, in pieces.
    pub(crate) fn of_rows(&self, pieces: &[Range<usize>]) -> Self {
        let rows = pieces.iter().map(|piece| &self.values[piece.start * self.width..piece.end * self.width]);
        Self { width: self.width, values: rows.collect::<Vec<_>>().concat() }
    }
}
