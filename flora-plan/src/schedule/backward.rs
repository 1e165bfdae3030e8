//! Laying out a batch's backward pass: the schedule that gives the gradient of the input, and what each adapter's own gradients are
//! made of. Index tables, no tensor data.

use super::error::ScheduleError;
use super::lay_out::{Schedule, schedule};
use super::limits::fits;
use crate::batch::{AdapterSlots, LowRankSlots, Segment};
use crate::gradient::GradientLowering;
use crate::layer::LayerShape;
use crate::plan::Plan;

/// The backward pass of one batch. Like a [`Schedule`] it holds nothing of a layer's shape; [`BackwardSchedule::fits`] says which
/// layers it fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardSchedule {
    input: Schedule,
    adapters: Vec<AdapterGradient>,
    in_vectors: u32,
    out_vectors: u32,
}

/// Consecutive rows of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowRun {
    /// The first row.
    pub first_row: u32,
    /// How many, 1 at least.
    pub rows: u32,
}

/// What the gradients of one adapter's vectors are made of. They follow one another from `first_in` and `first_out` on, in the
/// order of the adapter's vectors: those of scales, then those of low-rank pairs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterGradient {
    /// Its position in the layer's table.
    pub adapter: u32,
    /// Its rows, in the order of the batch.
    pub runs: Vec<RowRun>,
    /// How the gradients of its scales are computed.
    pub lowering: GradientLowering,
    /// For each in-scale the out-slot of its virtual row; slots count from 1, 0 is "not scaled".
    pub in_scales: Vec<u32>,
    /// For each out-scale the in-slot of its virtual row, likewise.
    pub out_scales: Vec<u32>,
    /// Its low-rank pairs.
    pub low_rank: LowRankSlots,
    /// Which of the gradients of in-vectors is its first.
    pub first_in: u32,
    /// Which of the gradients of out-vectors is its first.
    pub first_out: u32,
}

impl AdapterGradient {
    fn new(
        adapter: u32,
        slots: &AdapterSlots,
        runs: Vec<RowRun>,
        choose: impl Fn(u64, u64) -> GradientLowering,
    ) -> Self {
        let slot = |slot: Option<u32>| slot.map_or(0, |slot| slot.saturating_add(1));
        let rows = &slots.virtual_rows;
        let in_scales: Vec<_> =
            rows.iter().filter(|row| row.in_scale.is_some()).map(|row| slot(row.out_scale)).collect();
        let out_scales: Vec<_> =
            rows.iter().filter(|row| row.out_scale.is_some()).map(|row| slot(row.in_scale)).collect();
        let tokens = runs.iter().map(|run| u64::from(run.rows)).sum();
        let lowering = choose(tokens, (in_scales.len() + out_scales.len()) as u64);
        Self { adapter, runs, lowering, in_scales, out_scales, low_rank: slots.low_rank, first_in: 0, first_out: 0 }
    }

    /// Gradients of in-vectors that it has.
    pub fn in_vectors(&self) -> u32 {
        (self.in_scales.len() as u32).saturating_add(self.low_rank.rank)
    }

    /// Gradients of out-vectors that it has.
    pub fn out_vectors(&self) -> u32 {
        (self.out_scales.len() as u32).saturating_add(self.low_rank.rank)
    }

    /// Scales whose gradients it has.
    pub fn scales(&self) -> u64 {
        (self.in_scales.len() + self.out_scales.len()) as u64
    }

    /// Its rows of the batch, in their order.
    pub fn row_indices(&self) -> impl Iterator<Item = u32> + Clone + '_ {
        self.runs.iter().flat_map(|run| run.first_row..run.first_row + run.rows)
    }

    /// Rows of all runs.
    pub fn rows(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.rows)).sum()
    }

    /// One past the largest in-vector slot that its gradients are made of.
    pub fn in_slots(&self) -> u32 {
        let end = if self.low_rank.rank > 0 { self.low_rank.shrink.saturating_add(self.low_rank.rank) } else { 0 };
        self.out_scales.iter().copied().max().unwrap_or(0).max(end)
    }

    /// One past the largest out-vector slot that its gradients are made of.
    pub fn out_slots(&self) -> u32 {
        let end = if self.low_rank.rank > 0 { self.low_rank.expand.saturating_add(self.low_rank.rank) } else { 0 };
        self.in_scales.iter().copied().max().unwrap_or(0).max(end)
    }
}

impl BackwardSchedule {
    /// What gives dx `[tokens, d]` of the gradient g `[tokens, k]`: a schedule over w0ᵀ whose in-slots are in the pool of
    /// out-vectors and whose out-slots are in that of in-vectors.
    pub fn input(&self) -> &Schedule {
        &self.input
    }

