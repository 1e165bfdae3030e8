//! What the cost model says of a decoding step: the projections by the device's coefficients. A model's other work (attention,
//! norms, logits) is taken from its measured step without adapters, because adapters don't change it.

use flora::codegen::batch::{AdapterSlots, BatchShape, Segment};
use flora::codegen::cost::{LayerPrices, PricedLayer, work};
use flora::codegen::lowering::Part;
use flora::codegen::plan::candidates;
use flora::prelude::*;
use flora::runtime::BaseForm;

use super::record::{DecodeStep, Variant};
use super::{BASE, Setting, WAYS, variants};
use crate::models::{self, QUERY_AND_KEY, is_target};

/// So many projections of one shape.
struct Projections {
    prices: LayerPrices,
    count: usize,
    adapted: bool,
}

impl Setting<'_> {
    /// One step of the model that is served; `None` where the device isn't tuned.
    pub(super) fn predicted(&self, variant: &Variant, sequences: u32, seconds: Option<f64>) -> Option<DecodeStep> {
        let planner = self.planner?;
        let dtype = self.arguments.model.dtype;
        let projections = self.model.projections().iter().map(|projection| {
            let shape = LayerShape { d: projection.d as u32, k: projection.k as u32 };
            let weight = BaseForm::Stored.format(projection.encoding, self.device);
            let format = LayerFormat { weight, ..LayerFormat::uniform(dtype) };
            let last = projection.path.rsplit('.').next().unwrap_or_default();
            let prices = planner.prices(PricedLayer { shape, format });
            Projections { prices, count: 1, adapted: self.adapted.iter().any(|name| name == last) }
        });
        step(self.model.name(), variant, sequences, seconds, &projections.collect::<Vec<_>>())
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
                    .filter_map(|(way, rank)| step(name, &self.variant(way, rank), sequences, None, &projections)),
            );
        }
        steps
    }
}

/// The projections of one step alone.
fn step(
    model: &str,
    variant: &Variant,
    sequences: u32,
    seconds: Option<f64>,
    projections: &[Projections],
) -> Option<DecodeStep> {
    let of = |variant: &Variant| {
        let each = projections.iter().map(|own| Some(own.count as f64 * one(own, variant, sequences)?));
        each.sum::<Option<f64>>()
    };
    let base = Variant { adapter: BASE.to_owned(), lowering: "matmul".to_owned(), rank: 0 };
    Some(DecodeStep {
        model: model.to_owned(),
        variant: variant.clone(),
        sequences,
        seconds,
        predicted_seconds: of(variant)?,
        predicted_base_seconds: of(&base)?,
    })
}

/// One projection, each row with an adapter of its own.
fn one(projection: &Projections, variant: &Variant, sequences: u32) -> Option<f64> {
    let prices = &projection.prices;
    let base = BatchShape::of(&[Segment { rows: sequences, adapter: 0 }], &[AdapterSlots::base()]);
    let plain = prices.price(&work(&Plan::default(), prices.layer(), &base, false, prices.pads_blocks()));
    if !projection.adapted || variant.rank == 0 {
        return Some(plain);
    }
    let way = WAYS.iter().find(|way| way.adapter == variant.adapter)?;
    let part = if way.adapter == "flora" { Part::Multiplicative } else { Part::Additive };
    let compiled = compile_verified(flora::ir::builtin::builtin(way.adapter)?.clone()).ok()?;
    let slots: Vec<_> = (0..sequences).map(|_| compiled.slots(variant.rank, 0)).collect();
    let rows: Vec<_> = (0..sequences).map(|adapter| Segment { rows: 1, adapter }).collect();
    let candidates = candidates(part, prices, &BatchShape::of(&rows, &slots));
    let wanted = |lowering: &Lowering| match variant.lowering.as_str() {
        "tuned" => *lowering != Lowering::Merged,
        // Single rows are stacked by the fixed plan.
        "on_chip" => *lowering == Lowering::Stacked,
        name => lowering.name() == name,
    };
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
