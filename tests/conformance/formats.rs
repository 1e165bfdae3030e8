//! Every lowering in every type and format that the device has, by fragments and without, on one batch of every kind of adapter.
//! What the device can't run is listed.

use std::collections::BTreeSet;

use flora::prelude::*;
use flora_runtime::{BackendKind, DeviceInfo};

use super::case::{Adapter, Case, device, is_rasteriser, kinds};

/// Weights that are decoded as others are: levels, scales and planes in the same forms.
const ALIKE: [(WeightFormat, WeightFormat); 6] = [
    (WeightFormat::Q5_0, WeightFormat::Q4_0),
    (WeightFormat::Q5_1, WeightFormat::Q4_1),
    (WeightFormat::Q2_K, WeightFormat::Q5_K),
    (WeightFormat::Q4_K, WeightFormat::Q5_K),
    (WeightFormat::Q3_K, WeightFormat::Q6_K),
    (WeightFormat::IQ4_XS, WeightFormat::IQ4_NL),
];

/// Every combination: activations, adapters in the same type and in f32, weights in every format. On a rasteriser, where compiling
/// takes most of the time, f32 is multiplied by all weights, and halves by those that aren't [`ALIKE`] another.
fn formats() -> Vec<LayerFormat> {
    let mut formats = Vec::new();
    for activations in Element::ALL {
        let every = activations == Element::F32 || !device().info().software;
        for (_, weight) in WeightFormat::ALL {
            if let Some((_, other)) = ALIKE.iter().find(|(weight_alike, _)| !every && *weight_alike == weight) {
                println!("NOT RUN on {}: {activations} by {weight}, decoded as {other} is", device().info().id);
                continue;
            }
            let fragments = if activations == Element::F32 { vec![false] } else { vec![false, true] };
            for fragments in fragments {
                formats.push(LayerFormat { activations, adapters: activations, weight, fragments });
            }
        }
        let mixed = LayerFormat {
            adapters: Element::F32,
            fragments: activations != Element::F32,
            ..LayerFormat::uniform(activations)
        };
        let halves = LayerFormat { adapters: Element::F16, ..mixed };
        formats.extend([mixed, halves].into_iter().filter(|format| format.adapters != activations));
    }
    formats
}

/// Whether the device has the types of `format`, and fragments where it asks for them.
fn runs(format: &LayerFormat) -> Result<(), String> {
    let info = device().info();
    let weight = match format.weight {
        WeightFormat::Float(element) => element,
        _ => Element::F32,
    };
    for element in [format.activations, format.adapters, weight] {
        if !info.element_types.iter().any(|name| name == element.name()) {
            return Err(format!("no {element} buffers"));
        }
    }
    // The host converts as it packs, and has no fragments to choose.
    let own = format!("{0}*{0}->f32", format.activations);
    if format.fragments && info.id != "host" && !info.fragments.iter().any(|fragment| fragment.ends_with(&own)) {
        return Err(format!("no {own} fragments"));
    }
    if format.fragments && info.id == "host" {
        return Err("the host has no fragments".to_owned());
    }
    Ok(())
}

/// The types of activations, without fragments and with, that a device of this kind has: what fails here if it ran none of them.
fn promised(info: &DeviceInfo) -> &'static [(Element, bool)] {
    match (info.backend, info.software) {
        (BackendKind::Host, _) => &[(Element::F32, false), (Element::F16, false), (Element::Bf16, false)],
        (BackendKind::Cuda, _) => &[
            (Element::F32, false),
            (Element::F16, false),
            (Element::F16, true),
            (Element::Bf16, false),
            (Element::Bf16, true),
        ],
        // Lavapipe; a GPU's driver may have neither halves nor cooperative matrices.
        (BackendKind::Wgpu, true) => &[(Element::F32, false), (Element::F16, false), (Element::F16, true)],
        _ => &[(Element::F32, false)],
    }
}

