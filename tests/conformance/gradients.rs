//! The backward pass of every device against the oracle's: dx and the gradients of the vectors of every kind of adapter in one batch,
//! on sizes that are multiples of nothing, and to the bit whatever else is in the batch.

use std::collections::BTreeMap;

use flora::prelude::*;
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_ir::gradient::FoldedGradient;
use flora_oracle::backward::{BatchGradient, BatchRows, backward};
use flora_oracle::{Deviation, Sizes, rounding};
use flora_plan::batch::Segment;
use flora_runtime::{StepBatch, Wanted};

use super::case::{Adapter, Case, Loaded, Numbers, device, is_rasteriser, kinds};
use super::isolation::{bits, own_rows, poison};
use super::on_burn::OnBurn;

/// What a device makes of a batch.
struct Found {
    dx: Vec<f32>,
    /// By position of the adapter in the case.
    adapters: BTreeMap<usize, FoldedGradient>,
}

/// An adapter of every kind, each in two segments among base rows.
fn case(format: LayerFormat, [d, k]: [usize; 2], rank: usize, seed: u64) -> Case {
    let adapters = kinds().into_iter().enumerate().map(|(at, kind)| Adapter {
        name: format!("adapter{at}"),
        kind,
        rank: 1 + (rank + 5 * at) % 19,
    });
    let adapters: Vec<_> = adapters.collect();
    let base = adapters.len();
    let rows = |at: usize| 1 + ((at as u32 + 1) * 7 + rank as u32) % 23;
    let first = (0..base).map(|at| (at, rows(at)));
    let segments = first.chain([(base, 3), (0, 0)]).chain((0..base).rev().map(|at| (at, rows(at + 3) % 5)));
    let segments = segments.collect();
    let (activation, residual) = (Activation::Identity, false);
    Case { d, k, bias: false, activation, residual, format, adapters, segments, seed }
}

/// A gradient of the outputs, as the device keeps it.
fn output_gradient(case: &Case) -> Vec<f32> {
    let rows: u32 = case.segments.iter().map(|(_, rows)| rows).sum();
    let numbers = Numbers::new(case.seed ^ 77).take(rows as usize * case.k);
    numbers.into_iter().map(|value| case.format.activations.round(value)).collect()
}

fn run(projection: &OnBurn, case: &Case, x: &[f32], g: &[f32]) -> Found {
    projection.with(|projection| {
        let segments = projection.segments(&case.batch()).expect("loaded adapters");
        let batch = StepBatch::new(segments.iter().map(|segment| (segment.adapter, segment.rows)));
        let element = case.format.activations;
        let upload = |values: &[f32]| device().upload_as(values, element).expect("a type that the device has");
        let gradient = projection.backward(&batch, &upload(x), &upload(g), Wanted::All).expect("a backward pass");
        let dx = device().read(&gradient.dx.expect("it was wanted")).expect("kernels that run");
        let own = |position: u32| {
            let of = segments.iter().zip(&case.segments).find(|(segment, _)| segment.adapter == position);
            of.map(|(_, (adapter, _))| *adapter).expect("an adapter of the batch")
        };
        let adapters = gradient.adapters.into_iter().map(|(position, gradient)| (own(position), gradient));
        Found { dx, adapters: adapters.collect() }
    })
}

/// An adapter's vectors as the device keeps them, and what `number` makes of them.
fn kept(folded: &FoldedAdapter, element: Element, number: fn(f32) -> f32) -> FoldedAdapter {
    let vector = |vector: &Vec<f32>| vector.iter().map(|value| number(element.round(*value))).collect::<Vec<_>>();
    let rows = folded.virtual_rows.iter().map(|row| VirtualRow {
        in_scale: row.in_scale.as_ref().map(vector),
        out_scale: row.out_scale.as_ref().map(vector),
    });
    let pairs =
        folded.low_rank.iter().map(|pair| RankOne { shrink: vector(&pair.shrink), expand: vector(&pair.expand) });
    FoldedAdapter { virtual_rows: rows.collect(), low_rank: pairs.collect(), ..FoldedAdapter::default() }
}

/// The oracle's gradients of what `number` makes of every number.
fn exact(loaded: &Loaded, g: &[f32], number: fn(f32) -> f32) -> BatchGradient {
    let Loaded { case, base_weight, x, folded, .. } = loaded;
    let numbers = |values: &[f32]| values.iter().map(|value| number(*value)).collect::<Vec<_>>();
    let base = FoldedAdapter { virtual_rows: vec![VirtualRow::default()], ..FoldedAdapter::default() };
    let adapters = folded.iter().map(|own| kept(own, case.format.adapters, number)).chain([base]);
    let segments: Vec<_> =
        case.segments.iter().map(|(adapter, rows)| Segment { rows: *rows, adapter: *adapter as u32 }).collect();
    let batch = BatchRows {
        shape: LayerShape { d: case.d as u32, k: case.k as u32 },
        base_weight: &numbers(base_weight),
        bias: None,
        activation: Activation::Identity,
        x: &numbers(x),
        output_gradient: &numbers(g),
    };
    backward(&batch, &adapters.collect::<Vec<_>>(), &segments).expect("a batch that fits")
}

