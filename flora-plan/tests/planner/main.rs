//! The planner against the model written out, on surfaces of random numbers.

mod coefficients;
mod files;

use flora_plan::batch::{AdapterSlots, BatchShape, BatchSummary, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::cost::{DeviceCoefficients, GradientKernel, LayerPrices, PricedLayer, work};
use flora_plan::gradient::GradientLowering;
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{Lowering, Part};
use flora_plan::model_planner::ModelPlanner;
use flora_plan::plan::{Plan, candidates, plan};
use flora_plan::schedule::{ScheduleError, can_hold, schedule};
use proptest::prelude::*;

use crate::coefficients::device;

/// Adapters of every kind with this width.
fn adapter(kind: u32, width: u32) -> AdapterSlots {
    let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
    let low_rank = LowRankSlots { shrink: 0, expand: 0, rank: width };
    let many = vec![scales; width as usize];
    match kind {
        0 => AdapterSlots::base(),
        1 => AdapterSlots { virtual_rows: many, ..AdapterSlots::base() },
        2 => AdapterSlots { low_rank, ..AdapterSlots::base() },
        3 => AdapterSlots { virtual_rows: vec![scales], low_rank, is_merged: false },
        _ => AdapterSlots { virtual_rows: many, low_rank, is_merged: false },
    }
}

/// With the weight of one of the adapters resident, or with none.
fn batches() -> impl Strategy<Value = (Vec<Segment>, Vec<AdapterSlots>)> {
    let adapters = proptest::collection::vec((0u32..5, 1u32..20), 1..6);
    let segments = proptest::collection::vec((0u32..40, 0usize..100), 0..12);
    (adapters, segments, 0usize..8).prop_map(|(adapters, segments, merged)| {
        let count = adapters.len();
        let segments =
            segments.into_iter().map(|(rows, adapter)| Segment { rows, adapter: (adapter % count) as u32 }).collect();
        let adapters = adapters
            .into_iter()
            .enumerate()
            .map(|(position, (kind, width))| AdapterSlots { is_merged: position == merged, ..adapter(kind, width) });
        (segments, adapters.collect())
    })
}

fn layer(d: u32, k: u32) -> PricedLayer {
    PricedLayer { shape: LayerShape { d, k }, format: LayerFormat::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// No plan that can be made costs less than the chosen one.
    #[test]
    fn the_chosen_plan_is_the_cheapest((segments, adapters) in batches(), seed in 0u64..1000, finishes: bool, pads: bool) {
        let coefficients = device(seed, pads);
        let prices = LayerPrices::new(&coefficients, layer(700, 300));
        let batch = BatchShape::of(&segments, &adapters);
        let price = |plan: &Plan| prices.price(&work(plan, prices.layer(), &batch, finishes, pads));
        let chosen = plan(&prices, &batch, finishes);
        let has_merged_rows = segments.iter().any(|own| own.rows > 0 && adapters[own.adapter as usize].is_merged);
        prop_assert!(!chosen.merges() || has_merged_rows);
        for other in Plan::all().flat_map(|plan| Plan::ON_CHIP_FROM.map(|rows| plan.with_on_chip_from(rows))) {
            let (own, other_price) = (price(&chosen), price(&other));
            prop_assert!(own <= other_price * (1.0 + 1e-12), "{:?} at {} and {:?} at {}", chosen, own, other, other_price);
        }
    }

    /// A model's planner says for every layer what the planner says for it alone, the first time and again.
    #[test]
    fn a_model_s_plans_are_its_layers((segments, adapters) in batches(), seed in 0u64..1000) {
        let coefficients = device(seed, false);
        let layers = [(layer(700, 300), true), (layer(64, 64), false), (layer(700, 300), true), (layer(700, 300), false)];
        let mut model = ModelPlanner::new(&coefficients, layers);
        let mut summary = BatchSummary::default();
        for _ in 0..2 {
            let batch = summary.shape(&segments, &adapters);
            prop_assert_eq!(batch, BatchShape::of(&segments, &adapters));
            let plans: Vec<Plan> = model.plans(&batch).collect();
            let alone = layers.map(|(layer, finishes)| plan(&LayerPrices::new(&coefficients, layer), &batch, finishes));
            prop_assert_eq!(plans, alone.to_vec());
        }
    }
}

/// A multiply-add takes as long on every kernel, and a weight as long to read as 20 rows by it to multiply.
fn level() -> DeviceCoefficients {
    let mut coefficients = device(3, false);
    coefficients.seconds_per_launch = 0.0;
    coefficients.seconds_per_byte = 5e-12;
    let surfaces = coefficients.formats.values_mut().flat_map(|own| own.seconds_per_mac.values_mut());
    surfaces.for_each(|surface| surface.seconds_per_mac.fill(1e-12));
    coefficients
}

/// fLoRA of rank 16 makes a W_i on chip for 16 rows' worth of products: a resident one pays where its rows are more than the reading of a
/// weight costs beyond that, and is left alone where they are few.
#[test]
fn a_resident_weight_serves_an_adapter_of_most_rows() {
    let coefficients = level();
    let prices = LayerPrices::new(&coefficients, layer(512, 512));
    let choose = |own: u32, merged: bool| {
        let resident = AdapterSlots { is_merged: merged, ..adapter(1, 16) };
        let segments = [Segment { rows: 40, adapter: 0 }, Segment { rows: own, adapter: 1 }];
        plan(&prices, &BatchShape::of(&segments, &[AdapterSlots::base(), resident]), false)
    };
    for (own, merges) in [(0, false), (1, false), (2, false), (3, false), (6, true), (100, true), (1000, true)] {
        assert_eq!(choose(own, true).merges(), merges, "{own} rows of 40 and these");
        assert!(!choose(own, false).merges(), "no weight is resident");
    }
    // The others' plan is the one that they have without it.
    let others = BatchShape::of(&[Segment { rows: 40, adapter: 0 }], &[AdapterSlots::base()]);
    assert_eq!(choose(100, true), plan(&prices, &others, false).with_merged());
    // A launch more that takes as long as what it spares.
    let slow = DeviceCoefficients { seconds_per_launch: 1.0, ..coefficients };
    let batch = [Segment { rows: 40, adapter: 0 }, Segment { rows: 100, adapter: 1 }];
    let batch = BatchShape::of(&batch, &[AdapterSlots::base(), adapter(1, 16).merged()]);
    assert!(!plan(&LayerPrices::new(&slow, layer(512, 512)), &batch, false).merges());
}

/// `merged` is a candidate where a weight is resident, at the price of the whole batch.
#[test]
fn a_resident_weight_is_a_candidate() {
    let coefficients = level();
    let prices = LayerPrices::new(&coefficients, layer(512, 512));
    let segments = [Segment { rows: 30, adapter: 0 }, Segment { rows: 100, adapter: 1 }];
    let shape = |resident: AdapterSlots| BatchShape::of(&segments, &[adapter(1, 16), resident]);
    let of = |batch: &BatchShape, part| {
        let candidates = candidates(part, &prices, batch).into_iter();
        candidates.map(|own| (own.lowering, own.predicted_seconds)).collect::<Vec<_>>()
    };
    let (without, with) = (shape(adapter(1, 16)), shape(adapter(1, 16).merged()));
    let separate = of(&without, Part::Multiplicative);
    assert!(separate.iter().all(|(lowering, _)| *lowering != Lowering::Merged));
    let all = of(&with, Part::Multiplicative);
    let (merged, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(lowering, _)| *lowering == Lowering::Merged);
    assert_eq!(others, separate, "the others are priced as if nothing were resident");
    let best = Plan::unmerged().flat_map(|plan| Plan::ON_CHIP_FROM.map(|rows| plan.with_on_chip_from(rows)));
    let best = best.map(|plan| prices.price(&work(&plan.with_merged(), prices.layer(), &with, false, false)));
    assert_eq!(merged, [(Lowering::Merged, best.fold(f64::INFINITY, f64::min))]);
    assert!(merged[0].1 < others[0].1);
}

/// The plan that a device can't hold isn't chosen, however cheap.
#[test]
fn what_does_not_fit_is_not_chosen() {
    let mut coefficients = device(3, true);
    let cheap = coefficients.formats.values_mut().next().expect("a format");
    let bmm = cheap.seconds_per_mac.get_mut(&flora_plan::cost::Kernel::Bmm).expect("a surface");
    bmm.seconds_per_mac.fill(1e-30);
    coefficients.seconds_per_launch = 0.0;
    coefficients.seconds_per_byte = 0.0;
    let segments: Vec<Segment> = (0..8).map(|adapter| Segment { rows: 50, adapter }).collect();
    let adapters = vec![adapter(1, 9); 8];
    let batch = BatchShape::of(&segments, &adapters);
    let choose = |coefficients: &_| plan(&LayerPrices::new(coefficients, layer(512, 512)), &batch, false);
    assert_eq!(choose(&coefficients).of(Part::Multiplicative), Lowering::Bmm);
    coefficients.largest_buffer_bytes = Some(4 << 20);
    assert_ne!(choose(&coefficients).of(Part::Multiplicative), Lowering::Bmm);
}

/// Cubes share the depth only where the device can hold their partial sums.
#[test]
fn partial_sums_that_do_not_fit_are_not_chosen() {
    let mut coefficients = device(3, true);
    coefficients.blueprints.split_rows = 1024;
    let (segments, adapters) = ([Segment { rows: 512, adapter: 0 }], [AdapterSlots::base()]);
    let batch = BatchShape::of(&segments, &adapters);
    let choose = |coefficients: &_| plan(&LayerPrices::new(coefficients, layer(4096, 64)), &batch, false);
    assert!(choose(&coefficients).splits());
    // 512 rows of 64 columns, eight times.
    coefficients.largest_buffer_bytes = Some(8 * 512 * 64 * 4);
    assert!(choose(&coefficients).splits());
    coefficients.largest_buffer_bytes = Some(8 * 512 * 64 * 4 - 1);
    assert!(!choose(&coefficients).splits());
}

/// Sums of extents that 64 bits don't count are too large, not small.
#[test]
fn extents_of_any_size_are_counted() {
    let shape = LayerShape { d: 1, k: 1 };
    let low_rank = LowRankSlots { shrink: 0, expand: 0, rank: 1 << 31 };
    let adapters = vec![AdapterSlots { low_rank, ..AdapterSlots::base() }; 128];
    // 128 adapters, 2^30 rows of the longest, 2^31 ranks: 2^68 sums.
    let rows = |adapter: u32| if adapter == 0 { 1 << 30 } else { 1 };
    let segments: Vec<Segment> = (0..128).map(|adapter| Segment { rows: rows(adapter), adapter }).collect();
    for plan in Plan::unmerged() {
        assert!(!can_hold(&plan, shape, &BatchShape::of(&segments, &adapters), None), "{plan:?}");
        let refused = schedule(&plan, shape, &segments, &adapters, false);
        assert!(matches!(refused, Err(ScheduleError::TooLarge { .. })), "{plan:?}");
    }
    let rows = vec![Segment { rows: u32::MAX, adapter: 0 }; 3];
    let batch = BatchShape::of(
        &rows,
        &[AdapterSlots { low_rank: LowRankSlots { rank: u32::MAX, ..low_rank }, ..AdapterSlots::base() }],
    );
    assert!(!can_hold(&Plan::default(), shape, &batch, None));
}

/// Gradients of scales go by what the device takes for them, and by multiply-adds where that wasn't measured.
#[test]
fn gradients_are_priced() {
    let measured = |of_reduced: f64, of_outer: f64| {
        let mut coefficients = coefficients::device(3, false);
        coefficients.seconds_per_byte = 0.0;
        for (kernel, value) in [(GradientKernel::Reduced, of_reduced), (GradientKernel::Outer, of_outer)] {
            for own in coefficients.formats.values_mut() {
                own.gradients.get_mut(&kernel).expect("every kernel").seconds_per_mac.fill(value);
            }
        }
        coefficients
    };
    let chosen = |coefficients: &DeviceCoefficients, rows, scales| {
        LayerPrices::new(coefficients, layer(61, 37)).gradient_lowering(rows, scales)
    };
    for (rows, scales) in [(1, 1), (3, 2), (5, 2), (9, 3), (128, 32)] {
        let [equal, reduced, outer] = [(1.0, 1.0), (1.0, 1e3), (1e3, 1.0)].map(|(one, other)| measured(one, other));
        assert_eq!(chosen(&equal, rows, scales), GradientLowering::cheapest(rows, scales));
        assert_eq!(chosen(&reduced, rows, scales), GradientLowering::Reduced);
        assert_eq!(chosen(&outer, rows, scales), GradientLowering::Outer);
        let mut unmeasured = outer;
        unmeasured.formats.values_mut().for_each(|own| own.gradients.clear());
        assert_eq!(unmeasured.check(), Ok(()));
        assert_eq!(chosen(&unmeasured, rows, scales), GradientLowering::cheapest(rows, scales));
    }
    let mut damaged = coefficients::device(3, false);
    damaged.formats.values_mut().for_each(|own| drop(own.gradients.remove(&GradientKernel::Pairs)));
    assert!(damaged.check().is_err_and(|reason| reason.contains("no surface for `pairs`")));
}
