//! Seconds per MAC of every kernel at the points of a lattice.

use std::collections::BTreeMap;

use flora_plan::batch::BatchShape;
use flora_plan::cost::{GradientKernel, Kernel, Place, PricedLayer, Surface, work};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering, Part, PartLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, can_hold, schedule};

use super::Launch;
use super::effort::{Effort, MOST_ROWS, MOST_SLOTS};
use super::gradients::{self, Gradients};
use crate::measure::{EqualSegments, LayerBench, Sample, unscheduled};
use flora_runtime::{Device, DeviceError};

/// The part of an adapter, and the plan, that need a kernel: what its coefficients are measured by.
pub fn needed_by(kernel: Kernel) -> (Part, Plan) {
    let multiplicative =
        |lowering| (Part::Multiplicative, Plan::default().with_part(PartLowering::Multiplicative(lowering)));
    let additive = |lowering| (Part::Additive, Plan::default().with_part(PartLowering::Additive(lowering)));
    match kernel {
        Kernel::Matmul | Kernel::Stacked | Kernel::Move => (Part::Multiplicative, Plan::default()),
        Kernel::OnChip => multiplicative(MultiplicativeLowering::OnChip),
        Kernel::Bmm => multiplicative(MultiplicativeLowering::Bmm),
        Kernel::Fused => (Part::Additive, Plan::default()),
        Kernel::LowRankBmm => additive(AdditiveLowering::Bmm),
        Kernel::Segmented => additive(AdditiveLowering::Segmented),
    }
}

/// A point with what is run there.
struct Point {
    kernel: Kernel,
    place: Place,
    schedule: Schedule,
    /// The base GEMM of an additive batch.
    base: Option<Schedule>,
    /// Of the kernel.
    macs: f64,
    /// Of everything that is run.
    all_macs: f64,
    /// Seconds of launches beyond the base GEMM's.
    launches: f64,
    /// Seconds per MAC.
    taken: Sample,
    is_measured: bool,
}

impl Point {
    /// One measurement: seconds of the whole, and seconds per MAC of the kernel.
    fn take(&self, benches: &Benches<'_>) -> Result<(f64, f64), DeviceError> {
        let bench = benches.of(self.schedule.in_slots());
        let base = self.base.as_ref().map_or(Ok(0.0), |base| bench.seconds(base))?;
        let seconds = bench.seconds(&self.schedule)?;
        Ok((seconds, (seconds - base - self.launches) / self.macs))
    }
}

/// What was measured of layers of one format.
pub(super) struct Surfaces {
    pub(super) seconds_per_mac: BTreeMap<Kernel, Surface>,
    /// Nothing where the device computes none.
    pub(super) gradients: BTreeMap<GradientKernel, Surface>,
}

/// Measures the surfaces of layers of `format`.
pub(super) fn measure(
    device: &Device,
    format: LayerFormat,
    effort: &Effort,
    launch: &Launch,
    progress: &mut impl FnMut(u64, u64),
) -> Result<Surfaces, DeviceError> {
    let mut surfaces: BTreeMap<Kernel, Surface> =
        Kernel::TIMED.iter().map(|(_, kernel)| (*kernel, empty(*kernel, effort))).collect();
    let mut points_of = Vec::with_capacity(effort.extents.len());
    for (position, extent) in effort.extents.iter().enumerate() {
        let layer = PricedLayer { shape: LayerShape { d: format.weight.whole(*extent), k: *extent }, format };
        points_of
            .push((layer, points(layer, position, &surfaces, effort, launch, device.info().largest_buffer_bytes)?));
    }
    let total = points_of.iter().flat_map(|(_, points)| points).map(|point| point.all_macs).sum::<f64>();
    let unit = total / 1000.0;
    let all = ((effort.passes + 1) * 1000) as u64;
    let mut done = 0.0;
    let mut of_gradients = Vec::new();
    for (extent, (layer, points)) in points_of.iter_mut().enumerate() {
        let bench = Benches::new(device, *layer, effort, launch)?;
        let mut gradients = Gradients::new(device, *layer, extent, effort)?;
        survey(&bench, points, effort, |macs| {
            done += macs;
            progress((done / unit) as u64, all);
        })?;
        for _ in 0..effort.passes {
            for point in &mut *points {
                if point.is_measured {
                    let (_, seconds_per_mac) = point.take(&bench)?;
                    point.taken.push(seconds_per_mac);
                }
                done += point.all_macs;
                progress((done / unit) as u64, all);
            }
            gradients.pass()?;
        }
        of_gradients.extend(gradients.into_points());
    }
    let points: Vec<Point> = points_of.into_iter().flat_map(|(_, points)| points).collect();
    for (kernel, surface) in &mut surfaces {
        let own = points.iter().filter(|point| point.kernel == *kernel);
        fill(surface, own.map(|point| (point.place, &point.taken)));
    }
    raise_differences(&mut surfaces);
    Ok(Surfaces { seconds_per_mac: surfaces, gradients: gradients::surfaces(&of_gradients, effort) })
}

