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
use super::fit::{Observation, Slopes, fit};
use super::gradients::{self, Gradients};
use super::taken::{Estimate, Taken, typical};
use crate::measure::{EqualSegments, LayerBench, unscheduled};
use flora_runtime::{BackendKind, Device, DeviceError};

/// The part of an adapter, and the plan, that need a kernel: what its coefficients are measured by.
pub fn needed_by(kernel: Kernel) -> (Part, Plan) {
    let multiplicative =
        |lowering| (Part::Multiplicative, Plan::default().with_part(PartLowering::Multiplicative(lowering)));
    let additive = |lowering| (Part::Additive, Plan::default().with_part(PartLowering::Additive(lowering)));
    match kernel {
        Kernel::Matmul | Kernel::Merged | Kernel::Stacked | Kernel::Move => (Part::Multiplicative, Plan::default()),
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
    /// What the schedule does beside the kernel, run by itself.
    beside: Option<Schedule>,
    /// Of the kernel.
    macs: f64,
    /// Of everything that is run.
    all_macs: f64,
    /// Seconds of launches.
    launches: f64,
    /// Seconds of the kernel.
    taken: Taken,
    is_measured: bool,
}

impl Point {
    /// One measurement: seconds of the kernel, and of the whole.
    fn take(&self, benches: &Benches<'_>) -> Result<(f64, f64), DeviceError> {
        let bench = benches.of(self.schedule.in_slots());
        let beside = self.beside.as_ref().map_or(Ok(0.0), |beside| bench.seconds(beside))?;
        let seconds = bench.seconds(&self.schedule)?;
        Ok((seconds - beside - self.launches, seconds))
    }

    fn measure(&mut self, benches: &Benches<'_>) -> Result<(), DeviceError> {
        let (own, whole) = self.take(benches)?;
        self.taken.push(own, whole);
        Ok(())
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
        points_of.push((layer, points(device, layer, position, &surfaces, effort, launch)?));
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
        for pass in 0..effort.passes {
            for point in &mut *points {
                if point.is_measured && (pass < PASSES_OF_LONG_CALLS || !point.taken.is_long()) {
                    point.measure(&bench)?;
                }
                done += point.all_macs;
                progress(((done / unit) as u64).min(all), all);
            }
            gradients.pass()?;
        }
        // What was disturbed is looked at as often again.
        let mut unsteady: Vec<&mut Point> = points.iter_mut().filter(|point| point.taken.is_unsteady()).collect();
        for _ in 0..effort.passes {
            unsteady.iter_mut().try_for_each(|point| point.measure(&bench))?;
        }
        of_gradients.extend(gradients.into_points());
    }
    let points: Vec<Point> = points_of.into_iter().flat_map(|(_, points)| points).collect();
    for (kernel, surface) in &mut surfaces {
        let own = points.iter().filter(|point| point.kernel == *kernel);
        let slopes = if *kernel == Kernel::Fused { Slopes::OF_DIFFERENCES } else { Slopes::OF_TIMES };
        fit(surface, slopes, &observations(own.map(|point| (point.place, point.macs, &point.taken))));
    }
    raise_differences(&mut surfaces);
    Ok(Surfaces { seconds_per_mac: surfaces, gradients: gradients::surfaces(&of_gradients, effort) })
}

/// Passes over points that take long. They are the steadiest, and all passes over them would take most of the time.
const PASSES_OF_LONG_CALLS: usize = 3;

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
    device: &Device,
    layer: PricedLayer,
    extent: usize,
    surfaces: &BTreeMap<Kernel, Surface>,
    effort: &Effort,
    launch: &Launch,
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
                if can_hold(&plan, layer.shape, &batch, device.info().largest_buffer_bytes) {
                    points.push(point(device, (*kernel, place), layer, plan, equal, launch)?);
                }
            }
        }
    }
    points.sort_by(|one, other| one.all_macs.total_cmp(&other.all_macs));
    Ok(points)
}

