//! From which share of a batch's rows on a resident weight pays: what says whether to keep one, which no single batch does.

use flora::prelude::*;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::LayerPrices;
use flora_plan::plan::plan;

/// Shares that are looked at.
const SHARES: u64 = 20;

/// The least share of as many rows as `segments` of `tokens` have from which on the planner multiplies one adapter's by its resident
/// weight. The other rows are those of the other segments' adapters, as many for each, or base rows where there is no other. `None`
/// where it doesn't even where all rows are the adapter's.
pub(super) fn pays_from(
    prices: &LayerPrices,
    compiled: &CompiledLayer,
    rank: u32,
    (segments, tokens): (u32, u32),
) -> Option<f64> {
    let all = u64::from(segments) * u64::from(tokens);
    let steps = SHARES.min(all);
    let own_rows = (1..=steps).rev().map(|step| (all * step).div_ceil(steps));
    let paying =
        own_rows.take_while(|own| plan(prices, &shared(compiled, rank, segments, (*own, all)), false).merges());
    paying.last().map(|own| own as f64 / all as f64)
}

/// A batch of so many rows, `own` of which are the merged adapter's.
fn shared(compiled: &CompiledLayer, rank: u32, segments: u32, (own, all): (u64, u64)) -> BatchShape {
    let others = u64::from(segments - 1).max(1);
    let other = if segments > 1 { compiled.slots(rank, 0) } else { AdapterSlots::base() };
    let rest = all - own;
    let rows = |position: u64| rest / others + u64::from(position < rest % others);
    let rows: Vec<_> = [own].into_iter().chain((0..others).map(rows)).collect();
    // The rows of a whole batch are bounded by the command line.
    let segment = |(adapter, rows): (u32, u64)| Segment { rows: u32::try_from(rows).unwrap_or(u32::MAX), adapter };
    let segments: Vec<_> = (0..).zip(rows).map(segment).collect();
    let slots: Vec<_> =
        [compiled.slots(rank, 0).merged()].into_iter().chain(std::iter::repeat_n(other, others as usize)).collect();
    BatchShape::of(&segments, &slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_shared_whole() {
        let compiled = crate::commands::layer::open("flora").expect("a built-in layer").compiled;
        for (segments, own, all) in [(1, 3, 10), (1, 10, 10), (4, 3, 10), (4, 10, 10), (7, 1, 3)] {
            let shape = shared(&compiled, 4, segments, (own, all));
            assert_eq!((shape.merged_rows(), shape.all_rows()), (own, all), "{segments} segments");
            assert_eq!(shape.plain_rows, if segments == 1 { all - own } else { 0 });
            assert!(shape.multiplicative.longest <= (all - own).div_ceil(u64::from(segments - 1).max(1)));
        }
    }
}
