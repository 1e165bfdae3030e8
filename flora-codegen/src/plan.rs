//! Per batch: prices the handful of candidates and picks the cheapest for each part.

use serde::Serialize;

use crate::batch::{BatchShape, LayerShape};
use crate::cost::Coefficients;
use crate::lowering::{Lowering, Part, lowerings_of, plain_work};

/// How the two parts of a batch's adapters are computed. Base rows need no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Plan {
    /// Stacked or bmm.
    pub multiplicative: Lowering,
    /// Segmented or bmm.
    pub additive: Lowering,
}

/// One candidate with its predicted time, the plain GEMM of the same rows included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The lowering.
    pub lowering: Lowering,
    /// Predicted seconds.
    pub predicted_seconds: f64,
}

/// A lowering was asked for that doesn't compute the part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lowering `{lowering}` doesn't compute the {part:?} part of an adapter; use one of: {}", names(*.part))]
pub struct PlanError {
    /// What was asked for.
    pub lowering: Lowering,
    /// The part.
    pub part: Part,
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
                return Err(PlanError { lowering, part });
            }
        }
        Ok(Self { multiplicative, additive })
    }

    /// The lowering of a part.
    pub fn of(&self, part: Part) -> Lowering {
        match part {
            Part::Multiplicative => self.multiplicative,
            Part::Additive => self.additive,
        }
    }
}

/// The candidates for one part of a batch, cheapest first.
pub fn candidates(part: Part, shape: LayerShape, batch: &BatchShape, coefficients: &Coefficients) -> Vec<Candidate> {
    let plain = plain_work(shape, batch).price(coefficients);
    let mut candidates: Vec<_> = lowerings_of(part)
        .map(|row| Candidate {
            lowering: row.lowering,
            predicted_seconds: plain + (row.work)(shape, batch).price(coefficients),
        })
        .collect();
    candidates.sort_by(|one, other| one.predicted_seconds.total_cmp(&other.predicted_seconds));
    candidates
}

/// Picks the cheapest lowering of each part for this batch.
pub fn plan(shape: LayerShape, batch: &BatchShape, coefficients: &Coefficients) -> Plan {
    let cheapest = |part, fallback| {
        lowerings_of(part)
            .map(|row| (row.lowering, (row.work)(shape, batch).price(coefficients)))
            .min_by(|one, other| one.1.total_cmp(&other.1))
            .map_or(fallback, |(lowering, _)| lowering)
    };
    Plan {
        multiplicative: cheapest(Part::Multiplicative, Lowering::Stacked),
        additive: cheapest(Part::Additive, Lowering::Segmented),
    }
}