/// Every kind, three ranks, segments of one row and of more than a tile's; d rounded up to whole blocks of a quantised format.
fn case(format: LayerFormat, d: usize, k: usize) -> Case {
    let ranks = [3, 17, 1, 8, 33, 2, 5, 16];
    let adapters: Vec<_> = kinds()
        .into_iter()
        .enumerate()
        .map(|(position, kind)| Adapter {
            name: format!("adapter{position}"),
            kind,
            rank: ranks[position % ranks.len()],
        })
        .collect();
    let rows = [1, 7, 1, 40, 2, 19, 1, 3, 70];
    let order = (0..=adapters.len()).chain([0, 1, adapters.len()]);
    let segments = order.enumerate().map(|(position, adapter)| (adapter, rows[position % rows.len()])).collect();
    let activation = Activation::GeluTanh;
    // Whole blocks.
    let d = format.weight.whole(d as u32) as usize;
    Case { d, k, bias: true, activation, residual: true, format, adapters, segments, seed: (d + k) as u64 }
}

#[test]
fn every_format_equals_the_oracle() {
    // Every lowering once; which go together is the other tests' matter.
    let plans = MultiplicativeLowering::ALL.into_iter().zip(AdditiveLowering::ALL);
    let plans: Vec<_> = plans.map(|(multiplicative, additive)| Plan::new(multiplicative, additive)).collect();
    let mut ran = BTreeSet::new();
    for format in formats() {
        if let Err(reason) = runs(&format) {
            println!("NOT RUN on {}: {format} fragments {}: {reason}", device().info().id, format.fragments);
            continue;
        }
        for (d, k) in [(96, 37), (160, 72)] {
            let is_quantised = format.weight.quantisation().is_some();
            if is_rasteriser() && is_quantised && k == 37 {
                println!("NOT RUN on {}: {format} [{d}, {k}]: emulated cards run it", device().info().id);
                continue;
            }
            let loaded = case(format, d, k).load(device());
            for plan in &plans {
                let deviation = loaded.deviation(&loaded.run(plan));
                assert!(
                    deviation.is_rounding(),
                    "{format} fragments {} [{d}, {k}] {plan:?}: {deviation:?}",
                    format.fragments
                );
            }
        }
        ran.insert((format.activations, format.fragments));
    }
    let missing: Vec<_> = promised(device().info()).iter().filter(|promised| !ran.contains(promised)).collect();
    assert!(missing.is_empty(), "not run (activations, fragments): {missing:?}");
}

/// Blocks are two to a word of scales: inputs of which every step of a tile starts at such a word, few rows and many.
#[test]
fn quantised_weights_of_whole_steps_equal_the_oracle() {
    let halves = [Element::F16, Element::Bf16];
    let weights = [WeightFormat::Q8_0, WeightFormat::Q4_0, WeightFormat::Q4_1, WeightFormat::MXFP4];
    for (activations, weight) in halves.into_iter().flat_map(|own| weights.map(|weight| (own, weight))) {
        let format = LayerFormat { weight, ..LayerFormat::uniform(activations) };
        if let Err(reason) = runs(&format) {
            println!("NOT RUN on {}: {format}: {reason}", device().info().id);
            continue;
        }
        if is_rasteriser() {
            println!("NOT RUN on {}: {format}: emulated cards run it", device().info().id);
            continue;
        }
        for (kind, rows) in [("lora", 19), ("flora", 19), ("lora", 520)] {
            let adapters = vec![Adapter { name: "own".to_owned(), kind, rank: 3 }];
            let case = Case { adapters, segments: vec![(1, 3), (0, rows)], ..case(format, 192, 72) };
            let loaded = case.load(device());
            for plan in [Plan::default(), Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Segmented)] {
                let deviation = loaded.deviation(&loaded.run(&plan));
                assert!(deviation.is_rounding(), "{format} {kind} {rows} rows {plan:?}: {deviation:?}");
            }
        }
    }
}

/// Long enough for the depth to be split.
#[test]
fn a_split_depth_equals_the_oracle() {
    for activations in Element::ALL {
        let format = LayerFormat { weight: WeightFormat::Q4_1, ..LayerFormat::uniform(activations) };
        if let Err(reason) = runs(&LayerFormat { fragments: false, ..format }) {
            println!("NOT RUN on {}: {format}: {reason}", device().info().id);
            continue;
        }
        let loaded = case(format, 1056, 48).load(device());
        for plan in [Plan::default().with_split(), Plan::default()] {
            let deviation = loaded.deviation(&loaded.run(&plan));
            assert!(deviation.is_rounding(), "{format} {plan:?}: {deviation:?}");
        }
    }
}

