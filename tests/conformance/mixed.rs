//! Every kind of adapter in one batch with base rows: PEFT's outputs (`tests/golden/make_zoo.py`) by every plan, and rows that depend on
//! their own adapter alone.

use flora_adapters::{AdaptedModel, AdapterStore, Layers};
use flora_checkpoint::{AdapterFolder, BaseWeight, Matrix, Model, read_matrices};
use flora_ir::Bindings;
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_oracle::{Sample, check};
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{PlannedProjection, Planning, ProjectionOptions, StepBatch};
use std::collections::BTreeMap;

use super::case::{device, is_rasteriser};
use super::golden::golden;

/// The adapters of the golden folder, by name, for one of its two modules.
struct Mixed {
    layers: Layers,
    folders: Vec<AdapterFolder>,
    adapted: Vec<(String, AdaptedModel)>,
    base: BaseWeight,
    inputs: Matrix,
    /// PEFT's, by the adapter's name.
    outputs: BTreeMap<String, Matrix>,
    path: String,
}

impl Mixed {
    fn of(layer: usize) -> Self {
        let layers = Layers::builtin().expect("the built-in kinds");
        let model = Model::open(&golden("mixed").join("base.safetensors")).expect("a model");
        let path = format!("model.layers.{layer}.self_attn.q_proj");
        let mut folders: Vec<AdapterFolder> = std::fs::read_dir(golden("mixed").join("adapters"))
            .expect("the golden folder")
            .map(|entry| AdapterFolder::open(&entry.expect("an entry").path(), layers.kinds()).expect("an adapter"))
            .collect();
        folders.sort_by(|one, other| one.name.cmp(&other.name));
        let adapted = folders.iter().map(|folder| {
            (folder.name.clone(), layers.prepare(folder, &model).unwrap_or_else(|error| panic!("{error}")))
        });
        let adapted: Vec<_> = adapted.collect();
        let outputs = read_matrices(&golden("mixed").join("outputs.safetensors")).expect("outputs").into_iter();
        let outputs =
            outputs.filter_map(|(name, matrix)| Some((name.strip_suffix(&format!(":{path}"))?.to_owned(), matrix)));
        let outputs: BTreeMap<String, Matrix> = outputs.collect();
        let inputs =
            read_matrices(&golden("mixed").join("inputs.safetensors")).expect("inputs").remove(&path).expect("inputs");
        let base = model.weight(&path).expect("a base weight");
        Self { layers, folders, adapted, base, inputs, outputs, path }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.adapted.iter().map(|(name, _)| name.as_str())
    }

    fn folded(&self, position: usize) -> Option<&FoldedAdapter> {
        self.adapted[position].1.modules.get(&self.path)
    }

    /// A projection with the adapter of each name at its position from 1 on; `change` may change what is placed.
    fn projection(
        &self,
        element: Element,
        change: impl Fn(usize, &mut FoldedAdapter, &mut Vec<f32>),
    ) -> PlannedProjection {
        let shape = LayerShape { d: self.base.d as u32, k: self.base.k as u32 };
        let weight = PackedWeight::from_f32(WeightFormat::Float(element), shape, &self.base.values).expect("a weight");
        let options = ProjectionOptions { activations: element, adapters: element, ..ProjectionOptions::default() };
        let planning = Planning::Fixed(Plan::default());
        let planned = PlannedProjection::new(device(), &weight, options, planning).expect("a projection");
        planned.change(|projection| {
            let mut placed = Vec::new();
            for position in 0..self.adapted.len() {
                let mut folded = self.folded(position).expect("it adapts the module").clone();
                let mut offset = self.adapted[position].1.bias_offsets.get(&self.path).cloned().unwrap_or_default();
                change(position, &mut folded, &mut offset);
                placed.push((folded, offset));
            }
            let rows =
                placed.iter().map(|(folded, _)| folded.virtual_rows.len() + folded.low_rank.len()).sum::<usize>();
            projection.reserve(rows as u32, rows as u32).expect("room");
            for (position, (folded, offset)) in placed.iter().enumerate() {
                projection.place(position as u32 + 1, folded).expect("it fits");
                if !offset.is_empty() {
                    projection.set_offset(position as u32 + 1, offset).expect("it fits");
                }
            }
        });
        planned
    }

    /// The inputs' rows for each adapter, base rows between them, and one row each of all once more, the other way round.
    fn batch(&self) -> Vec<(u32, u32)> {
        let count = self.adapted.len() as u32;
        let rows = self.inputs.rows as u32;
        let once = (1..=count).flat_map(|adapter| [(adapter, rows), (0, 1 + adapter % 2)]);
        once.chain((1..=count).rev().map(|adapter| (adapter, 1))).collect()
    }

    /// x of a batch: each segment has the first of the golden inputs' rows.
    fn x(&self, batch: &[(u32, u32)]) -> Vec<f32> {
        batch.iter().flat_map(|(_, rows)| &self.inputs.values[..*rows as usize * self.base.d]).copied().collect()
    }
}

