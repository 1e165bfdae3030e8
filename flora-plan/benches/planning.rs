//! What planning costs at serving time: every layer of StarCoder 15B, for a batch that was not seen before and for one that was.

#[path = "../tests/planner/coefficients.rs"]
mod coefficients;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use flora_plan::batch::{AdapterSlots, BatchShape, BatchSummary, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::cost::PricedLayer;
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::model_planner::ModelPlanner;

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// Every projection of StarCoder 15B, layer after layer, with biases.
fn planner() -> ModelPlanner {
    let (d, head, ffn) = (6144, 128, 24576);
    let projections = [(d, d), (d, head), (d, head), (d, d), (d, ffn), (ffn, d)];
    let layer = |(d, k)| (PricedLayer { shape: LayerShape { d, k }, format: LayerFormat::default() }, true);
    let layers = std::iter::repeat_n(projections, 40).flatten().map(layer);
    ModelPlanner::new(&coefficients::device(1, false), layers)
}

/// Adapters of every kind.
fn adapters() -> Vec<AdapterSlots> {
    let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
    let of_kind = |position: u32| match position % 4 {
        0 => AdapterSlots::base(),
        1 => AdapterSlots { low_rank: LowRankSlots { shrink: 0, expand: 0, rank: 8 }, ..AdapterSlots::base() },
        _ => AdapterSlots { virtual_rows: vec![scales; 8], ..AdapterSlots::base() },
    };
    (0..64).map(of_kind).collect()
}

fn segments(seed: u32) -> Vec<Segment> {
    (0..64u32).map(|adapter| Segment { rows: 1 + (adapter * seed + seed / 7) % 40, adapter }).collect()
}

fn shapes(count: u32) -> Vec<BatchShape> {
    let adapters = adapters();
    (0..count).map(|seed| BatchShape::of(&segments(seed), &adapters)).collect()
}

/// The batch of 64 segments of four kinds is summed up, and 240 layers planned.
#[divan::bench]
fn unseen_batch(bencher: Bencher) {
    let (mut planner, adapters, mut summary) = (planner(), adapters(), BatchSummary::default());
    let mut seed = 0;
    bencher
        .counter(ItemsCount::new(240u32))
        .with_inputs(|| {
            seed += 1;
            segments(seed)
        })
        .bench_local_refs(|segments| {
            planner.plans(&summary.shape(black_box(segments), &adapters)).filter(|plan| plan.splits()).count()
        });
}

/// Pricing alone.
#[divan::bench]
fn unseen_shape(bencher: Bencher) {
    let (mut planner, shapes) = (planner(), shapes(100_000));
    let mut at = 0;
    bencher.bench_local(move || {
        at = (at + 1) % shapes.len();
        planner.plans(black_box(&shapes[at])).len()
    });
}

/// Looking a shape up: the plan of one layer is read, as its launch does.
#[divan::bench]
fn seen_shape(bencher: Bencher) {
    let (mut planner, shapes) = (planner(), shapes(1));
    planner.plans(&shapes[0]).len();
    bencher.bench_local(move || planner.plans(black_box(&shapes[0])).next());
}
