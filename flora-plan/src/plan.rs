//! Per batch: prices the handful of plans and picks the cheapest that can run.

use serde::Serialize;

use crate::batch::{BatchShape, ROW_CLASSES};
use crate::cost::{LayerPrices, Parts, work};
use crate::lowering::{AdditiveLowering, Lowering, MultiplicativeLowering, Part, PartLowering, lowerings_of};
use crate::schedule::can_hold;

/// How a batch's adapters are computed. Base rows need no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    lowerings: Lowerings,
    splits: bool,
}

/// What computes the parts of a batch's adapters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lowerings {
    /// Both parts at once, by the resident W_i of the batch's one adapter.
    Merged,
    /// Each part by itself.
    Separate(SeparateParts),
}

/// A lowering for either part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeparateParts {
    /// Of scaled virtual rows.
    pub multiplicative: MultiplicativeLowering,
    /// Of the low-rank sum.
    pub additive: AdditiveLowering,
    on_chip_from: u32,
}

impl SeparateParts {
    /// The rows of the shortest segment that `on_chip` serves; one of [`Plan::ON_CHIP_FROM`].
    pub fn on_chip_from(&self) -> u32 {
        self.on_chip_from
    }
}

/// One candidate with its predicted time for the whole batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Candidate {
    /// The lowering.
    pub lowering: Lowering,
    /// Predicted seconds of the cheapest plan with it.
    pub predicted_seconds: f64,
}

impl Plan {
    /// A lowering for either part.
    pub const fn new(multiplicative: MultiplicativeLowering, additive: AdditiveLowering) -> Self {
        let parts = SeparateParts { multiplicative, additive, on_chip_from: Self::ON_CHIP_FROM[0] };
        Self { lowerings: Lowerings::Separate(parts), splits: false }
    }

    /// The same, with a part computed by this lowering. Where a merged plan gets one for one part, the other one's is
    /// [`Plan::default`]'s.
    #[must_use]
    pub fn with_part(self, part: PartLowering) -> Self {
        let parts = match self.lowerings {
            Lowerings::Merged => DEFAULT_PARTS,
            Lowerings::Separate(parts) => parts,
        };
        let lowerings = match part {
            PartLowering::Multiplicative(multiplicative) => {
                Lowerings::Separate(SeparateParts { multiplicative, ..parts })
            }
            PartLowering::Additive(additive) => Lowerings::Separate(SeparateParts { additive, ..parts }),
            PartLowering::Merged(_) => Lowerings::Merged,
        };
        Self { lowerings, ..self }
    }

    /// What a batch is computed by where nobody chooses: the fused launch, each segment's lowering by its own rows, so that what else is
    /// in the batch changes nothing. Fewer rows than these cost less as virtual rows (`stacked`) on every device that was measured.
    pub fn fixed() -> Self {
        Self::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(8)
    }

    /// The same for the gradient of the input: r virtual rows of t tokens cost r · t products, and t + r + 1 on chip, which is less
    /// from t = 4 on for every r but 1.
    pub fn fixed_adjoint() -> Self {
        Self::fixed().with_on_chip_from(4)
    }

    /// The plan of the one adapter whose W_i is resident.
    pub const MERGED: Self = Self { lowerings: Lowerings::Merged, splits: false };

    /// The choices of [`Plan::with_on_chip_from`].
    pub const ON_CHIP_FROM: [u32; ROW_CLASSES] = [1, 2, 4, 8, 16];

    /// Every plan that there is.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::unmerged().chain([Self::MERGED])
    }

    /// Every plan that needs no weight made beforehand.
    pub fn unmerged() -> impl Iterator<Item = Self> {
        MultiplicativeLowering::ALL
            .into_iter()
            .flat_map(|multiplicative| AdditiveLowering::ALL.map(|additive| Self::new(multiplicative, additive)))
    }

    /// The same, with cubes that share the depth where a device would be short of work without: another order of sums, and so
    /// another plan. What can't be split runs whole.
    #[must_use]
    pub fn with_split(self) -> Self {
        Self { splits: true, ..self }
    }

    /// The same, with `on_chip` for segments of at least `rows` rows, the largest of [`Plan::ON_CHIP_FROM`] that isn't more; the
    /// rows of shorter ones are stacked. A segment's own length decides, not what stands beside it in the batch. A merged plan
    /// stays as it is.
    #[must_use]
    pub fn with_on_chip_from(self, rows: u32) -> Self {
        let [first, others @ ..] = Self::ON_CHIP_FROM;
        let on_chip_from = others.into_iter().filter(|from| *from <= rows).fold(first, u32::max);
        let lowerings = match self.lowerings {
            Lowerings::Merged => Lowerings::Merged,
            Lowerings::Separate(parts) => Lowerings::Separate(SeparateParts { on_chip_from, ..parts }),
        };
        Self { lowerings, ..self }
    }

    /// Whether cubes may share the depth.
    pub fn splits(&self) -> bool {
        self.splits
    }

    /// What computes the parts.
    pub fn lowerings(&self) -> Lowerings {
        self.lowerings
    }

    /// Whether it needs the resident W_i of one adapter.
    pub fn is_merged(&self) -> bool {
        match self.lowerings {
            Lowerings::Merged => true,
            Lowerings::Separate(_) => false,
        }
    }

    /// The lowering of a part.
    pub fn of(&self, part: Part) -> Lowering {
        match (self.lowerings, part) {
            (Lowerings::Merged, _) => Lowering::Merged,
            (Lowerings::Separate(parts), Part::Multiplicative) => parts.multiplicative.lowering(),
            (Lowerings::Separate(parts), Part::Additive) => parts.additive.lowering(),
        }
    }
}

