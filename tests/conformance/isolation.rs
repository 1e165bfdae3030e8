//! A request's output is its own: the same bits whatever else the batch holds, and finite when every other adapter is NaN.

use flora::prelude::*;
use flora_ir::algebra::FoldedAdapter;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::case::{Adapter, Case, Loaded, device, is_rasteriser, kinds, plans};

/// A batch with adapters of every kind; the rows in question are in the middle, split over two segments.
fn crowd(format: LayerFormat, d: usize, seed: u64, own: Adapter, others: Vec<(usize, u32)>) -> Case {
    let mut adapters = vec![own];
    adapters.extend(kinds().into_iter().enumerate().map(|(position, kind)| Adapter {
        name: format!("other{position}"),
        kind,
        rank: 1 + 5 * position,
    }));
    let half = others.len() / 2;
    let mut segments = others.clone();
    segments.insert(half, (0, 3));
    segments.push((0, 2));
    let activation = Activation::GeluErf;
    Case { d, k: 45, bias: true, activation, residual: false, format, adapters, segments, seed }
}

/// f32, and f16 where the device has it.
fn formats() -> Vec<LayerFormat> {
    let has = |element: &Element| device().info().element_types.iter().any(|name| name == element.name());
    [Element::F32, Element::F16].into_iter().filter(has).map(LayerFormat::uniform).collect()
}

/// Inputs of the layer: enough for the depth to be split where the plan splits it.
fn inputs(plan: &Plan) -> usize {
    if plan.splits() { 521 } else { 61 }
}

/// The rows of adapter 0.
pub(crate) fn own_rows(case: &Case, values: &[f32], width: usize) -> Vec<f32> {
    let mut rows = Vec::new();
    let mut first = 0;
    for (adapter, count) in &case.segments {
        let end = first + *count as usize;
        if *adapter == 0 {
            rows.extend_from_slice(&values[first * width..end * width]);
        }
        first = end;
    }
    rows
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(crate) fn poison(folded: &mut FoldedAdapter) {
    for row in &mut folded.virtual_rows {
        for scale in [&mut row.in_scale, &mut row.out_scale].into_iter().flatten() {
            scale.fill(f32::NAN);
        }
    }
    for pair in &mut folded.low_rank {
        pair.shrink.fill(f32::NAN);
        pair.expand.fill(f32::NAN);
    }
}

#[test]
fn nan_in_every_other_adapter_changes_no_bit() {
    for (seed, kind) in kinds().into_iter().enumerate() {
        for format in formats() {
            let own = Adapter { name: "own".to_owned(), kind, rank: 6 };
            let others: Vec<_> = (1..kinds().len() + 2).map(|adapter| (adapter, 1 + adapter as u32 % 4)).collect();
            let load = |d: usize| {
                let mut loaded = crowd(format, d, seed as u64, Clone::clone(&own), Vec::clone(&others)).load(device());
                loaded.folded[1..].iter_mut().for_each(poison);
                let Loaded { case, base_weight, bias, folded, .. } = &loaded;
                let poisoned = case.projection(device(), &case.weight(base_weight), bias.as_deref(), folded);
                (loaded, poisoned)
            };
            let depths = [false, true].map(|splits| {
                let plan = if splits { Plan::default().with_split() } else { Plan::default() };
                load(inputs(&plan))
            });
            for plan in plans() {
                let (loaded, poisoned) = &depths[usize::from(plan.splits())];
                let case = &loaded.case;
                let (clean, other) = (loaded.run(&plan), loaded.run_of(poisoned, &plan));
                let (clean, other) = (own_rows(case, &clean, case.k), own_rows(case, &other, case.k));
                assert!(other.iter().all(|value| value.is_finite()), "{format} {kind} {plan:?}");
                assert_eq!(bits(&clean), bits(&other), "{format} {kind} {plan:?}");
            }
        }
    }
}

/// Whatever else is in the batch. In half types as long as the same steps run, because each of them rounds: there the crowd
/// always holds a multiplicative and an additive adapter, so that the plan's every step is there.
#[test]
fn the_rest_of_the_batch_changes_no_bit() {
    let cases = match device().info().id.as_str() {
        "host" => 60,
        _ if is_rasteriser() => 4,
        _ => 10,
    };
    let config =
        ProptestConfig { cases, rng_seed: RngSeed::Fixed(21), failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let others = || prop::collection::vec((1..kinds().len() + 2, 1u32..70), 0..7);
    let formats = prop::sample::select(formats());
    let strategy = (others(), others(), 0..kinds().len(), any::<u64>(), formats);
    let outcome = runner.run(&strategy, |(one, other, kind, seed, format)| {
        let own = || Adapter { name: "own".to_owned(), kind: kinds()[kind], rank: 6 };
        // One of each part, so that both batches run the same kernels.
        let with_both = |mut others: Vec<(usize, u32)>| {
            if format.activations != Element::F32 {
                others
                    .extend(["flora", "lora"].map(|kind| {
                        (1 + kinds().iter().position(|known| *known == kind).expect("a built-in kind"), 2)
                    }));
            }
            others
        };
        let (one, other) = (with_both(one), with_both(other));
        for plan in plans() {
            let d = inputs(&plan);
            let own_x = super::case::Numbers::new(seed ^ 1).take(5 * d);
            let [one, other] = [&one, &other].map(|others| crowd(format, d, seed, own(), others.clone()));
            let run = |case: &Case| {
                let mut loaded = case.clone().load(device());
                put_own_rows(case, &own_x, &mut loaded.x);
                own_rows(case, &loaded.run(&plan), case.k)
            };
            prop_assert_eq!(bits(&run(&one)), bits(&run(&other)), "{} {:?}", format, plan);
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

fn put_own_rows(case: &Case, own: &[f32], x: &mut [f32]) {
    let (mut first, mut taken) = (0, 0);
    for (adapter, count) in &case.segments {
        let (start, end) = (first * case.d, (first + *count as usize) * case.d);
        if *adapter == 0 {
            x[start..end].copy_from_slice(&own[taken..taken + end - start]);
            taken += end - start;
        }
        first += *count as usize;
    }
}