fn run(planned: &PlannedProjection, batch: &[(u32, u32)], plan: Plan, x: &[f32]) -> Vec<f32> {
    planned.set_planning(Planning::Fixed(plan));
    let x = planned.device().upload_as(x, planned.activations()).expect("memory");
    let y = planned.forward(&x, &StepBatch::new(batch.iter().copied()), None).expect("the batch runs");
    planned.device().read(&y).expect("it can be read")
}

fn has(element: Element) -> bool {
    device().info().element_types.iter().any(|name| name == element.name())
}

fn plans() -> impl Iterator<Item = Plan> {
    Plan::unmerged().flat_map(|plan| [plan, plan.with_split()])
}

/// x @ w0, for each of the golden rows, in f64.
fn base_rows(mixed: &Mixed) -> Vec<f32> {
    let BaseWeight { d, k, values, .. } = &mixed.base;
    let row = |x: &[f32]| {
        (0..*k)
            .map(|column| {
                x.iter()
                    .enumerate()
                    .map(|(input, x)| f64::from(*x) * f64::from(values[input * k + column]))
                    .sum::<f64>() as f32
            })
            .collect::<Vec<_>>()
    };
    mixed.inputs.values.chunks_exact(*d).flat_map(row).collect()
}

#[test]
fn all_kinds_in_one_batch_give_peft_s_outputs() {
    for layer in 0..2 {
        let mixed = Mixed::of(layer);
        assert!(mixed.adapted.len() >= 23 && mixed.names().eq(mixed.outputs.keys().map(String::as_str)));
        let (planned, batch) = (mixed.projection(Element::F32, |_, _, _| ()), mixed.batch());
        let (x, base, k) = (mixed.x(&batch), base_rows(&mixed), mixed.base.k);
        for plan in plans() {
            let y = run(&planned, &batch, plan, &x);
            let mut first = 0;
            for (adapter, rows) in &batch {
                let found = &y[first * k..][..*rows as usize * k];
                let expected = match adapter.checked_sub(1) {
                    None => &base[..found.len()],
                    Some(position) => &mixed.outputs[&mixed.adapted[position as usize].0].values[..found.len()],
                };
                // As for a kind by itself (`tests/zoo.rs`), for the device's roundings beside PEFT's.
                let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                let tolerance = 32.0 * (mixed.base.d as f32).sqrt() * f32::EPSILON / 2.0 * largest;
                let error = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
                let error = error.fold(0.0f32, f32::max);
                let name = adapter.checked_sub(1).map_or("base", |position| &mixed.adapted[position as usize].0);
                assert!(error <= tolerance, "{name} by {plan:?}: {error} is more than {tolerance}");
                first += *rows as usize;
            }
        }
    }
}

/// The equations on the numbers that the device holds, in f16: within four deviations of their rounding (docs/architecture.md).
#[test]
fn all_kinds_in_one_batch_equal_the_oracle_in_half_types() {
    let mixed = Mixed::of(0);
    let element = Element::F16;
    if !has(element) {
        println!("NOT RUN on {}: kinds in f16: no f16 buffers", device().info().id);
        return;
    }
    // Nothing adds an adapter's own bias here.
    let folders: Vec<_> = mixed.folders.iter().filter(|folder| folder.name != "beft").cloned().collect();
    let store = AdapterStore::from_folders(folders, mixed.layers.clone()).expect("adapters");
    let (d, k) = (mixed.base.d, mixed.base.k);
    let shape = LayerShape { d: d as u32, k: k as u32 };
    let weight = PackedWeight::from_f32(WeightFormat::Float(element), shape, &mixed.base.values).expect("a weight");
    let base_weight = weight.to_f32();
    let rounded = BaseWeight { values: base_weight.clone(), ..mixed.base.clone() };
    let loaded = store.fold(&mixed.path, &rounded).expect("they fold");
    let of_rounded = |position: usize, folded: &mut FoldedAdapter, _: &mut Vec<f32>| {
        let own = loaded.get(mixed.adapted[position].0.as_str()).and_then(Option::as_ref);
        own.into_iter().for_each(|own| folded.clone_from(&own.folded));
    };
    let (planned, batch) = (mixed.projection(element, of_rounded), mixed.batch());
    let x: Vec<f32> = mixed.x(&batch).into_iter().map(|value| element.round(value)).collect();
    let columns: Vec<usize> = (0..k).collect();
    let base = FoldedAdapter { virtual_rows: vec![VirtualRow::default()], ..FoldedAdapter::default() };
    for plan in plans() {
        let y = run(&planned, &batch, plan, &x);
        let mut row = 0;
        for (adapter, rows) in &batch {
            let name = adapter.checked_sub(1).map(|position| mixed.adapted[position as usize].0.as_str());
            for row in (row..row + *rows as usize).filter(|_| name != Some("beft")) {
                let sample = Sample {
                    shape,
                    format: LayerFormat::uniform(element),
                    residual: None,
                    base_weight: &base_weight,
                    bias: None,
                    activation: flora_ir::Activation::Identity,
                    x: &x[row * d..][..d],
                    y: &y[row * k..][..k],
                    columns: &columns,
                };
                let deviation = match name.and_then(|name| loaded[name].as_ref()) {
                    Some(own) => check(&own.layer.written, &own.operands, &own.folded, &sample),
                    None => check(&mixed.layers.base().written, &Bindings::new(), &base, &sample),
                };
                let deviation = deviation.expect("the oracle evaluates it");
                assert!(deviation.rounding_units <= 4.0, "{name:?} by {plan:?}: {deviation:?}");
            }
            row += *rows as usize;
        }
    }
}

