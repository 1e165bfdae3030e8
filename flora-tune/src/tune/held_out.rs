//! Batches that no coefficient is made from: how far the model is off on what it hasn't seen. They are timed between the passes over what
//! coefficients are made from, so that both have seen the same machine.

use flora_plan::batch::BatchShape;
use flora_plan::cost::{DeviceCoefficients, LayerPrices, PricedLayer, Term, Work, work};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{Lowering, Part, lowerings_of};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, can_hold, schedule};
use serde::Serialize;

use super::Launch;
use super::clock::{Clock, Response, Times};
use super::effort::{Effort, MOST_ROWS, MOST_SLOTS};
use super::surfaces::Responses;
use super::taken::Taken;
use crate::measure::{EqualSegments, LayerBench, unscheduled};
use flora_runtime::{Device, DeviceError};

/// One batch by every lowering of its part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// Inputs.
    pub d: u32,
    /// Outputs.
    pub k: u32,
    /// What the adapters have.
    pub part: Part,
    /// Distinct adapters.
    pub adapters: u32,
    /// Rows of each.
    pub rows: u32,
    /// Virtual rows, or the rank of the low-rank sum.
    pub rank: u32,
    /// What was predicted and what was measured.
    pub plans: Vec<HeldOutPlan>,
}

/// One lowering of a held-out batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct HeldOutPlan {
    /// Of the part that the batch's adapters have.
    pub lowering: Lowering,
    /// By the model.
    pub predicted_seconds: f64,
    /// What was measured, at the machine's usual speed.
    pub seconds: f64,
}

/// The batches are the same every time, whatever the device.
const SEED: u64 = 20_240_611;
/// Draws for the batches of a layer: those that the model says take too long are drawn again.
const DRAWS: usize = 200;
/// Batches that share a layer.
const BATCHES_OF_LAYER: usize = 4;

/// The batches that are held out.
#[derive(Debug)]
pub(super) struct Batches<'a> {
    all: Vec<Batch<'a>>,
}

/// One batch.
#[derive(Debug)]
struct Batch<'a> {
    bench: LayerBench<'a>,
    equal: EqualSegments,
    plans: Vec<(Lowering, Plan, Schedule, Taken)>,
}

impl<'a> Batches<'a> {
    /// Draws batches of which every plan takes no more than twice the longest call, by `rough` coefficients; a few share a layer, whose
    /// weights they have in memory once.
    pub(super) fn draw(
        device: &'a Device,
        format: LayerFormat,
        effort: &Effort,
        launch: &Launch,
        rough: (&DeviceCoefficients, &Clock<'_>),
    ) -> Result<Self, DeviceError> {
        let mut random = fastrand::Rng::with_seed(SEED);
        let mut all = Vec::with_capacity(effort.held_out);
        // A slow device has layers of which no batch is short.
        for _ in 0..effort.held_out {
            if all.len() == effort.held_out {
                break;
            }
            let layer = draw_layer(&mut random, format, effort);
            let bench = LayerBench::new(device, layer, 1)?.without_wait(launch.wait);
            let end = (all.len() + BATCHES_OF_LAYER).min(effort.held_out);
            for _ in 0..DRAWS {
                if all.len() < end {
                    all.extend(Batch::of(&bench, draw_batch(&mut random, effort), effort, rough)?);
                }
            }
        }
        Ok(Self { all })
    }

    /// Measures every plan once.
    pub(super) fn pass(&mut self, clock: &mut Clock<'_>) -> Result<(), DeviceError> {
        for Batch { bench, plans, .. } in &mut self.all {
            for (_, _, steps, taken) in plans {
                let moment = clock.now()?;
                let seconds = bench.seconds(steps)?;
                taken.push(seconds, seconds, moment);
            }
        }
        Ok(())
    }

    /// What was measured beside what `coefficients` predict.
    pub(super) fn compared(
        &self,
        coefficients: &DeviceCoefficients,
        responses: &Responses,
        times: &Times,
    ) -> Vec<HeldOut> {
        let compared = |batch: &Batch<'_>| {
            let prices = LayerPrices::new(coefficients, batch.bench.layer());
            let plans = batch.plans.iter().map(|(lowering, plan, _, taken)| {
                let work = batch.work(plan, coefficients.pads_blocks);
                let price = |term: &Term| {
                    let mut alone = Work::default();
                    alone.terms.push(*term);
                    prices.price(&alone)
                };
                let heaviest = work.terms.iter().max_by(|one, other| price(one).total_cmp(&price(other)));
                let response = heaviest.map_or_else(Response::default, |term| responses.of_term(term));
                let seconds = times.told(taken, response).seconds();
                HeldOutPlan { lowering: *lowering, predicted_seconds: prices.price(&work), seconds }
            });
            let EqualSegments { part, adapters, rows, rank } = batch.equal;
            let LayerShape { d, k } = batch.bench.layer().shape;
            HeldOut { d, k, part, adapters, rows, rank, plans: plans.collect() }
        };
        self.all.iter().map(compared).collect()
    }
}

