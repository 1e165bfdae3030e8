//! Batches that no coefficient is made from: how far the model is off on what it hasn't seen.

use flora_plan::batch::BatchShape;
use flora_plan::cost::{DeviceCoefficients, LayerPrices, PricedLayer, work};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{Lowering, Part, lowerings_of};
use flora_plan::plan::Plan;
use flora_plan::schedule::{can_hold, schedule};
use serde::Serialize;

use super::Launch;
use super::effort::{Effort, MOST_ROWS, MOST_SLOTS};
use super::taken::{Estimate, Taken};
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
    /// The lower quartile of what was measured.
    pub seconds: f64,
}

/// The batches are the same every time, whatever the device.
const SEED: u64 = 20_240_611;
/// Draws for each batch that is wanted: those that the model says take too long are drawn again.
const DRAWS: usize = 50;

pub(super) fn measure(
    device: &Device,
    format: LayerFormat,
    effort: &Effort,
    launch: &Launch,
    coefficients: &DeviceCoefficients,
) -> Result<Vec<HeldOut>, DeviceError> {
    let mut random = fastrand::Rng::with_seed(SEED);
    let mut taken = Vec::with_capacity(effort.held_out);
    for _ in 0..DRAWS * effort.held_out {
        if taken.len() == effort.held_out {
            break;
        }
        let (layer, equal) = draw(&mut random, format, effort);
        if let Some(point) = run(device, layer, equal, effort, launch, coefficients)? {
            taken.push(point);
        }
    }
    Ok(taken)
}

/// A layer and a batch within the lattice, but on none of its points.
fn draw(random: &mut fastrand::Rng, format: LayerFormat, effort: &Effort) -> (PricedLayer, EqualSegments) {
    let mut between = |axis: &[u32]| {
        let (first, last) = (f64::from(axis[0]), f64::from(axis[axis.len() - 1]));
        (first * (last / first).powf(random.f64())).round() as u32
    };
    let extent = between(effort.extents);
    let (rows, rank, adapters) = (between(effort.rows), between(effort.ranks), between(effort.adapters));
    // d and k differ by up to 4; whole blocks of a quantised weight.
    let aspect = 2f64.powf(2.0 * random.f64() - 1.0);
    let side = |length: f64| ((length / 32.0).round().max(1.0) * 32.0) as u32;
    let d = format.weight.whole(side(f64::from(extent) * aspect));
    let shape = LayerShape { d, k: side(f64::from(extent) / aspect) };
    let part = if random.bool() { Part::Multiplicative } else { Part::Additive };
    (PricedLayer { shape, format }, EqualSegments { part, adapters, rows, rank })
}

/// `None` for a batch that takes too long.
fn run(
    device: &Device,
    layer: PricedLayer,
    equal: EqualSegments,
    effort: &Effort,
    launch: &Launch,
    coefficients: &DeviceCoefficients,
) -> Result<Option<HeldOut>, DeviceError> {
    if equal.tokens() > u64::from(MOST_ROWS) || equal.slots() > u64::from(MOST_SLOTS) {
        return Ok(None);
    }
    let (segments, adapters) = equal.batch();
    let batch = BatchShape::of(&segments, &adapters);
    let prices = LayerPrices::new(coefficients, layer);
    let predict = |plan: &Plan| prices.price(&work(plan, layer, &batch, false, coefficients.pads_blocks));
    // A batch of several adapters has no merged weight.
    let rows = lowerings_of(equal.part).filter(|row| row.lowering() != Lowering::Merged);
    let plans: Vec<(Lowering, Plan)> =
        rows.map(|row| (row.lowering(), Plan::default().with_part(row.computes))).collect();
    let holds = |plan: &Plan| can_hold(plan, layer.shape, &batch, device.info().largest_buffer_bytes);
    if plans.iter().any(|(_, plan)| !holds(plan) || predict(plan) > 2.0 * effort.longest_call) {
        return Ok(None);
    }
    let bench = LayerBench::new(device, layer, equal.slots() as u32)?.without_wait(launch.wait);
    let mut timed = Vec::with_capacity(plans.len());
    for (lowering, plan) in plans {
        let steps = schedule(&plan, layer.shape, &segments, &adapters, false).map_err(unscheduled)?;
        bench.seconds(&steps)?;
        timed.push((lowering, plan, steps, Taken::new(Estimate::LowerQuartile)));
    }
    for pass in 0..2 * effort.passes {
        for (_, _, steps, taken) in &mut timed {
            // As for the points that the prediction comes from.
            if pass < effort.passes || taken.is_unsteady() {
                let seconds = bench.seconds(steps)?;
                taken.push(seconds, seconds);
            }
        }
    }
    let plans = timed.iter().map(|(lowering, plan, _, taken)| HeldOutPlan {
        lowering: *lowering,
        predicted_seconds: predict(plan),
        seconds: taken.seconds(),
    });
    let EqualSegments { part, adapters, rows, rank } = equal;
    let (d, k) = (layer.shape.d, layer.shape.k);
    Ok(Some(HeldOut { d, k, part, adapters, rows, rank, plans: plans.collect() }))
}
