//! The backward pass of projections: adapters of every kind, folded from their equations, against the oracle.

use std::collections::BTreeMap;

use flora_ir::algebra::{FoldedAdapter, RankOne};
use flora_ir::gradient::FoldedGradient;
use flora_ir::{Activation, Bindings, Dimension, Shape, Value, builtin, parse, verify};
use flora_oracle::backward::{BatchRows, backward};
use flora_plan::batch::Segment;
use flora_plan::blueprints::Blueprints;
use flora_plan::cost::{
    Coefficients, DeviceCoefficients, GradientKernel, Kernel, LayerPrices, PricedLayer, SCHEMA, Surface,
};
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
use flora_plan::pipeline::{CompiledLayer, compile_verified};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Buffer, PlannedProjection, Planning, Projection, ProjectionGradient, ProjectionOptions, StepBatch, Wanted,
};
use proptest::prelude::*;

use crate::gradients::{Bound, TASKS, vectors};
use crate::problem::{config, elements, random_values};

/// A layer that no builtin is: both parts, and scales on both sides.
const OWN: &str = "layer own(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], l: adapter[D], m: adapter[K]) {
    m * ((l * x) @ (w0 * (1 + b @ a))) + x @ (b @ a)
}";

fn layers() -> Vec<CompiledLayer> {
    let own = verify(parse(OWN).unwrap()).unwrap();
    let builtin = builtin::names().map(|kind| builtin::builtin(kind).unwrap().clone());
    builtin.chain([own]).map(|layer| compile_verified(layer).unwrap()).collect()
}

/// An adapter of random tensors. The numbers are small ones, so that those of rank 64 don't outgrow the others.
fn adapter(layer: &CompiledLayer, rank: usize, w0: &Value, random: &mut fastrand::Rng) -> FoldedAdapter {
    let &[d, k] = w0.shape() else { panic!("w0 is a matrix") };
    let mut bindings = Bindings::new();
    bindings.insert("w0", w0.clone());
    for (_, operand) in layer.written.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters()) {
        let extent = |dimension: &Dimension| match dimension.to_string().as_str() {
            "D" => d,
            "K" => k,
            _ => rank,
        };
        let mut numbers = |count| (0..count).map(|_| random.f64() - 0.5).collect::<Vec<_>>();
        let value = match &operand.ty.shape {
            Shape::Scalar => Value::scalar(0.5),
            Shape::Vector(n) => Value::vector(numbers(extent(n))),
            Shape::Matrix(m, n) => Value::matrix(extent(m), extent(n), numbers(extent(m) * extent(n))).unwrap(),
        };
        bindings.insert(operand.name.clone(), value);
    }
    layer.linear.fold(&bindings).unwrap()
}

/// The numbers that a device keeps of an adapter.
fn mapped(adapter: &FoldedAdapter, number: impl Fn(f32) -> f32 + Copy) -> FoldedAdapter {
    let vector = |numbers: &Vec<f32>| numbers.iter().map(|value| number(*value)).collect::<Vec<_>>();
    let mut mapped = adapter.clone();
    for row in &mut mapped.virtual_rows {
        (row.in_scale, row.out_scale) = (row.in_scale.as_ref().map(vector), row.out_scale.as_ref().map(vector));
    }
    mapped.low_rank = adapter
        .low_rank
        .iter()
        .map(|RankOne { shrink, expand }| RankOne { shrink: vector(shrink), expand: vector(expand) })
        .collect();
    mapped
}

/// Asserts that the gradient of an adapter's vectors is the oracle's.
fn assert_folded(
    what: &str,
    found: &FoldedGradient,
    exact: &FoldedGradient,
    magnitudes: &FoldedGradient,
    sums: [usize; 2],
) {
    assert_eq!(found.virtual_rows.len(), exact.virtual_rows.len(), "{what}");
    assert_eq!(found.low_rank.len(), exact.low_rank.len(), "{what}");
    let narrowed = |vector: &Vec<f64>| vector.iter().map(|number| *number as f32).collect::<Vec<_>>();
    let sides = [vectors(found), vectors(exact), vectors(magnitudes)].map(|(ins, outs)| [ins, outs]);
    let [found, exact, magnitudes] = sides;
    for (side, sums) in sums.into_iter().enumerate() {
        assert_eq!(found[side].len(), exact[side].len(), "{what}");
        for (at, found) in found[side].iter().enumerate() {
            let bound = Bound { sums, stored: Element::F32 };
            bound.assert(
                &format!("{what}, side {side}, vector {at}"),
                &narrowed(found),
                exact[side][at],
                magnitudes[side][at],
            );
        }
    }
}

