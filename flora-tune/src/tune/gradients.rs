//! Seconds per MAC of what computes the gradients of adapters' vectors, on devices that compute any: each at a lattice of rows, ranks
//! and extents. Its points are taken in the passes over the rest, because prices of both are added up.

use std::collections::BTreeMap;

use flora_plan::cost::{GradientKernel, Place, PricedLayer, Surface, gradient_work};
use flora_plan::gradient::GradientLowering;
use flora_plan::lowering::Part;
use flora_plan::plan::Plan;
use flora_plan::schedule::{BackwardSchedule, backward_schedule_by};

use super::clock::{Clock, Times};
use super::effort::{Effort, MOST_ROWS};
use super::fit::{Slopes, fit};
use super::surfaces::observations;
use super::taken::Taken;
use crate::measure::{EqualSegments, LayerBench, unscheduled};
use flora_runtime::{Device, DeviceError};

/// Adapters of a batch. What a MAC takes must not depend on them, because an adapter's lowering is chosen without a look at others.
const ADAPTERS: u32 = 4;

/// A point with what is run there.
pub(super) struct Point {
    kernel: GradientKernel,
    place: Place,
    schedule: BackwardSchedule,
    macs: f64,
    taken: Taken,
}

/// What is measured of layers of one extent.
pub(super) struct Gradients<'a> {
    bench: LayerBench<'a>,
    points: Vec<Point>,
}

impl<'a> Gradients<'a> {
    /// The points of `layer` that don't take too long; none on a device without gradients, or where only GEMMs are timed.
    pub(super) fn new(
        device: &'a Device,
        layer: PricedLayer,
        effort: &Effort,
        clock: &Clock<'_>,
    ) -> Result<Self, DeviceError> {
        let most_slots = ADAPTERS * effort.ranks.last().copied().unwrap_or(1);
        let bench = LayerBench::new(device, layer, most_slots)?;
        let mut points = points(layer, effort, clock)?;
        match survey(&bench, &mut points, effort) {
            Err(DeviceError::NoBackward { .. }) => points.clear(),
            surveyed => surveyed?,
        }
        Ok(Self { bench, points })
    }

    /// Measures every point once.
    pub(super) fn pass(&mut self, clock: &mut Clock<'_>) -> Result<(), DeviceError> {
        for point in &mut self.points {
            let moment = clock.now()?;
            let seconds = self.bench.gradient_seconds(&point.schedule)?;
            point.taken.push(seconds, seconds, moment);
        }
        Ok(())
    }

    /// What was taken.
    pub(super) fn into_points(self) -> Vec<Point> {
        self.points
    }
}

/// The surfaces of what was taken at all extents; nothing of nothing.
pub(super) fn surfaces(points: &[Point], effort: &Effort, times: &Times) -> BTreeMap<GradientKernel, Surface> {
    if points.is_empty() {
        return BTreeMap::new();
    }
    let filled = |(_, kernel)| {
        let mut surface = empty(kernel, effort);
        let mut told = Vec::new();
        for rows in 0..surface.rows.len() {
            let own = points.iter().filter(|point| point.kernel == kernel && point.place.rows == rows);
            let response = times.response(own.clone().map(|point| &point.taken));
            told.extend(own.map(|point| (point.place, point.macs, times.told(&point.taken, response))));
        }
        let observed = observations(told.iter().map(|(place, macs, taken)| (*place, *macs, taken)));
        fit(&mut surface, Slopes::OF_TIMES, &observed);
        (kernel, surface)
    };
    GradientKernel::TIMED.map(filled).into_iter().collect()
}

/// The axes of a kernel's surface; an adapter of rank r has 2r scales.
fn empty(kernel: GradientKernel, effort: &Effort) -> Surface {
    let ranks = match kernel {
        GradientKernel::Reduced | GradientKernel::Outer => effort.ranks.iter().map(|rank| 2 * rank).collect(),
        GradientKernel::Pairs => effort.ranks.to_vec(),
    };
    let (rows, extents) = (effort.rows.to_vec(), effort.extents.to_vec());
    Surface { rows, ranks, adapters: vec![ADAPTERS], extents, ..Surface::default() }
}

/// What is run at every place of this extent, the least work first.
fn points(layer: PricedLayer, effort: &Effort, clock: &Clock<'_>) -> Result<Vec<Point>, DeviceError> {
    let mut points = Vec::new();
    for (_, kernel) in GradientKernel::TIMED {
        let surface = empty(kernel, effort);
        let (part, lowering) = match kernel {
            GradientKernel::Reduced => (Part::Multiplicative, GradientLowering::Reduced),
            GradientKernel::Outer => (Part::Multiplicative, GradientLowering::Outer),
            GradientKernel::Pairs => (Part::Additive, GradientLowering::Reduced),
        };
        for place in surface.places().filter(|place| surface.extents[place.extent] == layer.shape.k) {
            let own = surface.ranks[place.rank];
            let rank = if part == Part::Multiplicative { own / 2 } else { own };
            let equal = EqualSegments { part, adapters: ADAPTERS, rows: surface.rows[place.rows], rank };
            if equal.tokens() > u64::from(MOST_ROWS) {
                continue;
            }
            let (segments, adapters) = equal.batch();
            let plan = Plan::fixed_adjoint();
            let schedule = backward_schedule_by(&plan, layer.shape, &segments, &adapters, |_, _| lowering);
            let schedule = schedule.map_err(unscheduled)?;
            let macs = gradient_work(layer, schedule.adapters()).iter().map(|term| term.macs as f64).sum();
            points.push(Point { kernel, place, schedule, macs, taken: Taken::new(clock.estimate()) });
        }
    }
    points.sort_by(|one, other| one.macs.total_cmp(&other.macs));
    Ok(points)
}

/// Runs every point once, and leaves out those that take too long, or would by what a smaller one takes.
fn survey(bench: &LayerBench<'_>, points: &mut Vec<Point>, effort: &Effort) -> Result<(), DeviceError> {
    let mut taken: BTreeMap<GradientKernel, f64> = BTreeMap::new();
    let mut kept = Vec::with_capacity(points.len());
    for point in points.drain(..) {
        let expected = taken.get(&point.kernel).map_or(0.0, |seconds_per_mac| point.macs * seconds_per_mac);
        if expected > effort.longest_call {
            continue;
        }
        let seconds = bench.gradient_seconds(&point.schedule)?;
        // A kernel has a point, however slow the device.
        if seconds <= effort.longest_call || !taken.contains_key(&point.kernel) {
            taken.insert(point.kernel, seconds / point.macs);
            kept.push(point);
        }
    }
    *points = kept;
    Ok(())
}