/// One layer with pools of several sizes.
struct Benches<'a> {
    /// Rising by their slots.
    by_slots: Vec<(u32, LayerBench<'a>)>,
}

/// The next larger pool has so many times the vectors.
const POOL_STEP: u32 = 8;

impl<'a> Benches<'a> {
    fn new(device: &'a Device, layer: PricedLayer, effort: &Effort, launch: &Launch) -> Result<Self, DeviceError> {
        let most = pool_slots(effort);
        let first = LayerBench::new(device, layer, 1)?.without_wait(launch.wait);
        let sizes =
            std::iter::successors(Some(1), |slots: &u32| (*slots < most).then_some((slots * POOL_STEP).min(most)));
        let by_slots = sizes.map(|slots| Ok((slots, first.with_slots(slots)?)));
        Ok(Self { by_slots: by_slots.collect::<Result<_, DeviceError>>()? })
    }

    /// The one with the smallest pools that have `slots` vectors.
    fn of(&self, slots: u32) -> &LayerBench<'a> {
        let at = self.by_slots.partition_point(|(own, _)| *own < slots);
        &self.by_slots[at.min(self.by_slots.len() - 1)].1
    }
}

fn pool_slots(effort: &Effort) -> u32 {
    let last = |axis: &[u32]| axis.last().copied().unwrap_or(1);
    (last(effort.adapters) * last(effort.ranks)).min(MOST_SLOTS)
}

/// The axes of a kernel's surface.
fn empty(kernel: Kernel, effort: &Effort) -> Surface {
    let (rows, ranks, adapters) = match kernel.is_gemm() {
        true => (effort.gemm_rows, &[1][..], &[1][..]),
        false => (effort.rows, effort.ranks, effort.adapters),
    };
    // An adapter of one virtual row is stacked whatever the lowering.
    let least = if kernel == Kernel::OnChip { 2 } else { 1 };
    Surface {
        rows: rows.to_vec(),
        ranks: ranks.iter().map(|rank| (*rank).max(least)).collect(),
        adapters: adapters.to_vec(),
        extents: effort.extents.to_vec(),
        ..Surface::default()
    }
}

/// What is run at every place of this extent, the least work first.
fn points(
    layer: PricedLayer,
    extent: usize,
    surfaces: &BTreeMap<Kernel, Surface>,
    effort: &Effort,
    launch: &Launch,
    largest_buffer_bytes: Option<u64>,
) -> Result<Vec<Point>, DeviceError> {
    let mut points = Vec::new();
    for (kernel, surface) in surfaces {
        for place in surface.places().filter(|place| place.extent == extent) {
            let (part, plan) = needed_by(*kernel);
            let equal = EqualSegments {
                part,
                adapters: surface.adapters[place.adapters],
                rows: surface.rows[place.rows],
                rank: surface.ranks[place.rank],
            };
            if equal.tokens() <= u64::from(MOST_ROWS) && equal.slots() <= u64::from(pool_slots(effort)) {
                let (segments, adapters) = equal.batch();
                let batch = BatchShape::of(&segments, &adapters);
                if can_hold(&plan, layer.shape, &batch, largest_buffer_bytes) {
                    points.push(point(*kernel, place, layer, plan, equal, launch)?);
                }
            }
        }
    }
    points.sort_by(|one, other| one.all_macs.total_cmp(&other.all_macs));
    Ok(points)
}

