//! What a plan does to a batch: launches, MACs and bytes, step by step as [`schedule`](crate::schedule::schedule) lays them out.
//! The two parts of a plan don't touch one another's work, but for what a materialised weight holds already; so each is priced once.

use super::{Kernel, MOST_TERMS, PricedLayer, Regime, Term, Work};
use crate::batch::{BatchShape, GroupShape};
use crate::lowering::{AdditiveLowering, MultiplicativeLowering};
use crate::plan::Plan;

/// The work of `plan` on a batch; `finishes` where the layer has an epilogue, `pads` on devices whose batched matmul multiplies
/// padding.
pub fn work(plan: &Plan, layer: PricedLayer, batch: &BatchShape, finishes: bool, pads: bool) -> Work {
    let (batch, lowerings) = (plan.seen(batch), plan.parts());
    let parts = Parts { layer, batch: &batch, finishes, pads };
    let mut work = parts.multiplicative(lowerings.multiplicative, lowerings.on_chip_from());
    for more in [parts.additive(lowerings.additive, lowerings.multiplicative), parts.merged()] {
        work.launches += more.launches;
        // All of them together have no more than the most terms.
        work.terms.extend(more.terms);
    }
    work
}

/// A batch whose plans are priced part by part.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) layer: PricedLayer,
    pub(crate) batch: &'a BatchShape,
    pub(crate) finishes: bool,
    pub(crate) pads: bool,
}

impl Work {
    fn term(&mut self, kernel: Kernel, regime: Regime, macs: u64, bytes: u64) {
        debug_assert!(self.terms.len() < MOST_TERMS);
        // Never full: no plan has more than the most terms.
        let _ = self.terms.try_push(Term { kernel, regime, macs, bytes });
    }
}

/// The regime of a kernel that serves a group of adapters.
fn regime(group: &GroupShape) -> Regime {
    let (rows, adapters) = (group.tokens.max(1) as f64, group.adapters.max(1) as f64);
    Regime { rows: rows / adapters, rank: group.tokens_times_width as f64 / rows, adapters }
}