impl<'a> Batch<'a> {
    /// `None` for a batch that takes too long.
    fn of(
        bench: &LayerBench<'a>,
        equal: EqualSegments,
        effort: &Effort,
        (rough, clock): (&DeviceCoefficients, &Clock<'_>),
    ) -> Result<Option<Self>, DeviceError> {
        if equal.tokens() > u64::from(MOST_ROWS) || equal.slots() > u64::from(MOST_SLOTS) {
            return Ok(None);
        }
        let (layer, (segments, adapters)) = (bench.layer(), equal.batch());
        let shape = BatchShape::of(&segments, &adapters);
        let prices = LayerPrices::new(rough, layer);
        let seconds = |plan: &Plan| prices.price(&work(plan, layer, &shape, false, rough.pads_blocks));
        let holds = |plan: &Plan| can_hold(plan, layer.shape, &shape, bench.device().info().largest_buffer_bytes);
        // A batch of several adapters has no merged weight.
        let rows = lowerings_of(equal.part).filter(|row| row.lowering() != Lowering::Merged);
        let plans: Vec<_> = rows.map(|row| (row.lowering(), Plan::default().with_part(row.computes))).collect();
        if plans.iter().any(|(_, plan)| !holds(plan) || seconds(plan) > 2.0 * effort.longest_call) {
            return Ok(None);
        }
        let bench = bench.with_slots(equal.slots() as u32)?;
        let timed = plans.into_iter().map(|(lowering, plan)| {
            let steps = schedule(&plan, layer.shape, &segments, &adapters, false).map_err(unscheduled)?;
            bench.once(&steps)?;
            Ok((lowering, plan, steps, Taken::new(clock.estimate())))
        });
        let plans = timed.collect::<Result<Vec<_>, DeviceError>>()?;
        Ok(Some(Self { bench, equal, plans }))
    }

    fn work(&self, plan: &Plan, pads_blocks: bool) -> Work {
        let (segments, adapters) = self.equal.batch();
        work(plan, self.bench.layer(), &BatchShape::of(&segments, &adapters), false, pads_blocks)
    }
}

/// Within the lattice, but on none of its points.
fn between(random: &mut fastrand::Rng, axis: &[u32]) -> u32 {
    let (first, last) = (f64::from(axis[0]), f64::from(axis[axis.len() - 1]));
    (first * (last / first).powf(random.f64())).round() as u32
}

fn draw_layer(random: &mut fastrand::Rng, format: LayerFormat, effort: &Effort) -> PricedLayer {
    let extent = f64::from(between(random, effort.extents));
    // d and k differ by up to 4; whole blocks of a quantised weight.
    let aspect = 2f64.powf(2.0 * random.f64() - 1.0);
    let side = |length: f64| ((length / 32.0).round().max(1.0) * 32.0) as u32;
    let d = format.weight.whole(side(extent * aspect));
    PricedLayer { shape: LayerShape { d, k: side(extent / aspect) }, format }
}

fn draw_batch(random: &mut fastrand::Rng, effort: &Effort) -> EqualSegments {
    let [rows, rank, adapters] = [effort.rows, effort.ranks, effort.adapters].map(|axis| between(random, axis));
    let part = if random.bool() { Part::Multiplicative } else { Part::Additive };
    EqualSegments { part, adapters, rows, rank }
}