/// A kind that is a sum of low rank has the launches of a LoRA with as many components, so that it costs what that costs; and base rows
/// have the same ones beside it.
#[test]
fn a_kind_of_low_rank_is_scheduled_as_lora_is() {
    let mixed = Mixed::of(0);
    let is_additive = |folded: &FoldedAdapter| {
        folded.virtual_rows.iter().all(|row| *row == VirtualRow::default()) && folded.sparse.is_empty()
    };
    let mut compared = 0;
    for own in 0..mixed.adapted.len() {
        let folded = mixed.folded(own).expect("it adapts the module");
        if !is_additive(folded) || folded.low_rank.is_empty() {
            continue;
        }
        compared += 1;
        let (d, k) = (mixed.base.d, mixed.base.k);
        let lora = FoldedAdapter {
            virtual_rows: vec![VirtualRow::default()],
            low_rank: vec![RankOne { shrink: vec![0.5; d], expand: vec![0.5; k] }; folded.low_rank.len()],
            ..FoldedAdapter::default()
        };
        let scheduled = |folded: &FoldedAdapter| {
            let weight = PackedWeight::from_f32(
                WeightFormat::Float(Element::F32),
                LayerShape { d: d as u32, k: k as u32 },
                &mixed.base.values,
            );
            let planned = PlannedProjection::new(
                device(),
                &weight.expect("a weight"),
                ProjectionOptions::default(),
                Planning::Fixed(Plan::default()),
            )
            .expect("a projection");
            planned.change(|projection| {
                let (in_slots, out_slots) = projection.slots_with(folded);
                projection.reserve(in_slots, out_slots).expect("room");
                projection.place(1, folded).expect("it fits");
            });
            let batches = [vec![(1, 5)], vec![(0, 9), (1, 1), (0, 2), (1, 7)]];
            plans()
                .flat_map(|plan| batches.clone().map(|batch| (plan, batch)))
                .map(|(plan, batch)| {
                    planned.set_planning(Planning::Fixed(plan));
                    planned.scheduled(&StepBatch::new(batch)).expect("a schedule").schedule
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(scheduled(folded), scheduled(&lora), "{}", mixed.adapted[own].0);
    }
    assert!(compared >= 12, "{compared}");
}

/// With NaN in every other adapter, an adapter's rows and base rows have the same bits.
#[test]
fn nan_in_all_other_kinds_changes_no_bit() {
    let mixed = Mixed::of(1);
    let (batch, k) = (mixed.batch(), mixed.base.k);
    // A batch of everything takes a rasteriser a while.
    let every = if is_rasteriser() { 8 } else { 1 };
    for element in [Element::F32, Element::F16].into_iter().filter(|element| has(*element)) {
        let x = mixed.x(&batch);
        let clean = mixed.projection(element, |_, _, _| ());
        for own in (0..mixed.adapted.len()).step_by(every) {
            let poisoned = mixed.projection(element, |position, folded, offset| {
                if position == own {
                    return;
                }
                for row in &mut folded.virtual_rows {
                    [&mut row.in_scale, &mut row.out_scale]
                        .into_iter()
                        .flatten()
                        .for_each(|scale| scale.fill(f32::NAN));
                }
                for pair in &mut folded.low_rank {
                    pair.shrink.fill(f32::NAN);
                    pair.expand.fill(f32::NAN);
                }
                folded.sparse = folded.sparse.map(|matrix| matrix.map(|_, _, _| f32::NAN));
                offset.fill(f32::NAN);
            });
            for plan in plans() {
                let (clean, other) = (run(&clean, &batch, plan, &x), run(&poisoned, &batch, plan, &x));
                let mut first = 0;
                for (adapter, rows) in &batch {
                    let (from, to) = (first * k, (first + *rows as usize) * k);
                    first += *rows as usize;
                    if *adapter == 0 || *adapter as usize == own + 1 {
                        let bits = |y: &[f32]| y[from..to].iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                        assert!(other[from..to].iter().all(|value| value.is_finite()), "{adapter} {plan:?}");
                        assert_eq!(bits(&clean), bits(&other), "{element:?} {adapter} beside {own} by {plan:?}");
                    }
                }
            }
        }
    }
}