proptest! {
    #![proptest_config(config(24))]

    /// All kinds in one batch, ranks 1 to 64, two segments of each, base rows, empty segments, a position without an adapter.
    #[test]
    fn gradients_of_every_kind_are_the_oracles(
        d in 1u32..150,
        k in 1u32..90,
        activations in elements(),
        adapters in elements(),
        (_, weight) in prop::sample::select(WeightFormat::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let shape = LayerShape { d: weight.whole(d), k };
        let (d, k) = (shape.d as usize, shape.k as usize);
        let packed = PackedWeight::from_f32(weight, shape, &random_values(d * k, &mut random)).unwrap();
        let base_weight = packed.to_f32();
        let w0 = Value::matrix(d, k, base_weight.iter().map(|number| f64::from(*number)).collect()).unwrap();
        let ranks = [1, 2, 3, 5, 8, 13, 17, 31, 64];
        let mut folded: Vec<_> =
            layers().iter().map(|layer| adapter(layer, ranks[random.usize(0..ranks.len())], &w0, &mut random)).collect();
        // A low-rank sum alone, which no builtin is.
        let lora = adapter(&layers()[builtin::names().position(|kind| kind == "lora").unwrap()], 3, &w0, &mut random);
        folded.push(FoldedAdapter { virtual_rows: Vec::new(), ..lora });

        let device = flora_host::device();
        let options = ProjectionOptions { activations, adapters, ..ProjectionOptions::default() };
        let mut projection = Projection::from_packed(&device, &packed, options).unwrap();
        projection.reserve(folded.iter().map(|own| own.virtual_rows.len() as u32 + 64).sum(), folded.iter().map(|own| own.virtual_rows.len() as u32 + 65).sum()).unwrap();
        for (at, adapter) in folded.iter().enumerate() {
            projection.place(at as u32 + 1, adapter).unwrap();
        }
        let nowhere = folded.len() as u32 + 1;
        let mut segments: Vec<(u32, u32)> = (0..=nowhere).chain(0..=nowhere).map(|at| (at, random.u32(0..12))).collect();
        random.shuffle(&mut segments);
        let tokens: usize = segments.iter().map(|(_, rows)| *rows as usize).sum();
        let rounded = |count, random: &mut fastrand::Rng| -> Vec<f32> {
            random_values(count, random).into_iter().map(|number| activations.round(number)).collect()
        };
        let (x, g) = (rounded(tokens * d, &mut random), rounded(tokens * k, &mut random));
        let upload = |values: &[f32]| device.upload_as(values, activations).unwrap();
        let batch = StepBatch::new(segments.iter().copied());
        let found = projection.backward(&batch, &upload(&x), &upload(&g), Wanted::All).unwrap();

        // The base at 0 and at the position that has no adapter.
        let base = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
        let exact = |number: fn(f32) -> f32| {
            let numbers = |values: &[f32]| values.iter().map(|value| number(*value)).collect::<Vec<_>>();
            let kept = folded.iter().map(|own| mapped(own, |value| number(adapters.round(value))));
            let all: Vec<_> = [base.clone()].into_iter().chain(kept).chain([base.clone()]).collect();
            let segments: Vec<_> = segments.iter().map(|(adapter, rows)| Segment { rows: *rows, adapter: *adapter }).collect();
            let batch = BatchRows {
                shape,
                base_weight: &numbers(&base_weight),
                bias: None,
                activation: Activation::Identity,
                x: &numbers(&x),
                output_gradient: &numbers(&g),
            };
            backward(&batch, &all, &segments).unwrap()
        };
        let (exact, magnitudes) = (exact(|number| number), exact(f32::abs));
        let dx = device.read(&found.dx.unwrap()).unwrap();
        let bound = Bound { sums: k + 65 + 64, stored: activations };
        bound.assert("dx", &dx, &exact.input, &magnitudes.input);
        let expected: Vec<u32> = (1..nowhere).filter(|at| segments.iter().any(|(own, rows)| own == at && *rows > 0)).collect();
        prop_assert_eq!(found.adapters.iter().map(|(at, _)| *at).collect::<Vec<_>>(), expected);
        for (at, gradient) in &found.adapters {
            let (exact, magnitudes) = (&exact.adapters[*at as usize], &magnitudes.adapters[*at as usize]);
            let rows: u32 = segments.iter().filter(|(own, _)| own == at).map(|(_, rows)| *rows).sum();
            let sums = [k, d].map(|summed| summed + rows as usize + TASKS);
            assert_folded(&format!("adapter {at} of {rows} rows"), gradient, exact, magnitudes, sums);
        }
    }
}

const SMALL: LayerShape = LayerShape { d: 37, k: 41 };

/// A projection with adapters of every kind, a batch of all of them and of base rows, x and g.
fn every_kind(seed: u64) -> (PlannedProjection, StepBatch, Buffer, Buffer) {
    let (shape, mut random) = (SMALL, fastrand::Rng::with_seed(seed));
    let numbers = random_values(37 * 41, &mut random);
    let weight = PackedWeight::from_f32(WeightFormat::default(), shape, &numbers).unwrap();
    let w0 = Value::matrix(37, 41, numbers.iter().map(|number| f64::from(*number)).collect()).unwrap();
    let device = flora_host::device();
    let options = ProjectionOptions::default();
    let planned = PlannedProjection::new(&device, &weight, options, Planning::Fixed(Plan::default())).unwrap();
    let folded: Vec<_> = layers().iter().map(|layer| adapter(layer, 4, &w0, &mut random)).collect();
    planned.change(|projection| {
        projection.reserve(256, 256).unwrap();
        folded.iter().zip(1..).for_each(|(folded, at)| projection.place(at, folded).unwrap());
    });
    let batch = StepBatch::new((0..10).map(|at| (at, 7)));
    let x = device.upload(&random_values(70 * 37, &mut random)).unwrap();
    let g = device.upload(&random_values(70 * 41, &mut random)).unwrap();
    (planned, batch, x, g)
}

#[test]
fn what_is_not_wanted_is_left_out_and_changes_nothing() {
    let (planned, batch, x, g) = every_kind(5);
    let device = planned.device().clone();
    let all = planned.backward(&batch, &x, &g, Wanted::All).unwrap();
    let input = planned.backward(&batch, &x, &g, Wanted::Input).unwrap();
    let adapters = planned.backward(&batch, &x, &g, Wanted::Adapters).unwrap();
    assert!(input.adapters.is_empty() && adapters.dx.is_none());
    let dx = |gradient: &ProjectionGradient| device.read(gradient.dx.as_ref().unwrap()).unwrap();
    assert_eq!(dx(&all), dx(&input));
    assert_eq!(all.adapters, adapters.adapters);
    assert_eq!(all.adapters.len(), 9);
    let same = planned.change(|projection| projection.backward(&batch, &x, &g, Wanted::All).unwrap());
    assert_eq!(dx(&all), dx(&same));
    assert_eq!(all.adapters, same.adapters);
    // The three share one schedule.
    assert_eq!(batch.schedules(), 1);
}

/// Prices by which one way to the gradients of scales costs so much, and everything else a second a MAC.
fn prices(dear: GradientKernel) -> Box<LayerPrices> {
    let surface = |seconds: f64| Surface {
        rows: vec![1],
        ranks: vec![1],
        adapters: vec![1],
        extents: vec![1],
        seconds_per_mac: vec![seconds],
        spread: vec![0.0],
        measured: vec![true],
    };
    let own = |kernel| surface(if kernel == dear { 1e6 } else { 1.0 });
    let coefficients = DeviceCoefficients {
        schema: SCHEMA,
        flora: String::new(),
        device: String::new(),
        pads_blocks: false,
        largest_buffer_bytes: None,
        seconds_per_launch: 0.0,
        launch_spread: 0.0,
        seconds_per_byte: 0.0,
        bandwidth_spread: 0.0,
        blueprints: Blueprints::default(),
        formats: BTreeMap::from([(
            LayerFormat::default().to_string(),
            Coefficients {
                seconds_per_mac: Kernel::TIMED.map(|(_, kernel)| (kernel, surface(1.0))).into_iter().collect(),
                gradients: GradientKernel::TIMED.map(|(_, kernel)| (kernel, own(kernel))).into_iter().collect(),
                error: None,
            },
        )]),
    };
    assert_eq!(coefficients.check(), Ok(()));
    Box::new(LayerPrices::new(&coefficients, PricedLayer { shape: SMALL, format: LayerFormat::default() }))
}

/// A priced projection takes the cheaper way to the gradients of scales, and gets the same gradients.
#[test]
fn prices_choose_how_gradients_of_scales_are_computed() {
    let (planned, batch, x, g) = every_kind(6);
    let by = |planning: Planning| {
        planned.set_planning(planning);
        let found = planned.backward(&batch, &x, &g, Wanted::Adapters).unwrap().adapters;
        let vectors = |gradient: &FoldedGradient| -> Vec<f64> {
            let scales = gradient.virtual_rows.iter().flat_map(|row| row.in_scale.iter().chain(&row.out_scale));
            scales.flatten().copied().collect()
        };
        found.iter().map(|(_, gradient)| vectors(gradient)).collect::<Vec<_>>()
    };
    let fixed = by(Planning::Fixed(Plan::default()));
    let reduced = by(Planning::Priced(prices(GradientKernel::Outer)));
    let outer = by(Planning::Priced(prices(GradientKernel::Reduced)));
    assert_ne!(reduced, outer, "two ways round differently");
    for ((fixed, reduced), outer) in fixed.iter().zip(&reduced).zip(&outer) {
        assert!(fixed == reduced || fixed == outer, "what is fixed is one of the two");
        let largest = fixed.iter().fold(0.0f64, |largest, number| largest.max(number.abs()));
        let off = reduced.iter().zip(outer).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
        // The largest of some 400 numbers, each a sum of 7 rows by 41 products.
        assert!(off <= 1e-5 * largest, "{off} of {largest}");
    }
    // Each way has a schedule of its own, which is found again.
    assert_eq!(batch.schedules(), 3);
    assert_eq!(by(Planning::Priced(prices(GradientKernel::Outer))), reduced);
    assert_eq!(batch.schedules(), 3);
}