/// The most partial sums of a layer that are added up.
const PARTS: usize = 32;

/// Asserts that numbers are the oracle's but for rounding: `summed` products are added up, in f32, and what half types round besides
/// is a layer's of `format`.
fn assert_close(
    what: &str,
    found: impl ExactSizeIterator<Item = f64>,
    [exact, magnitudes, squares]: [&[f64]; 3],
    summed: usize,
    format: LayerFormat,
) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (at, found) in found.enumerate() {
        let sizes = Sizes { sum: magnitudes[at], norm: squares[at].sqrt(), output: exact[at].abs() };
        let allowed = Deviation::LIMIT * rounding(sizes, summed as f64 + 8.0, format) + f64::from(f32::MIN_POSITIVE);
        let error = (found - exact[at]).abs();
        assert!(error <= allowed, "{what}, number {at}: {found} is not {}, {error} > {allowed}", exact[at]);
    }
}

fn assert_gradients(loaded: &Loaded, what: &str) {
    let case = &loaded.case;
    let g = output_gradient(case);
    let found = run(&loaded.projection, case, &loaded.x, &g);
    let [exact, magnitudes, squares] =
        [|number| number, f32::abs, |number| number * number].map(|number: fn(f32) -> f32| exact(loaded, &g, number));
    // The adjoint's weight is w0ᵀ in the type of the activations.
    let adjoint = LayerFormat { weight: WeightFormat::Float(case.format.activations), ..case.format };
    let widest = loaded.folded.iter().map(|own| own.virtual_rows.len() + own.low_rank.len()).max().unwrap_or(0);
    let of_input = [&exact.input[..], &magnitudes.input, &squares.input];
    let dx = found.dx.iter().map(|value| f64::from(*value));
    assert_close(&format!("{what}: dx"), dx, of_input, case.k + widest, adjoint);
    for (position, adapter) in case.adapters.iter().enumerate() {
        let own = case.segments.iter().filter(|(own, _)| *own == position);
        let rows: u32 = own.map(|(_, rows)| *rows).sum();
        let gradient = &found.adapters[&position];
        let all = [&exact, &magnitudes, &squares].map(|batch| vectors(&batch.adapters[position]));
        for (side, summed) in [(0, case.k), (1, case.d)] {
            let found = &vectors(gradient)[side];
            assert_eq!(found.len(), all[0][side].len(), "{what}: {}", adapter.kind);
            for (at, found) in found.iter().enumerate() {
                let what = format!("{what}: vector {at} of side {side} of {} of rank {}", adapter.kind, adapter.rank);
                // Products and their sums are f32's, whatever the types are.
                let expected = [0, 1, 2].map(|of| &all[of][side][at][..]);
                let summed = rows as usize + summed + PARTS;
                assert_close(&what, found.iter().copied(), expected, summed, LayerFormat::default());
            }
        }
    }
}

/// The gradients of an adapter's in-vectors and of its out-vectors.
fn vectors(gradient: &FoldedGradient) -> [Vec<&Vec<f64>>; 2] {
    let ins = gradient.virtual_rows.iter().filter_map(|row| row.in_scale.as_ref());
    let outs = gradient.virtual_rows.iter().filter_map(|row| row.out_scale.as_ref());
    [
        ins.chain(gradient.low_rank.iter().map(|pair| &pair.shrink)).collect(),
        outs.chain(gradient.low_rank.iter().map(|pair| &pair.expand)).collect(),
    ]
}

fn has(element: Element) -> bool {
    device().info().element_types.iter().any(|name| name == element.name())
}

/// Small enough for a sanitizer.
#[test]
fn gradients_of_one_batch() {
    for element in [Element::F32, Element::F16].into_iter().filter(|element| has(*element)) {
        let format = LayerFormat { weight: WeightFormat::Q8_0, ..LayerFormat::uniform(element) };
        assert_gradients(&case(format, [96, 76], 1, 7).load(device()), &format!("{format}"));
    }
}

#[test]
fn gradients_equal_the_oracles() {
    // Numbers by themselves, in vectors of four, of two, and hardly any; a rasteriser takes seconds to compile for each.
    let shapes = [[37, 29], [96, 140], [150, 66], [1, 5]];
    let shapes = if is_rasteriser() { &shapes[..2] } else { &shapes[..] };
    for element in Element::ALL.into_iter().filter(|element| has(*element)) {
        for (seed, shape) in shapes.iter().copied().enumerate() {
            let format = LayerFormat::uniform(element);
            let loaded = case(format, shape, seed, seed as u64).load(device());
            assert_gradients(&loaded, &format!("{format} {shape:?}"));
        }
    }
}