fn point(
    device: &Device,
    (kernel, place): (Kernel, Place),
    layer: PricedLayer,
    plan: Plan,
    equal: EqualSegments,
    launch: &Launch,
) -> Result<Point, DeviceError> {
    let (segments, adapters) = equal.batch();
    let rows = |tokens| Schedule::base_gemm(layer.shape, tokens).map_err(unscheduled);
    let whole = || schedule(&plan, layer.shape, &segments, &adapters, false).map_err(unscheduled);
    let tokens = equal.tokens() as u32;
    let (schedule, beside) = match kernel {
        Kernel::Matmul => (rows(equal.rows)?, None),
        // In the base GEMM's launch, so that it is seen in nothing but a difference.
        Kernel::Fused => (whole()?, Some(rows(tokens)?)),
        // By themselves, where a time that is all theirs can be had. What is left beside them are the zeros that they add to.
        Kernel::LowRankBmm | Kernel::Segmented => (whole()?.without_gemm(), zeros(device, rows(tokens)?)),
        Kernel::Merged | Kernel::Stacked | Kernel::OnChip | Kernel::Bmm | Kernel::Move => (whole()?, None),
    };
    let work = work(&plan, layer, &BatchShape::of(&segments, &adapters), false, false);
    let square = f64::from(layer.shape.d) * f64::from(layer.shape.k);
    let own = work.terms.iter().filter(|term| term.kernel == kernel).map(|term| term.macs as f64).sum::<f64>();
    let macs = if kernel == Kernel::Matmul { f64::from(equal.rows) * square } else { own };
    let of_base = u64::from(equal.part == Part::Additive);
    let launches = work.launches.saturating_sub(of_base) as f64 * launch.seconds;
    let (estimate, all_macs) = match kernel {
        Kernel::Fused => (Estimate::Median, macs + 2.0 * f64::from(tokens) * square),
        _ => (Estimate::LowerQuartile, macs),
    };
    let taken = Taken::new(estimate);
    Ok(Point { kernel, place, schedule, beside, macs, all_macs, launches, taken, is_measured: false })
}

/// What a schedule without its base GEMM does to y before it adds to it; nothing but on the host, where y is zeros first.
fn zeros(device: &Device, base: Schedule) -> Option<Schedule> {
    (device.info().backend == BackendKind::Host).then(|| base.without_gemm())
}

/// A point is tried where the last smaller one of its kernel says that it takes no more than so many times the longest call: more
/// work at once is usually cheaper a MAC.
const HOPE: f64 = 2.0;

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
            let (_, mut seconds) = point.take(bench)?;
            if seconds > effort.longest_call {
                // A first call may still meet a compiler at work, or memory that nothing has touched.
                seconds = seconds.min(point.take(bench)?.1);
            }
            // A kernel has a point, however slow the device.
            point.is_measured = seconds <= effort.longest_call || !taken.contains_key(&point.kernel);
            taken.insert(point.kernel, seconds / point.all_macs);
        }
        done(point.all_macs);
    }
    Ok(())
}

/// What was taken of points of one kernel, by MAC.
pub(super) fn observations<'a>(points: impl Iterator<Item = (Place, f64, &'a Taken)>) -> Vec<Observation> {
    let points: Vec<_> = points.filter(|(_, _, taken)| !taken.is_empty()).collect();
    let typical = typical(points.iter().map(|(_, _, taken)| *taken));
    let observation = |(place, macs, taken): (Place, f64, &Taken)| Observation {
        place,
        value: taken.seconds() / macs,
        noise: taken.noise(typical) / macs,
    };
    points.into_iter().map(observation).collect()
}

/// What a low-rank MAC is priced at least, as a share of the base GEMM's best: a difference of two times can come out as nothing,
/// and nothing has no logarithm.
const LEAST_SHARE: f64 = 0.25;

fn raise_differences(surfaces: &mut BTreeMap<Kernel, Surface>) {
    let best = surfaces[&Kernel::Matmul].seconds_per_mac.iter().copied().fold(f64::INFINITY, f64::min);
    let least = LEAST_SHARE * best;
    for surface in surfaces.values_mut() {
        for value in surface.seconds_per_mac.iter_mut().filter(|value| value.is_nan() || **value < least) {
            *value = least;
        }
    }
}