fn point(
    kernel: Kernel,
    place: Place,
    layer: PricedLayer,
    plan: Plan,
    equal: EqualSegments,
    launch: &Launch,
) -> Result<Point, DeviceError> {
    let (segments, adapters) = equal.batch();
    let (schedule, base) = if kernel == Kernel::Matmul {
        (Schedule::base_gemm(layer.shape, equal.rows).map_err(unscheduled)?, None)
    } else {
        let base = Schedule::base_gemm(layer.shape, equal.tokens() as u32).map_err(unscheduled)?;
        let own = schedule(&plan, layer.shape, &segments, &adapters, false).map_err(unscheduled)?;
        (own, (equal.part == Part::Additive).then_some(base))
    };
    let work = work(&plan, layer, &BatchShape::of(&segments, &adapters), false, false);
    let square = f64::from(layer.shape.d) * f64::from(layer.shape.k);
    let own = work.terms.iter().filter(|term| term.kernel == kernel).map(|term| term.macs as f64).sum::<f64>();
    let macs = if kernel == Kernel::Matmul { f64::from(equal.rows) * square } else { own };
    let launches = work.launches.saturating_sub(u64::from(base.is_some())) as f64 * launch.seconds;
    let all_macs = macs + base.as_ref().map_or(0.0, |_| 2.0 * equal.tokens() as f64 * square);
    Ok(Point { kernel, place, schedule, base, macs, all_macs, launches, taken: Sample::default(), is_measured: false })
}

/// A point is tried where the last smaller one of its kernel says that it takes no more than so many times the longest call: more
/// work at once is usually cheaper a MAC.
const HOPE: f64 = 4.0;

/// Runs every point once, and leaves out those that take too long.
fn survey(
    bench: &Benches<'_>,
    points: &mut [Point],
    effort: &Effort,
    mut done: impl FnMut(f64),
) -> Result<(), DeviceError> {
    let mut taken: BTreeMap<Kernel, f64> = BTreeMap::new();
    for point in points {
        let expected = taken.get(&point.kernel).map_or(0.0, |seconds_per_mac| point.all_macs * seconds_per_mac);
        if expected <= HOPE * effort.longest_call {
            // The lesser of two: a first call may still meet a compiler at work.
            let seconds = point.take(bench)?.0.min(point.take(bench)?.0);
            // A kernel has a point, however slow the device.
            point.is_measured = seconds <= effort.longest_call || !taken.contains_key(&point.kernel);
            taken.insert(point.kernel, seconds / point.all_macs);
        }
        done(point.all_macs);
    }
    Ok(())
}

/// Puts medians and spreads into a surface, and the nearest measured point's where nothing was measured. What a MAC takes depends
/// on the number of adapters and on the extent least where there is much to do, so that those are changed before rows and rank are.
pub(super) fn fill<'a>(surface: &mut Surface, points: impl Iterator<Item = (Place, &'a Sample)>) {
    let measured: Vec<_> = points.filter(|(_, taken)| !taken.is_empty()).collect();
    let distance = |one: Place, other: Place| {
        one.adapters.abs_diff(other.adapters)
            + 2 * one.extent.abs_diff(other.extent)
            + 12 * (one.rank.abs_diff(other.rank) + one.rows.abs_diff(other.rows))
    };
    for place in surface.places() {
        let nearest = measured.iter().min_by_key(|(own, _)| distance(*own, place));
        let (median, spread) = nearest.map_or((f64::NAN, 0.0), |(_, taken)| (taken.median(), taken.spread()));
        surface.seconds_per_mac.push(median);
        surface.spread.push(spread);
        surface.measured.push(nearest.is_some_and(|(own, _)| *own == place));
    }
}

/// What a low-rank MAC is priced at least, as a share of the base GEMM's best: a difference of two times can come out as nothing,
/// and nothing has no logarithm.
const LEAST_SHARE: f64 = 0.25;

fn raise_differences(surfaces: &mut BTreeMap<Kernel, Surface>) {
    let best = surfaces[&Kernel::Matmul].seconds_per_mac.iter().copied().fold(f64::INFINITY, f64::min);
    let least = LEAST_SHARE * best;
    for surface in surfaces.values_mut() {
        for (value, spread) in surface.seconds_per_mac.iter_mut().zip(&mut surface.spread) {
            if value.is_nan() || *value < least {
                // As far as the point was off, seen from what it counts as.
                *spread = (*spread * value.abs() / least).min(1e6);
                *value = least;
            }
        }
    }
}
