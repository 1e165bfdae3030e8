//! Per batch: prices the handful of plans and picks the cheapest that can run.

use serde::Serialize;

use crate::batch::{BatchShape, ROW_CLASSES};
use crate::cost::{LayerPrices, Parts, work};
use crate::lowering::{Lowering, Part, lowerings_of};
use crate::schedule::can_hold;

/// How the two parts of a batch's adapters are computed. Base rows need no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Plan {
    multiplicative: Lowering,
    additive: Lowering,
    split: bool,
    on_chip_from: u32,
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
        Ok(Self { multiplicative, additive, split: false, on_chip_from: 1 })
    }

    /// The plan of the one adapter whose W_i is resident.
    pub const MERGED: Self =
        Self { multiplicative: Lowering::Merged, additive: Lowering::Merged, split: false, on_chip_from: 1 };

    /// The choices of [`Plan::on_chip_from`].
    pub const ON_CHIP_FROM: [u32; ROW_CLASSES] = [1, 2, 4, 8, 16];

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

    /// The same, with `on_chip` for segments of at least `rows` rows, the largest of [`Plan::ON_CHIP_FROM`] that isn't more; the
    /// rows of shorter ones are stacked. A segment's own length decides, not what stands beside it in the batch.
    #[must_use]
    pub fn with_on_chip_from(self, rows: u32) -> Self {
        let [first, others @ ..] = Self::ON_CHIP_FROM;
        Self { on_chip_from: others.into_iter().filter(|from| *from <= rows).fold(first, u32::max), ..self }
    }

    /// The rows of the shortest segment that `on_chip` serves.
    pub fn on_chip_from(&self) -> u32 {
        self.on_chip_from
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
        Self { multiplicative: Lowering::Stacked, additive: Lowering::Fused, split: false, on_chip_from: 1 }
    }
}

/// The candidates for one part of a batch, cheapest first.
pub fn candidates(part: Part, prices: &LayerPrices, batch: &BatchShape) -> Vec<Candidate> {
    let price = |plan: Plan| prices.price(&work(&plan, prices.layer(), batch, false, prices.pads_blocks()));
    let mut candidates: Vec<_> = lowerings_of(part)
        .filter(|row| row.lowering != Lowering::Merged || batch.adapters == 1)
        .map(|row| Candidate {
            lowering: row.lowering,
            predicted_seconds: Plan::all()
                .filter(|plan| plan.of(part) == row.lowering)
                .flat_map(|plan| choices_of(plan.multiplicative(), batch).map(move |rows| plan.with_on_chip_from(rows)))
                .map(price)
                .fold(f64::INFINITY, f64::min),
        })
        .collect();
    candidates.sort_by(|one, other| one.predicted_seconds.total_cmp(&other.predicted_seconds));
    candidates
}

/// The choices of [`Plan::on_chip_from`] that make a difference to a batch.
fn choices_of(lowering: Lowering, batch: &BatchShape) -> impl Iterator<Item = u32> {
    let classes = batch.wide;
    let differs = move |(class, _): &(usize, u32)| {
        let rows = |class: usize| classes[class].tokens > 0;
        *class == 0 || lowering == Lowering::OnChip && rows(*class - 1) && (*class..ROW_CLASSES).any(rows)
    };
    Plan::ON_CHIP_FROM.into_iter().enumerate().filter(differs).map(|(_, rows)| rows)
}

/// Picks the cheapest plan for this batch whose buffers the device can hold and kernels can index; `finishes` where the layer has
/// an epilogue. Whether a weight is worth merging is no question of one batch, so that `merged` is never picked. Allocates nothing.
pub fn plan(prices: &LayerPrices, batch: &BatchShape, finishes: bool) -> Plan {
    let parts = Parts { layer: prices.layer(), batch, finishes, pads: prices.pads_blocks() };
    let holds = |plan: &Plan| can_hold(plan, prices.layer().shape, batch, prices.largest_buffer_bytes());
    let mut best = (f64::INFINITY, Plan::default());
    // The low-rank sums are other ones only where materialised weights hold some of them.
    let mut of_additive = [None; 2];
    for multiplicative in lowerings_of(Part::Multiplicative).map(|row| row.lowering) {
        if multiplicative == Lowering::Merged {
            continue;
        }
        for rows in choices_of(multiplicative, batch) {
            let whole = |additive| Plan { multiplicative, additive, split: false, on_chip_from: rows };
            let own = prices.price(&parts.multiplicative(&whole(Lowering::Fused)));
            let materialises = usize::from(multiplicative == Lowering::Bmm);
            let additives = *of_additive[materialises]
                .get_or_insert_with(|| ADDITIVE.map(|additive| prices.price(&parts.additive(&whole(additive)))));
            for (additive, added) in ADDITIVE.into_iter().zip(additives) {
                let plan = whole(additive);
                if own + added < best.0 && holds(&plan) {
                    best = (own + added, plan);
                }
            }
        }
    }
    let chosen = best.1;
    let stacked = match chosen.multiplicative() {
        Lowering::Stacked => batch.plain_rows + batch.multiplicative.tokens_times_width,
        _ => u64::MAX,
    };
    if (1..=prices.split_rows()).contains(&stacked) { chosen.with_split() } else { chosen }
}

/// What computes low-rank sums for a batch of several adapters.
const ADDITIVE: [Lowering; 3] = [Lowering::Fused, Lowering::Segmented, Lowering::Bmm];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_planner_knows_every_additive_lowering() {
        let rows = lowerings_of(Part::Additive).map(|row| row.lowering).filter(|one| *one != Lowering::Merged);
        assert_eq!(rows.collect::<Vec<_>>(), ADDITIVE.to_vec());
    }

    #[test]
    fn on_chip_starts_at_a_class_of_rows() {
        let from = |rows: u32| Plan::default().with_on_chip_from(rows).on_chip_from();
        assert_eq!([0, 1, 2, 3, 4, 7, 8, 16, 1000].map(from), [1, 1, 2, 2, 4, 4, 8, 16, 16]);
    }
}