/// What needs no memory beyond the batch's own, and so always runs.
const DEFAULT_PARTS: SeparateParts = SeparateParts {
    multiplicative: MultiplicativeLowering::Stacked,
    additive: AdditiveLowering::Fused,
    on_chip_from: Plan::ON_CHIP_FROM[0],
};

impl Default for Plan {
    /// What needs no memory beyond the batch's own, and so always runs.
    fn default() -> Self {
        Self { lowerings: Lowerings::Separate(DEFAULT_PARTS), splits: false }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.lowerings {
            Lowerings::Merged => Lowering::Merged.fmt(f),
            Lowerings::Separate(parts) => write!(f, "{}+{}", parts.multiplicative, parts.additive),
        }
    }
}

/// The candidates for one part of a batch, cheapest first.
pub fn candidates(part: Part, prices: &LayerPrices, batch: &BatchShape) -> Vec<Candidate> {
    let price = |plan: Plan| prices.price(&work(&plan, prices.layer(), batch, false, prices.pads_blocks()));
    let mut candidates: Vec<_> = lowerings_of(part)
        .filter(|row| row.lowering() != Lowering::Merged || batch.adapters == 1)
        .map(|row| Candidate {
            lowering: row.lowering(),
            predicted_seconds: Plan::all()
                .filter(|plan| plan.of(part) == row.lowering())
                .flat_map(|plan| starts_of(plan, batch).map(move |rows| plan.with_on_chip_from(rows)))
                .map(price)
                .fold(f64::INFINITY, f64::min),
        })
        .collect();
    candidates.sort_by(|one, other| one.predicted_seconds.total_cmp(&other.predicted_seconds));
    candidates
}

/// The choices of [`Plan::with_on_chip_from`] that make a difference to a batch.
fn starts_of(plan: Plan, batch: &BatchShape) -> impl Iterator<Item = u32> {
    let classes = batch.wide;
    let chooses = match plan.lowerings {
        Lowerings::Merged => false,
        Lowerings::Separate(parts) => match parts.multiplicative {
            MultiplicativeLowering::OnChip => true,
            MultiplicativeLowering::Stacked | MultiplicativeLowering::Bmm => false,
        },
    };
    let differs = move |(class, _): &(usize, u32)| {
        let rows = |class: usize| classes[class].tokens > 0;
        *class == 0 || chooses && rows(*class - 1) && (*class..ROW_CLASSES).any(rows)
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
    for multiplicative in MultiplicativeLowering::ALL {
        for rows in starts_of(Plan::default().with_part(PartLowering::Multiplicative(multiplicative)), batch) {
            let own = prices.price(&parts.multiplicative(multiplicative, rows));
            let materialises = usize::from(multiplicative.materialises());
            let price = |additive| prices.price(&parts.additive(additive, multiplicative));
            let additives = *of_additive[materialises].get_or_insert_with(|| AdditiveLowering::ALL.map(price));
            for (additive, added) in AdditiveLowering::ALL.into_iter().zip(additives) {
                let plan = Plan::new(multiplicative, additive).with_on_chip_from(rows);
                if own + added < best.0 && holds(&plan) {
                    best = (own + added, plan);
                }
            }
        }
    }
    let chosen = best.1;
    let split = chosen.with_split();
    if may_split(&chosen, batch, prices.split_rows()) && holds(&split) { split } else { chosen }
}

/// Whether a batch is one of so few stacked rows that tuning found it faster split.
fn may_split(plan: &Plan, batch: &BatchShape, split_rows: u64) -> bool {
    match plan.lowerings {
        Lowerings::Merged => false,
        Lowerings::Separate(parts) => match parts.multiplicative {
            MultiplicativeLowering::Stacked => {
                (1..=split_rows).contains(&batch.plain_rows.saturating_add(batch.multiplicative.tokens_times_width))
            }
            MultiplicativeLowering::OnChip | MultiplicativeLowering::Bmm => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lowering::TABLE;

    #[test]
    fn on_chip_starts_at_a_class_of_rows() {
        let from = |rows: u32| match Plan::default().with_on_chip_from(rows).lowerings() {
            Lowerings::Separate(parts) => parts.on_chip_from(),
            Lowerings::Merged => 0,
        };
        assert_eq!([0, 1, 2, 3, 4, 7, 8, 16, 1000].map(from), [1, 1, 2, 2, 4, 4, 8, 16, 16]);
    }

    #[test]
    fn a_part_s_plan_computes_it_by_its_lowering() {
        for row in &TABLE {
            let plan = Plan::default().with_part(row.computes);
            assert_eq!(plan.of(row.part()), row.lowering());
            assert_eq!(plan.is_merged(), row.lowering() == Lowering::Merged);
        }
    }
}
