//! Per batch: prices the handful of plans and picks the cheapest that can run.

use serde::Serialize;

use crate::batch::{BatchShape, ROW_CLASSES};
use crate::cost::{LayerPrices, Parts, work};
use crate::lowering::{AdditiveLowering, Lowering, MultiplicativeLowering, Part, PartLowering, lowerings_of};
use crate::schedule::can_hold;

/// How a batch's adapters are computed. Base rows need no choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    parts: SeparateParts,
    merges: bool,
    splits: bool,
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
        Self { parts, merges: false, splits: false }
    }

    /// The same, with a part computed by this lowering.
    #[must_use]
    pub fn with_part(self, part: PartLowering) -> Self {
        let parts = self.parts;
        match part {
            PartLowering::Multiplicative(multiplicative) => {
                Self { parts: SeparateParts { multiplicative, ..parts }, ..self }
            }
            PartLowering::Additive(additive) => Self { parts: SeparateParts { additive, ..parts }, ..self },
            PartLowering::Merged(_) => self.with_merged(),
        }
    }

    /// The same, with the rows of the adapter whose W_i is resident multiplied by it, which holds both of its parts. Those of other
    /// adapters are computed as before, and so are all where no weight is resident.
    #[must_use]
    pub const fn with_merged(self) -> Self {
        Self { merges: true, ..self }
    }

    /// What a batch is computed by where nobody chooses: the fused launch, each segment's lowering by its own rows, so that what else is
    /// in the batch changes nothing. Fewer rows than these cost less as virtual rows (`stacked`) on every device that was measured.
    /// Rows of the adapter whose W_i is resident are always multiplied by it, for the same reason.
    pub fn fixed() -> Self {
        Self::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(8).with_merged()
    }

    /// The same for the gradient of the input: r virtual rows of t tokens cost r · t products, and t + r + 1 on chip, which is less
    /// from t = 4 on for every r but 1. Resident weights are none of training's.
    pub fn fixed_adjoint() -> Self {
        Self::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(4)
    }

    /// The plan of a batch that the adapter whose W_i is resident has to itself: [`Plan::default`] for whatever else is in it.
    pub const MERGED: Self = Self { parts: DEFAULT_PARTS, merges: true, splits: false };

    /// The choices of [`Plan::with_on_chip_from`].
    pub const ON_CHIP_FROM: [u32; ROW_CLASSES] = [1, 2, 4, 8, 16];

    /// Every pair of lowerings, without a resident weight and with one.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::unmerged().flat_map(|plan| [plan, plan.with_merged()])
    }

    /// Every pair of lowerings; these need no weight made beforehand.
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
    /// rows of shorter ones are stacked. A segment's own length decides, not what stands beside it in the batch.
    #[must_use]
    pub fn with_on_chip_from(self, rows: u32) -> Self {
        let [first, others @ ..] = Self::ON_CHIP_FROM;
        let on_chip_from = others.into_iter().filter(|from| *from <= rows).fold(first, u32::max);
        Self { parts: SeparateParts { on_chip_from, ..self.parts }, ..self }
    }

    /// Whether cubes may share the depth.
    pub fn splits(&self) -> bool {
        self.splits
    }

    /// Whether rows of the adapter whose W_i is resident are multiplied by it.
    pub fn merges(&self) -> bool {
        self.merges
    }

    /// What computes the parts of the rows that aren't multiplied by a resident W_i.
    pub fn parts(&self) -> SeparateParts {
        self.parts
    }

    /// The lowering of a part of these rows.
    pub fn of(&self, part: Part) -> Lowering {
        match part {
            Part::Multiplicative => self.parts.multiplicative.lowering(),
            Part::Additive => self.parts.additive.lowering(),
        }
    }

    /// A batch as the plan sees it: with the rows of a resident W_i apart, or all alike.
    pub(crate) fn seen(&self, batch: &BatchShape) -> BatchShape {
        if self.merges { *batch } else { batch.joined() }
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
        Self { parts: DEFAULT_PARTS, merges: false, splits: false }
    }
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.merges {
            write!(f, "{}+", Lowering::Merged)?;
        }
        write!(f, "{}+{}", self.parts.multiplicative, self.parts.additive)
    }
}

/// The candidates for one part of a batch, cheapest first. `merged` is among them where a weight of the batch's adapters is resident:
/// its time is that of the whole batch, too, with the other rows by whatever is cheapest.
pub fn candidates(part: Part, prices: &LayerPrices, batch: &BatchShape) -> Vec<Candidate> {
    let price = |plan: Plan| prices.price(&work(&plan, prices.layer(), batch, false, prices.pads_blocks()));
    let plans = |computes: PartLowering| {
        Plan::unmerged().filter_map(move |plan| match computes {
            PartLowering::Merged(_) => Some(plan.with_merged()),
            _ => (plan.of(part) == computes.lowering()).then_some(plan),
        })
    };
    let mut candidates: Vec<_> = lowerings_of(part)
        .filter(|row| row.lowering() != Lowering::Merged || batch.merged.is_some())
        .map(|row| Candidate {
            lowering: row.lowering(),
            predicted_seconds: plans(row.computes)
                .flat_map(|plan| starts_of(plan, &plan.seen(batch)).map(move |rows| plan.with_on_chip_from(rows)))
                .map(price)
                .fold(f64::INFINITY, f64::min),
        })
        .collect();
    candidates.sort_by(|one, other| one.predicted_seconds.total_cmp(&other.predicted_seconds));
    candidates
}