/// A batch that one adapter owns.
#[test]
fn a_merged_adapter_equals_the_oracle() {
    for activations in Element::ALL {
        let format = LayerFormat { weight: WeightFormat::Q8_0, ..LayerFormat::uniform(activations) };
        if let Err(reason) = runs(&LayerFormat { fragments: false, ..format }) {
            println!("NOT RUN on {}: {format}: {reason}", device().info().id);
            continue;
        }
        for kind in kinds() {
            let adapters = vec![Adapter { name: "own".to_owned(), kind, rank: 5 }];
            let case = Case { adapters, segments: vec![(0, 3), (0, 20)], ..case(format, 64, 40) };
            let loaded = case.load(device());
            let batch = loaded.case.batch();
            let merged_adapter = |projection: &mut Projection| {
                projection.schedule(&batch, &Plan::MERGED).expect("a batch of its adapters").merged_adapter()
            };
            assert_eq!(loaded.projection.with(merged_adapter), None, "{kind}: nothing is merged yet");
            loaded.projection.with(|projection| projection.merge("own")).expect("it is loaded");
            assert_eq!(loaded.projection.with(merged_adapter), Some(1));
            let deviation = loaded.deviation(&loaded.run(&Plan::MERGED));
            assert!(deviation.is_rounding(), "{format} {kind}: {deviation:?}");
        }
    }
}

/// Rows by a resident weight beside those of every other kind, by every pair of lowerings: the sums that define them, and the bits that
/// the merged rows have alone and the others without them.
#[test]
fn a_merged_adapter_shares_its_batches() {
    let format = LayerFormat { weight: WeightFormat::Q8_0, ..LayerFormat::default() };
    let others = kinds().into_iter().enumerate();
    let others = others.map(|(at, kind)| Adapter { name: format!("other{at}"), kind, rank: 3 + at });
    for kind in kinds() {
        let own = Adapter { name: "own".to_owned(), kind, rank: 5 };
        let adapters: Vec<_> = [own].into_iter().chain(others.clone()).collect();
        let beside = (0..=adapters.len()).map(|at| (at, 1 + 7 * (at as u32 % 3)));
        let segments: Vec<_> = [(0, 3)].into_iter().chain(beside).chain([(0, 20), (0, 1)]).collect();
        let loaded = Case { adapters, segments, residual: true, ..case(format, 64, 40) }.load(device());
        let (d, k) = (loaded.case.d, loaded.case.k);
        let rows_of = |owns: bool, values: &[f32], width: usize| {
            let mut first = 0;
            let mut own = Vec::new();
            for (adapter, rows) in &loaded.case.segments {
                let range = first * width..(first + *rows as usize) * width;
                first += *rows as usize;
                own.extend((owns == (*adapter == 0)).then(|| values[range].to_vec()).into_iter().flatten());
            }
            own
        };
        let run = |owns: bool, plan: &Plan| {
            let segments = loaded.case.segments.iter().filter(|(adapter, _)| owns == (*adapter == 0));
            let part = Case { segments: segments.copied().collect(), ..loaded.case.clone() };
            let residual = loaded.residual.as_deref().map(|residual| rows_of(owns, residual, k));
            loaded.projection.forward(&part.batch(), plan, &rows_of(owns, &loaded.x, d), residual.as_deref())
        };
        let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for plan in merging_plans() {
            loaded.projection.with(Projection::unmerge);
            let without = bits(run(false, &plan));
            loaded.projection.with(|projection| projection.merge("own")).expect("it is loaded");
            let y = loaded.run(&plan);
            let deviation = loaded.deviation(&y);
            assert!(deviation.is_rounding(), "{kind} {plan:?}: {deviation:?}");
            assert_eq!(bits(rows_of(false, &y, k)), without, "{kind} {plan:?}: the others");
            assert_eq!(bits(rows_of(true, &y, k)), bits(run(true, &plan)), "{kind} {plan:?}: alone");
        }
    }
}

/// Every pair of lowerings; few of them where the processor plays a card, and takes seconds to compile a kernel.
fn merging_plans() -> Vec<Plan> {
    let few = [Plan::fixed(), Plan::new(MultiplicativeLowering::Bmm, AdditiveLowering::Segmented).with_merged()];
    match device().info().software {
        true => few.to_vec(),
        false => Plan::unmerged().map(Plan::with_merged).chain([Plan::fixed(), Plan::MERGED.with_split()]).collect(),
    }
}
