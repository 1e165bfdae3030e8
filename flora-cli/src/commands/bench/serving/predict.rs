//! What the cost model says of a decoding step: the projections by the device's coefficients. A model's other work (attention,
//! norms, logits) is taken from its measured step without adapters, because adapters don't change it.

use flora::prelude::*;
use flora_adapters::BaseForm;
use flora_plan::batch::{AdapterSlots, BatchShape, Segment};
use flora_plan::cost::{LayerPrices, PricedLayer, work};
use flora_plan::lowering::Part;
use flora_plan::plan::candidates;

use super::super::serving_answer::{DecodeStep, Variant};
use super::{Setting, variants};
use crate::models::{self, QUERY_AND_KEY, is_target};

/// So many projections of one shape.
struct Projections {
    prices: LayerPrices,
    count: usize,
    adapted: bool,
}

impl Setting<'_> {
    /// One step of the model that is served; `None` where the device isn't tuned.
    pub(super) fn predicted(&self, variant: &Variant, sequences: u32) -> Option<DecodeStep> {
        let planner = self.planner?;
        let dtype = self.arguments.model.dtype;
        let projections = self.model.projections().iter().map(|projection| {
            let shape = LayerShape { d: projection.d as u32, k: projection.k as u32 };
            let base = BaseForm::from(self.arguments.model.base);
            let weight = base.format(projection.encoding, self.device);
            let format = LayerFormat { weight, ..LayerFormat::uniform(dtype) };
            let prices = planner.prices(PricedLayer { shape, format });
            let adapted = self.adapted.iter().any(|name| is_target(&projection.path, name));
            Projections { prices, count: 1, adapted }
        });
        step(self.model.name(), variant, sequences, &projections.collect::<Vec<_>>())
    }

    /// The paper's models, which are only predicted here, at every rank.
    pub(super) fn paper_models(&self) -> Vec<DecodeStep> {
        let Some(planner) = self.planner else { return Vec::new() };
        let sequences = self.arguments.model.sequences as u32;
        let mut steps = Vec::new();
        for name in models::NAMES.into_iter().filter(|name| *name != models::SMOLLM2) {
            let Some(shapes) = models::builtin(name) else { continue };
            let format = LayerFormat::uniform(self.arguments.model.dtype);
            let projections = shapes.projections.iter().map(|own| {
                let shape = LayerShape { d: own.d as u32, k: own.k as u32 };
                let prices = planner.prices(PricedLayer { shape, format });
                Projections {
                    prices,
                    count: shapes.layers,
                    adapted: QUERY_AND_KEY.iter().any(|target| is_target(&own.name, target)),
                }
            });
            let projections: Vec<_> = projections.collect();
            steps.extend(
                variants(&self.arguments.ranks)
                    .into_iter()
                    .filter_map(|(way, rank)| step(name, &self.variant(way, rank), sequences, &projections)),
            );
        }
        steps
    }
}

/// The projections of one step alone.
fn step(model: &str, variant: &Variant, sequences: u32, projections: &[Projections]) -> Option<DecodeStep> {
    let base = BatchShape::of(&[Segment { rows: sequences, adapter: 0 }], &[AdapterSlots::base()]);
    let plain = |own: &Projections| {
        let prices = &own.prices;
        prices.price(&work(&Plan::default(), prices.layer(), &base, false, prices.pads_blocks()))
    };
    let predicted_base_seconds = projections.iter().map(|own| own.count as f64 * plain(own)).sum();
    let predicted_seconds = match adapted_batch(variant, sequences)? {
        None => predicted_base_seconds,
        Some((part, batch)) => {
            let each = projections.iter().map(|own| {
                let one = if own.adapted { adapted(own, variant, part, &batch)? } else { plain(own) };
                Some(own.count as f64 * one)
            });
            each.sum::<Option<f64>>()?
        }
    };
    Some(DecodeStep {
        model: model.to_owned(),
        variant: variant.clone(),
        sequences,
        seconds: None,
        ratio_to_base: None,
        spread: None,
        predicted_seconds,
        predicted_base_seconds,
    })
}

/// The batch of an adapted projection, a row for each adapter, and the part that computes it: `Some(None)` where nobody has one,
/// `None` for an adapter that isn't built in.
fn adapted_batch(variant: &Variant, sequences: u32) -> Option<Option<(Part, BatchShape)>> {
    if variant.rank == 0 {
        return Some(None);
    }
    let part = if variant.adapter == "flora" { Part::Multiplicative } else { Part::Additive };
    let compiled = compile_verified(flora_ir::builtin::builtin(&variant.adapter)?.clone()).ok()?;
    let slots: Vec<_> = (0..sequences).map(|_| compiled.slots(variant.rank, 0)).collect();
    let rows: Vec<_> = (0..sequences).map(|adapter| Segment { rows: 1, adapter }).collect();
    Some(Some((part, BatchShape::of(&rows, &slots))))
}

/// One projection of such a batch.
fn adapted(projection: &Projections, variant: &Variant, part: Part, batch: &BatchShape) -> Option<f64> {
    let wanted = |lowering: &Lowering| match variant.lowering.as_str() {
        "tuned" => *lowering != Lowering::Merged,
        // Single rows are stacked by the fixed plan.
        "on_chip" => *lowering == Lowering::Stacked,
        name => lowering.name() == name,
    };
    let candidates = candidates(part, &projection.prices, batch);
    candidates.iter().find(|candidate| wanted(&candidate.lowering)).map(|candidate| candidate.predicted_seconds)
}

/// Adds to the predictions of a measured model what its step without adapters takes beyond its projections.
pub(super) fn add_rest(steps: &mut [DecodeStep]) {
    let bases = steps.iter().filter(|step| step.variant.rank == 0);
    let beyond: Vec<_> = bases.filter_map(|base| Some(base.seconds? - base.predicted_base_seconds)).collect();
    let rest = (!beyond.is_empty()).then(|| (beyond.iter().sum::<f64>() / beyond.len() as f64).max(0.0));
    for step in steps.iter_mut() {
        step.predicted_seconds += rest.unwrap_or(0.0);
        step.predicted_base_seconds += rest.unwrap_or(0.0);
    }
}