    /// The adapters that have rows and vectors, by position.
    pub fn adapters(&self) -> &[AdapterGradient] {
        &self.adapters
    }

    /// Rows of the batch.
    pub fn tokens(&self) -> u32 {
        self.input.tokens()
    }

    /// Gradients of in-vectors, of all adapters.
    pub fn in_vectors(&self) -> u32 {
        self.in_vectors
    }

    /// Gradients of out-vectors, of all adapters.
    pub fn out_vectors(&self) -> u32 {
        self.out_vectors
    }

    /// One past the largest in-vector slot in use.
    pub fn in_slots(&self) -> u32 {
        let of_adapters = self.adapters.iter().map(AdapterGradient::in_slots);
        of_adapters.max().unwrap_or(0).max(self.input.out_slots())
    }

    /// One past the largest out-vector slot in use.
    pub fn out_slots(&self) -> u32 {
        let of_adapters = self.adapters.iter().map(AdapterGradient::out_slots);
        of_adapters.max().unwrap_or(0).max(self.input.in_slots())
    }

    /// Whether everything can be indexed for a layer of this shape.
    ///
    /// # Errors
    /// Buffers too large to index.
    pub fn fits(&self, shape: LayerShape) -> Result<(), ScheduleError> {
        self.input.fits(shape.transposed())?;
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        fits("the gradients of in-vectors", u64::from(self.in_vectors) * d)?;
        fits("the gradients of out-vectors", u64::from(self.out_vectors) * k)?;
        // What is reduced is staged first.
        let reduced = || self.adapters.iter().filter(|adapter| adapter.lowering == GradientLowering::Reduced);
        let staged = |scales: fn(&AdapterGradient) -> u64| {
            reduced().map(|adapter| adapter.rows().saturating_mul(scales(adapter))).fold(0, u64::saturating_add)
        };
        let rows =
            staged(|adapter| adapter.in_scales.len() as u64).max(staged(|adapter| adapter.out_scales.len() as u64));
        fits("the stacked rows of the gradients", rows.saturating_mul(d.max(k)))
    }
}

/// Lays out the backward pass of a batch over a layer of `shape`. `plan` is how dx is computed; gradients of scales are computed with the
/// fewest multiply-adds.
///
/// # Errors
/// A segment of an unknown adapter; a buffer too large to index; several adapters whose weights are said to be resident.
pub fn backward_schedule(
    plan: &Plan,
    shape: LayerShape,
    segments: &[Segment],
    adapters: &[AdapterSlots],
) -> Result<BackwardSchedule, ScheduleError> {
    backward_schedule_by(plan, shape, segments, adapters, GradientLowering::cheapest)
}

/// The same; `choose` says how the gradients of an adapter's scales are computed, by the adapter's rows and scales.
///
/// # Errors
/// As [`backward_schedule`].
pub fn backward_schedule_by(
    plan: &Plan,
    shape: LayerShape,
    segments: &[Segment],
    adapters: &[AdapterSlots],
    choose: impl Fn(u64, u64) -> GradientLowering,
) -> Result<BackwardSchedule, ScheduleError> {
    let exchanged: Vec<_> = adapters.iter().map(AdapterSlots::adjoint).collect();
    let input = schedule(plan, shape.transposed(), segments, &exchanged, false)?;
    let mut runs = vec![Vec::new(); adapters.len()];
    let mut first_row = 0;
    for Segment { rows, adapter } in segments.iter().copied().filter(|segment| segment.rows > 0) {
        // `schedule` has found the adapter, and the rows to be indexable.
        runs[adapter as usize].push(RowRun { first_row, rows });
        first_row += rows;
    }
    let (mut in_vectors, mut out_vectors) = (0u32, 0u32);
    let mut gradients = Vec::new();
    for (position, runs) in runs.into_iter().enumerate().filter(|(_, runs)| !runs.is_empty()) {
        let gradient = AdapterGradient::new(position as u32, &adapters[position], runs, &choose);
        if gradient.in_vectors() > 0 || gradient.out_vectors() > 0 {
            let (in_count, out_count) = (gradient.in_vectors(), gradient.out_vectors());
            gradients.push(AdapterGradient { first_in: in_vectors, first_out: out_vectors, ..gradient });
            in_vectors = in_vectors.saturating_add(in_count);
            out_vectors = out_vectors.saturating_add(out_count);
        }
    }
    let laid_out = BackwardSchedule { input, adapters: gradients, in_vectors, out_vectors };
    laid_out.fits(shape)?;
    Ok(laid_out)
}
