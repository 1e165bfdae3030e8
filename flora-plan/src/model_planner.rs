//! Plans for all layers of a model, batch after batch, at no cost worth naming: layers of one shape are priced once, and a batch
//! of a shape that was seen is looked up. Nothing is allocated after the planner is made.

use std::hash::BuildHasher;

use rustc_hash::FxBuildHasher;

use crate::batch::BatchShape;
use crate::cost::{DeviceCoefficients, LayerPrices, PricedLayer};
use crate::plan::{Plan, plan};

/// Shapes of batches that are remembered; one that falls on another's place replaces it.
const REMEMBERED: usize = 1024;

/// The planner of one model on one device.
#[derive(Clone, Debug)]
pub struct ModelPlanner {
    /// Of the distinct layers.
    prices: Vec<(LayerPrices, bool)>,
    /// The position in `prices` of every layer of the model.
    of_layer: Vec<usize>,
    seen: Box<[Option<BatchShape>]>,
    /// `[REMEMBERED, prices]`
    plans: Box<[Plan]>,
}

impl ModelPlanner {
    /// A planner for layers, each with whether it has an epilogue.
    pub fn new(coefficients: &DeviceCoefficients, layers: impl IntoIterator<Item = (PricedLayer, bool)>) -> Self {
        let mut prices: Vec<(LayerPrices, bool)> = Vec::new();
        let mut of_layer = Vec::new();
        for (layer, finishes) in layers {
            let known = prices.iter().position(|(own, own_finishes)| own.layer() == layer && *own_finishes == finishes);
            of_layer.push(known.unwrap_or_else(|| {
                prices.push((LayerPrices::new(coefficients, layer), finishes));
                prices.len() - 1
            }));
        }
        let plans = vec![Plan::default(); REMEMBERED * prices.len()].into_boxed_slice();
        Self { prices, of_layer, seen: vec![None; REMEMBERED].into_boxed_slice(), plans }
    }

    /// The plans of all layers for a batch, in the order in which the layers were given.
    pub fn plans(&mut self, batch: &BatchShape) -> impl ExactSizeIterator<Item = Plan> {
        let place = FxBuildHasher.hash_one(batch) as usize % REMEMBERED;
        let own = place * self.prices.len()..(place + 1) * self.prices.len();
        if self.seen[place] != Some(*batch) {
            for (chosen, (prices, finishes)) in self.plans[own.clone()].iter_mut().zip(&self.prices) {
                *chosen = plan(prices, batch, *finishes);
            }
            self.seen[place] = Some(*batch);
        }
        let plans = &self.plans[own];
        self.of_layer.iter().map(|position| plans[*position])
    }
}