impl Parts<'_> {
    fn weights(&self) -> u64 {
        u64::from(self.layer.shape.d) * u64::from(self.layer.shape.k)
    }

    /// d + k
    fn vectors(&self) -> u64 {
        u64::from(self.layer.shape.d) + u64::from(self.layer.shape.k)
    }

    /// Bytes of so many rows of x and of y.
    fn row_bytes(&self, rows: u64) -> u64 {
        self.layer.format.activations.bytes() * rows * self.vectors()
    }

    /// Bytes of so many pairs of an in-vector and an out-vector.
    fn vector_bytes(&self, pairs: u64) -> u64 {
        self.layer.format.adapters.bytes() * pairs * self.vectors()
    }

    /// One pass over the resident W_i, which holds both parts of its adapter, for the rows that are apart.
    pub(crate) fn merged(&self) -> Work {
        let Self { layer, batch, .. } = *self;
        let (mut work, weights, rows) = (Work::default(), self.weights(), batch.merged_rows());
        if rows > 0 {
            work.launches = 1;
            let bytes = layer.format.activations.bytes() * weights + self.row_bytes(rows);
            work.term(Kernel::Merged, Regime::of_rows(rows), rows * weights, bytes);
        }
        work
    }

    /// The passes over W0, base rows and the base rows of additive adapters among them; `on_chip` serves segments of at least
    /// `on_chip_from` rows.
    pub(crate) fn multiplicative(&self, lowering: MultiplicativeLowering, on_chip_from: u32) -> Work {
        let Self { layer, batch, .. } = *self;
        let (weights, weight_bytes) = (self.weights(), layer.format.weight.bytes(layer.shape));
        let mut work = Work::default();
        if batch.tokens == 0 {
            return work;
        }
        let all = batch.multiplicative;
        // What is stacked, what is made on chip, what is made in memory.
        let (stacked, on_chip, made) = match lowering {
            MultiplicativeLowering::Stacked => (all, GroupShape::default(), GroupShape::default()),
            MultiplicativeLowering::OnChip => {
                let (wide, _) = batch.wide_from(on_chip_from);
                let stacked = GroupShape {
                    tokens: all.tokens - wide.tokens,
                    tokens_times_width: all.tokens_times_width - wide.tokens_times_width,
                    widths: all.widths.saturating_sub(wide.widths),
                    ..all
                };
                (stacked, wide, GroupShape::default())
            }
            MultiplicativeLowering::Bmm => (GroupShape::default(), GroupShape::default(), all),
        };
        let rows = batch.plain_rows + stacked.tokens_times_width;
        if rows > 0 {
            work.launches = 1;
            let kernel = if stacked.tokens_times_width == 0 { Kernel::Matmul } else { Kernel::Stacked };
            let bytes =
                weight_bytes + self.row_bytes(batch.plain_rows + stacked.tokens) + self.vector_bytes(stacked.widths);
            work.term(kernel, Regime::of_rows(rows), rows * weights, bytes);
        }
        if on_chip.tokens > 0 {
            // In the launch of the other rows, if there are any.
            let weight_bytes = if work.launches == 0 { weight_bytes } else { 0 };
            work.launches = 1;
            let bytes = weight_bytes + self.row_bytes(on_chip.tokens) + self.vector_bytes(on_chip.widths);
            work.term(Kernel::OnChip, regime(&on_chip), (on_chip.tokens + on_chip.widths) * weights, bytes);
        }
        if made.tokens > 0 {
            work.launches += 2;
            let products = made.tokens + made.widths + batch.scaled_additive.widths;
            let made_bytes = 2 * layer.format.activations.bytes() * made.adapters * weights;
            let vectors = self.vector_bytes(made.widths + batch.scaled_additive.widths);
            let bytes = weight_bytes + made_bytes + self.row_bytes(made.tokens) + vectors;
            work.term(Kernel::Bmm, regime(&made), products * weights, bytes);
        }
        work
    }

    /// The low-rank sums, beside virtual rows that are computed by `multiplicative`.
    pub(crate) fn additive(&self, lowering: AdditiveLowering, multiplicative: MultiplicativeLowering) -> Work {
        let Self { layer, batch, finishes, pads } = *self;
        let mut work = Work::default();
        let group = batch.summed_beside(multiplicative);
        if group.tokens == 0 {
            return work;
        }
        let products = group.tokens_times_width * self.vectors();
        let activations = layer.format.activations.bytes();
        match lowering {
            AdditiveLowering::Bmm => {
                // Gather shrink and expand vectors, multiply twice: the paper's c1 is what all of that costs a MAC.
                let (rows, ranks, products) = if pads {
                    let padded = group.adapters * group.longest;
                    (padded, group.adapters * group.largest_width, padded * group.largest_width * self.vectors())
                } else {
                    (group.tokens, group.widths, products)
                };
                work.launches = 6;
                let bytes = self.row_bytes(rows) + self.vector_bytes(ranks);
                work.term(Kernel::LowRankBmm, regime(&group), products, bytes);
            }
            AdditiveLowering::Segmented => {
                work.launches = 2;
                // y is read and written again.
                let again = activations * group.tokens * u64::from(layer.shape.k);
                let bytes = self.row_bytes(group.tokens) + again + self.vector_bytes(group.widths);
                work.term(Kernel::Segmented, regime(&group), products, bytes);
            }
            // In the launch of the base GEMM.
            AdditiveLowering::Fused => {
                work.term(Kernel::Fused, regime(&group), products, self.vector_bytes(group.widths));
            }
        }
        if lowering.adds_later() && finishes {
            work.launches += 1;
            let rows = batch.all_rows();
            let bytes = 2 * activations * rows * u64::from(layer.shape.k);
            work.term(Kernel::Move, Regime::of_rows(rows), 0, bytes);
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
    use crate::layer::{LayerFormat, LayerShape};
    use crate::schedule::{Step, schedule};

    /// Every plan's work has as many launches as its schedule makes, on every mixture of rows.
    #[test]
    fn the_priced_launches_are_the_scheduled_ones() {
        let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
        let low_rank = LowRankSlots { shrink: 0, expand: 0, rank: 2 };
        let adapters = [
            AdapterSlots::base(),
            AdapterSlots { virtual_rows: vec![scales; 3], ..AdapterSlots::base() },
            AdapterSlots { low_rank, ..AdapterSlots::base() },
            AdapterSlots { virtual_rows: vec![scales], low_rank, is_merged: false },
            AdapterSlots { virtual_rows: vec![scales; 2], low_rank, is_merged: false },
        ];
        let layer = PricedLayer { shape: LayerShape { d: 8, k: 4 }, format: LayerFormat::default() };
        for (mixture, merged) in (1u32..32).flat_map(|mixture| (0..6usize).map(move |merged| (mixture, merged))) {
            let present = (0..5u32).filter(|adapter| mixture >> adapter & 1 == 1);
            let segments: Vec<_> = present.map(|adapter| Segment { rows: adapter + 1, adapter }).collect();
            // Of one past the last adapter no weight is resident.
            let mut adapters = adapters.clone();
            adapters.iter_mut().enumerate().for_each(|(position, own)| own.is_merged = position == merged);
            for plan in Plan::all().flat_map(|plan| Plan::ON_CHIP_FROM.map(|rows| plan.with_on_chip_from(rows))) {
                for finishes in [false, true] {
                    let steps = schedule(&plan, layer.shape, &segments, &adapters, finishes).expect("a small batch");
                    let launches: u64 = steps.steps().iter().map(Step::launches).sum();
                    let work = work(&plan, layer, &BatchShape::of(&segments, &adapters), finishes, true);
                    let of = format!("{mixture:05b} merged {merged} {plan:?} finishes {finishes}");
                    assert_eq!(work.launches, launches, "{of}");
                }
            }
        }
    }
}
