//! Per batch: prices the handful of plans and picks the cheapest that can run.

use serde::Serialize;

use crate::batch::BatchShape;
use crate::cost::{Coefficients, work};
use crate::layer::LayerShape;
use crate::lowering::{Lowering, Part, lowerings_of};
use crate::schedule::can_hold;

/// How the two parts of a batch's adapters are computed. Base rows need no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Plan {
    multiplicative: Lowering,
    additive: Lowering,
    split: bool,
}

/// One candidate with its predicted time for the whole batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The lowering.
    pub lowering: Lowering,
    /// Predicted seconds of the cheapest plan with it.
    pub predicted_seconds: f64,
}

/// Lowerings that make no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A lowering was asked for that doesn't compute the part.
    #[error("the lowering `{lowering}` doesn't compute the {part:?} part of an adapter; use one of: {}", names(*.part))]
    WrongPart {
        /// What was asked for.
        lowering: Lowering,
        /// The part.
        part: Part,
    },
    /// A merged weight holds both parts of its adapter.
    #[error("`merged` computes both parts of an adapter or none; ask for it for both")]
    HalfMerged,
}

fn names(part: Part) -> String {
    lowerings_of(part).map(|row| row.lowering.name()).collect::<Vec<_>>().join(", ")
}

impl Plan {
    /// A plan that someone else chose.
    ///
    /// # Errors
    /// A lowering that doesn't compute its part.
    pub fn new(multiplicative: Lowering, additive: Lowering) -> Result<Self, PlanError> {
        for (part, lowering) in [(Part::Multiplicative, multiplicative), (Part::Additive, additive)] {
            if !lowerings_of(part).any(|row| row.lowering == lowering) {
                return Err(PlanError::WrongPart { lowering, part });
            }
        }
        if (multiplicative == Lowering::Merged) != (additive == Lowering::Merged) {
            return Err(PlanError::HalfMerged);
        }
        Ok(Self { multiplicative, additive, split: false })
    }

    /// The plan of the one adapter whose W_i is resident.
    pub const MERGED: Self = Self { multiplicative: Lowering::Merged, additive: Lowering::Merged, split: false };

    /// Every plan that there is.
    pub fn all() -> impl Iterator<Item = Self> {
        lowerings_of(Part::Multiplicative).flat_map(|one| {
            lowerings_of(Part::Additive).filter_map(|other| Self::new(one.lowering, other.lowering).ok())
        })
    }

    /// Every plan that needs no weight made beforehand.
    pub fn unmerged() -> impl Iterator<Item = Self> {
        Self::all().filter(|plan| *plan != Self::MERGED)
    }

    /// The same, with cubes that share the depth where a device would be short of work without: another order of sums, and so
    /// another plan. What can't be split runs whole.
    #[must_use]
    pub fn with_split(self) -> Self {
        Self { split: true, ..self }
    }

    /// Whether cubes may share the depth.
    pub fn splits(&self) -> bool {
        self.split
    }

    /// The lowering of scaled virtual rows.
    pub fn multiplicative(&self) -> Lowering {
        self.multiplicative
    }

    /// The lowering of the low-rank sum.
    pub fn additive(&self) -> Lowering {
        self.additive
    }

    /// The lowering of a part.
    pub fn of(&self, part: Part) -> Lowering {
        match part {
            Part::Multiplicative => self.multiplicative,
            Part::Additive => self.additive,
        }
    }
}

impl Default for Plan {
    /// What needs no memory beyond the batch's own, and so always runs.
    fn default() -> Self {
        Self { multiplicative: Lowering::Stacked, additive: Lowering::Fused, split: false }
    }
}

/// The candidates for one part of a batch, cheapest first.
pub fn candidates(part: Part, shape: LayerShape, batch: &BatchShape, coefficients: &Coefficients) -> Vec<Candidate> {
    let price = |plan: Plan| work(&plan, shape, batch, false, coefficients.pads_blocks).price(coefficients);
    let mut candidates: Vec<_> = lowerings_of(part)
        .filter(|row| row.lowering != Lowering::Merged || batch.adapters == 1)
        .map(|row| Candidate {
            lowering: row.lowering,
            predicted_seconds: Plan::all()
                .filter(|plan| plan.of(part) == row.lowering)
                .map(price)
                .fold(f64::INFINITY, f64::min),
        })
        .collect();
    candidates.sort_by(|one, other| one.predicted_seconds.total_cmp(&other.predicted_seconds));
    candidates
}

/// Picks the cheapest plan for this batch whose buffers the device can hold and kernels can index; `finishes` where the layer has
/// an epilogue. Whether a weight is worth merging is no question of one batch, so that `merged` is never picked.
pub fn plan(shape: LayerShape, batch: &BatchShape, finishes: bool, coefficients: &Coefficients) -> Plan {
    Plan::unmerged()
        .filter(|plan| can_hold(plan, shape, batch, coefficients.largest_buffer_bytes))
        .map(|plan| (plan, work(&plan, shape, batch, finishes, coefficients.pads_blocks).price(coefficients)))
        .min_by(|one, other| one.1.total_cmp(&other.1))
        .map_or_else(Plan::default, |(plan, _)| plan)
}