/// Layers of which a cube has several tiles of either extent, whatever the device has of multiprocessors, and an adapter of more
/// scales than are staged at once.
#[test]
fn gradients_of_long_segments_and_high_ranks() {
    for (shape, rank, rows) in [([450, 330], 21, 70), ([1130, 40], 2, 9), ([40, 1130], 2, 9)] {
        for element in [Element::F32, Element::F16].into_iter().filter(|element| has(*element)) {
            let own = |kind| Adapter { name: format!("own {kind}"), kind, rank };
            let adapters = ["flora", "lora"].map(own).into();
            let segments = vec![(0, rows), (2, 2), (1, 33), (0, 5)];
            let format = LayerFormat::uniform(element);
            let loaded = Case { adapters, segments, ..case(format, shape, 1, 9) }.load(device());
            assert_gradients(&loaded, &format!("{element}, {shape:?}"));
        }
    }
}

/// A weight of each way to decode one.
#[test]
fn gradients_over_quantised_weights() {
    let weights =
        [WeightFormat::Int8, WeightFormat::Q8_0, WeightFormat::Q4_1, WeightFormat::Q6_K, WeightFormat::IQ4_NL];
    for weight in weights {
        for element in [Element::F32, Element::F16].into_iter().filter(|element| has(*element)) {
            if element == Element::F16 && is_rasteriser() {
                println!("NOT RUN on {}: gradients in f16 over {weight}, decoded as for f32", device().info().id);
                continue;
            }
            let format = LayerFormat { weight, ..LayerFormat::uniform(element) };
            let loaded = case(format, [weight.whole(250) as usize, 44], 2, 5).load(device());
            assert_gradients(&loaded, &format!("{format}"));
        }
    }
}

#[test]
fn an_empty_batch_has_no_gradients() {
    let empty = Case { segments: vec![(0, 0)], ..case(LayerFormat::default(), [37, 29], 0, 1) };
    let loaded = empty.load(device());
    let found = run(&loaded.projection, &loaded.case, &[], &[]);
    assert!(found.dx.is_empty() && found.adapters.is_empty());
}

/// NaN in every other adapter and in its rows, and any other company.
#[test]
fn the_rest_of_the_batch_changes_no_bit_of_a_gradient() {
    // What computes is the same for kinds of one class; where the processor stands in for a card, one of each.
    let every = if device().info().software { 3 } else { 1 };
    for element in [Element::F32, Element::F16].into_iter().filter(|element| has(*element)) {
        for kind in kinds().into_iter().step_by(every) {
            let mut crowd = case(LayerFormat::uniform(element), [96, 140], 4, 3);
            crowd.adapters.insert(0, Adapter { name: "own".to_owned(), kind, rank: 6 });
            crowd.segments.iter_mut().for_each(|(adapter, _)| *adapter += 1);
            crowd.segments.insert(4, (0, 17));
            crowd.segments.push((0, 2));
            let mut loaded = crowd.load(device());
            let mut g = output_gradient(&loaded.case);
            let all = run(&loaded.projection, &loaded.case, &loaded.x, &g);

            let case = &loaded.case;
            let alone = Case { segments: vec![(0, 17), (0, 2)], ..case.clone() };
            let (own_x, own_g) = (own_rows(case, &loaded.x, case.d), own_rows(case, &g, case.k));
            let own = run(&loaded.projection, &alone, &own_x, &own_g);

            loaded.folded[1..].iter_mut().for_each(poison);
            let mut first = 0;
            for (adapter, rows) in &case.segments {
                let end = first + *rows as usize;
                if *adapter > 0 {
                    loaded.x[first * case.d..end * case.d].fill(f32::NAN);
                    g[first * case.k..end * case.k].fill(f32::NAN);
                }
                first = end;
            }
            let poisoned = case.projection(device(), &case.weight(&loaded.base_weight), None, &loaded.folded);
            let beside_nan = run(&poisoned, case, &loaded.x, &g);

            for (what, other, dx) in
                [("alone", &own, own.dx.clone()), ("beside NaN", &beside_nan, own_rows(case, &beside_nan.dx, case.d))]
            {
                assert_eq!(bits(&own_rows(case, &all.dx, case.d)), bits(&dx), "{element} {kind} {what}");
                assert_eq!(all.adapters[&0], other.adapters[&0], "{element} {kind} {what}");
                assert!(dx.iter().all(|number| number.is_finite()), "{element} {kind} {what}");
            }
        }
    }
}