/// The choices of [`Plan::with_on_chip_from`] that make a difference to the separate rows of a batch.
fn starts_of(plan: Plan, batch: &BatchShape) -> impl Iterator<Item = u32> + use<> {
    let classes = batch.wide;
    let chooses = match plan.parts.multiplicative {
        MultiplicativeLowering::OnChip => true,
        MultiplicativeLowering::Stacked | MultiplicativeLowering::Bmm => false,
    };
    let differs = move |(class, _): &(usize, u32)| {
        let rows = |class: usize| classes[class].tokens > 0;
        *class == 0 || chooses && rows(*class - 1) && (*class..ROW_CLASSES).any(rows)
    };
    Plan::ON_CHIP_FROM.into_iter().enumerate().filter(differs).map(|(_, rows)| rows)
}

/// Picks the cheapest plan for this batch whose buffers the device can hold and kernels can index; `finishes` where the layer has
/// an epilogue. Whether a weight is worth keeping is no question of one batch: where one is resident, the batch runs by it as far as
/// that is cheaper. Allocates nothing.
pub fn plan(prices: &LayerPrices, batch: &BatchShape, finishes: bool) -> Plan {
    let separate = cheapest(prices, &batch.joined(), finishes, false);
    let chosen = match batch.merged {
        Some(_) => {
            let merged = cheapest(prices, batch, finishes, true);
            if merged.0 < separate.0 { merged.1 } else { separate.1 }
        }
        None => separate.1,
    };
    let split = chosen.with_split();
    let may_split = may_split(&chosen, &chosen.seen(batch), prices.split_rows());
    if may_split && can_hold(&split, prices.layer().shape, batch, prices.largest_buffer_bytes()) {
        split
    } else {
        chosen
    }
}

/// The cheapest plan, with its price, of those that merge or don't, for a batch as they see it.
fn cheapest(prices: &LayerPrices, batch: &BatchShape, finishes: bool, merges: bool) -> (f64, Plan) {
    let parts = Parts { layer: prices.layer(), batch, finishes, pads: prices.pads_blocks() };
    let holds = |plan: &Plan| can_hold(plan, prices.layer().shape, batch, prices.largest_buffer_bytes());
    let merged = if merges { prices.price(&parts.merged()) } else { 0.0 };
    let mut best = (f64::INFINITY, Plan::default());
    // The low-rank sums are other ones only where materialised weights hold some of them.
    let mut of_additive = [None; 2];
    for multiplicative in MultiplicativeLowering::ALL {
        for rows in starts_of(Plan::default().with_part(PartLowering::Multiplicative(multiplicative)), batch) {
            let own = merged + prices.price(&parts.multiplicative(multiplicative, rows));
            let materialises = usize::from(multiplicative.materialises());
            let price = |additive| prices.price(&parts.additive(additive, multiplicative));
            let additives = *of_additive[materialises].get_or_insert_with(|| AdditiveLowering::ALL.map(price));
            for (additive, added) in AdditiveLowering::ALL.into_iter().zip(additives) {
                let plan = Plan::new(multiplicative, additive).with_on_chip_from(rows);
                let plan = if merges { plan.with_merged() } else { plan };
                if own + added < best.0 && holds(&plan) {
                    best = (own + added, plan);
                }
            }
        }
    }
    best
}

/// Whether a batch is one of so few stacked rows, and no more of a resident W_i, that tuning found it faster split.
fn may_split(plan: &Plan, batch: &BatchShape, split_rows: u64) -> bool {
    match plan.parts.multiplicative {
        MultiplicativeLowering::Stacked => {
            let rows = batch.plain_rows.saturating_add(batch.multiplicative.tokens_times_width);
            (1..=split_rows).contains(&rows) && batch.merged_rows() <= split_rows
        }
        MultiplicativeLowering::OnChip | MultiplicativeLowering::Bmm => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lowering::TABLE;

    #[test]
    fn on_chip_starts_at_a_class_of_rows() {
        let from = |rows: u32| Plan::default().with_on_chip_from(rows).parts().on_chip_from();
        assert_eq!([0, 1, 2, 3, 4, 7, 8, 16, 1000].map(from), [1, 1, 2, 2, 4, 4, 8, 16, 16]);
    }

    #[test]
    fn a_part_s_plan_computes_it_by_its_lowering() {
        for row in &TABLE {
            let plan = Plan::default().with_part(row.computes);
            assert_eq!(plan.merges(), row.lowering() == Lowering::Merged);
            assert!(plan.merges() || plan.of(row.part()) == row.lowering());
        }
    }

    /// Whose rows a fixed plan multiplies by a resident weight doesn't depend on their number, and gradients know of none.
    #[test]
    fn the_fixed_plan_merges_and_its_adjoint_does_not() {
        assert!(Plan::fixed().merges() && !Plan::fixed_adjoint().merges());
        assert_eq!(Plan::default().with_merged(), Plan::MERGED);
    }
}
