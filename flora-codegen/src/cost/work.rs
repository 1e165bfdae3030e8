//! What a plan does to a batch: launches, MACs and bytes, step by step as [`schedule`](crate::schedule::schedule) lays them out.

use super::{Kernel, Work};
use crate::batch::{BatchShape, GroupShape, LayerShape};
use crate::lowering::Lowering;
use crate::plan::Plan;

const F32: u64 = 4;

/// The work of `plan` on a batch; `finishes` where the layer has a bias or an activation, `pads` where the device's batched matmul
/// multiplies padding.
pub fn work(plan: &Plan, shape: LayerShape, batch: &BatchShape, finishes: bool, pads: bool) -> Work {
    let (d, k) = (u64::from(shape.d), u64::from(shape.k));
    let mut work = Work::default();
    if batch.tokens == 0 {
        return work;
    }
    let multiplicative = &batch.multiplicative;
    let materialises = plan.multiplicative() == Lowering::Bmm && multiplicative.tokens > 0;
    if multiplicative.tokens == 0 {
        work.gemm(Kernel::Matmul, shape, batch.plain_rows);
    } else {
        // Plain rows ride in the same launch.
        let scaled = if materialises { 0 } else { multiplicative.tokens_times_width };
        work.gemm(Kernel::Stacked, shape, batch.plain_rows + scaled);
        if materialises {
            work.materialised(shape, multiplicative, &batch.scaled_additive, pads);
        } else {
            work.add_bytes(F32 * multiplicative.widths * (d + k));
        }
    }
    let additive = if materialises { batch.additive } else { batch.additive.and(batch.scaled_additive) };
    if additive.tokens > 0 {
        match plan.additive() {
            Lowering::Bmm => work.low_rank_bmm(shape, &additive, pads),
            Lowering::Segmented | Lowering::Stacked => work.segmented(shape, &additive),
        }
    }
    let fused = multiplicative.tokens > 0 && work.launches == 1;
    if finishes && !fused {
        work.launches += 1;
        work.term(Kernel::Move, 0, 0, 2 * F32 * batch.tokens * k);
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

    /// Make W_i, gather the rows, multiply, scatter. The matmul's coefficient is measured with the packing, which grows with it.
    fn materialised(&mut self, shape: LayerShape, group: &GroupShape, additive: &GroupShape, pads: bool) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let padded = if pads { group.adapters * group.longest } else { group.tokens };
        let products = group.widths + additive.widths + group.adapters;
        self.launches += 4;
        self.term(Kernel::Materialise, 1, products * d * k, F32 * (group.adapters + 1) * d * k);
        self.term(Kernel::Bmm, group.longest, padded * d * k, F32 * (group.adapters * d * k + padded * (d + k)));
    }

    fn segmented(&mut self, shape: LayerShape, group: &GroupShape) {
        let (d, k) = (u64::from(shape.d), u64::from(shape.k));
        let bytes = F32 * (group.tokens * (d + 2 * k) + group.widths * (d + k) + 2 * group.tokens_times_width);
        self.launches += 2;
        self.term(Kernel::Segmented, group.longest, group.tokens_times_width * (d + k), bytes);
    }

    /// Gather rows, shrink and expand vectors, multiply twice, scatter: the paper's c1 is what all of that costs a MAC.
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
            for plan in Plan::all() {
                for finishes in [false, true] {
                    let steps = schedule(&plan, shape, &segments, &adapters, finishes).expect("a small batch");
                    let launches: u64 = steps.steps().iter().map(launches).sum();
                    let work = work(&plan, shape, &BatchShape::of(&segments, &adapters), finishes, true);
                    assert_eq!(work.launches, launches, "{mixture:04b} {plan:?} finishes {finishes}");
                }
            }
        }
    }

    fn launches(step: &Step) -> u64 {
        match step {
            Step::BaseGemm | Step::Stacked(_) | Step::Finish => 1,
            Step::Segmented { .. } => 2,
            Step::Materialised(_) => 4,
            Step::LowRankBmm(_) => 6,
        }
    }
}
