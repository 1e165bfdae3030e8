//! What a plan does to a batch: launches, MACs and bytes, step by step as [`schedule`](crate::schedule::schedule) lays them out.

use super::{Kernel, Work};
use crate::batch::{BatchShape, GroupShape};
use crate::layer::LayerShape;
use crate::lowering::Lowering;
use crate::plan::Plan;

const F32: u64 = 4;

/// The work of `plan` on a batch; `finishes` where the layer has an epilogue, `pads` on devices whose batched matmul multiplies
/// padding and whose tiles of W_i serve no more rows than a tile has.
pub fn work(plan: &Plan, shape: LayerShape, batch: &BatchShape, finishes: bool, pads: bool) -> Work {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let mut work = Work::default();
    if batch.tokens == 0 {
        return work;
    }
    let multiplicative = &batch.multiplicative;
    let lowering = plan.multiplicative();
    if lowering == Lowering::Merged {
        work.gemm(Kernel::Matmul, shape, batch.tokens);
        return work;
    }
    let materialises = lowering == Lowering::Bmm && multiplicative.tokens > 0;
    let on_chip = lowering == Lowering::OnChip && multiplicative.tokens > 0;
    let scaled = if lowering == Lowering::Stacked { multiplicative.tokens_times_width } else { 0 };
    let kernel = if scaled == 0 { Kernel::Matmul } else { Kernel::Stacked };
    // Rows of every kind that isn't materialised share one launch.
    work.gemm(kernel, shape, batch.plain_rows + scaled);
    if on_chip {
        work.on_chip(shape, multiplicative, pads);
    }
    if !materialises {
        work.add_bytes(F32 * multiplicative.widths * (d + k));
    }
    if materialises {
        work.materialised(shape, multiplicative, &batch.scaled_additive);
    }
    let additive = if materialises { batch.additive } else { batch.additive.and(batch.scaled_additive) };
    if additive.tokens > 0 {
        match plan.additive() {
            Lowering::Bmm => work.low_rank_bmm(shape, &additive, pads),
            Lowering::Segmented => work.segmented(shape, &additive),
            _ => work.fused(shape, &additive),
        }
        if plan.additive() != Lowering::Fused && finishes {
            work.launches += 1;
            work.term(Kernel::Move, 0, 0, 2 * F32 * batch.tokens * k);
        }
    }
    work
}

impl Work {
    fn gemm(&mut self, kernel: Kernel, shape: LayerShape, rows: u64) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        if rows > 0 {
            self.launches += 1;
            self.term(kernel, rows, rows * d * k, F32 * (d * k + rows * (d + k)));
        }
    }

    /// In the launch of the other rows, if there are any.
    fn on_chip(&mut self, shape: LayerShape, group: &GroupShape, pads: bool) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let made = if pads { group.widths_by_tile } else { group.widths };
        let weight = if self.launches == 0 { d * k } else { 0 };
        self.launches = 1;
        let bytes = F32 * (weight + group.tokens * (d + k));
        self.term(Kernel::OnChip, group.longest, (group.tokens + made) * d * k, bytes);
    }

    /// Make W_i, multiply.
    fn materialised(&mut self, shape: LayerShape, group: &GroupShape, additive: &GroupShape) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let products = group.widths + additive.widths + group.adapters;
        self.launches += 2;
        self.term(Kernel::Materialise, 1, products * d * k, F32 * (group.adapters + 1) * d * k);
        let bytes = F32 * (group.adapters * d * k + group.tokens * (d + k));
        self.term(Kernel::Bmm, group.longest, group.tokens * d * k, bytes);
    }

    /// In the launch of the base GEMM.
    fn fused(&mut self, shape: LayerShape, group: &GroupShape) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        self.term(Kernel::Fused, group.longest, group.tokens_times_width * (d + k), F32 * group.widths * (d + k));
    }

    fn segmented(&mut self, shape: LayerShape, group: &GroupShape) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let bytes = F32 * (group.tokens * (d + 2 * k) + group.widths * (d + k) + 2 * group.tokens_times_width);
        self.launches += 2;
        self.term(Kernel::Segmented, group.longest, group.tokens_times_width * (d + k), bytes);
    }

    /// Gather shrink and expand vectors, multiply twice: the paper's c1 is what all of that costs a MAC.
    fn low_rank_bmm(&mut self, shape: LayerShape, group: &GroupShape, pads: bool) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let (rows, ranks, products) = if pads {
            let padded = group.adapters * group.longest;
            (padded, group.adapters * group.largest_width, padded * group.largest_width)
        } else {
            (group.tokens, group.widths, group.tokens_times_width)
        };
        self.launches += 6;
        self.term(
            Kernel::LowRankBmm,
            group.longest,
            products * (d + k),
            F32 * ((rows + ranks) * (d + k) + 2 * products),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
    use crate::schedule::{Step, schedule};

    /// Every plan's work has as many launches as its schedule makes, on every mixture of rows.
    #[test]
    fn the_priced_launches_are_the_scheduled_ones() {
        let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
        let low_rank = LowRankSlots { shrink: 0, expand: 0, rank: 2 };
        let adapters = [
            AdapterSlots::base(),
            AdapterSlots { virtual_rows: vec![scales; 3], low_rank: LowRankSlots::default() },
            AdapterSlots { low_rank, ..AdapterSlots::base() },
            AdapterSlots { virtual_rows: vec![scales], low_rank },
        ];
        let shape = LayerShape { d: 8, k: 4 };
        for mixture in 1u32..16 {
            let present = (0..4u32).filter(|adapter| mixture >> adapter & 1 == 1);
            let segments: Vec<_> = present.map(|adapter| Segment { rows: adapter + 1, adapter }).collect();
            for plan in Plan::all().filter(|plan| *plan != Plan::MERGED || segments.len() == 1) {
                for finishes in [false, true] {
                    let steps = schedule(&plan, shape, &segments, &adapters, finishes).expect("a small batch");
                    let launches: u64 = steps.steps().iter().map(Step::launches).sum();
                    let work = work(&plan, shape, &BatchShape::of(&segments, &adapters), finishes, true);
                    assert_eq!(work.launches, launches, "{mixture:04b} {plan:?} finishes {finishes}");
                }
            }
        }
    }
}
