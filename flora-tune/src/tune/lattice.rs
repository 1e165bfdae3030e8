//! The points of a lattice, at which every kernel is timed: pass after pass over all extents, with the batches that are held out in
//! between.

use std::collections::BTreeMap;
use std::time::Instant;

use flora_plan::batch::BatchShape;
use flora_plan::cost::{DeviceCoefficients, Kernel, Place, PricedLayer, Surface, work};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering, Part, PartLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, can_hold, schedule};

use super::clock::{Clock, Times};
use super::effort::{Effort, MOST_ROWS, MOST_SLOTS};
use super::gradients::{self, Gradients};
use super::held_out::Batches;
use super::surfaces::{Responses, Surfaces, fit_all};
use super::taken::Taken;
use super::{Launch, with_format};
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

/// The batch that a kernel is timed by at a place of its surface. Virtual rows are those of adapters of rank 4, as far as they are so many:
/// rows of x that are read again are in a cache, as they are not where each has a virtual row of its own.
pub fn timed_batch(kernel: Kernel, surface: &Surface, place: Place) -> EqualSegments {
    let (part, _) = needed_by(kernel);
    let (adapters, rows, rank) =
        (surface.adapters[place.adapters], surface.rows[place.rows], surface.ranks[place.rank]);
    let shared = [4, 2, 1].into_iter().find(|shared| rows.is_multiple_of(*shared)).unwrap_or(1);
    match kernel {
        Kernel::Stacked => EqualSegments { part, adapters, rows: rows / shared, rank: shared },
        _ => EqualSegments { part, adapters, rows, rank },
    }
}

/// A point with what is run there.
#[derive(Debug)]
pub(super) struct Point {
    pub(super) kernel: Kernel,
    pub(super) place: Place,
    schedule: Schedule,
    /// What the schedule does beside the kernel and its base GEMM, run by itself.
    beside: Option<Schedule>,
    /// Of the kernel.
    pub(super) macs: f64,
    /// Rows of the base GEMM that is run with the kernel; 0 without one.
    pub(super) base_rows: u32,
    pub(super) base_macs: f64,
    /// Of everything that is run.
    all_macs: f64,
    /// Seconds of launches.
    launches: f64,
    /// Seconds of the kernel, with its base GEMM.
    pub(super) taken: Taken,
    /// Seconds of one call.
    pub(super) surveyed: f64,
    is_measured: bool,
}

impl Point {
    /// One measurement. What is beside kernels of so many rows is measured once a pass.
    fn measure(
        &mut self,
        benches: &Benches<'_>,
        clock: &mut Clock<'_>,
        beside: &mut BTreeMap<u32, f64>,
    ) -> Result<(), DeviceError> {
        let bench = benches.of(self.schedule.in_slots());
        let beside = match &self.beside {
            Some(schedule) => match beside.get(&schedule.tokens()) {
                Some(seconds) => *seconds,
                None => {
                    let seconds = bench.seconds(schedule)?;
                    beside.insert(schedule.tokens(), seconds);
                    seconds
                }
            },
            None => 0.0,
        };
        let moment = clock.now()?;
        let seconds = bench.seconds(&self.schedule)?;
        self.taken.push(seconds - beside - self.launches, seconds, moment);
        Ok(())
    }

    /// Measurements in a pass. All prices have a GEMM in them, and its points are few.
    fn repetitions(&self, pass: usize) -> usize {
        match (self.is_measured, self.taken.is_long()) {
            (false, _) => 0,
            (true, false) => 1 + usize::from(self.kernel.is_gemm()),
            (true, true) => usize::from(pass < PASSES_OF_LONG_CALLS || self.kernel.is_gemm()),
        }
    }

    /// What its only call so far says.
    fn first(&self) -> Taken {
        let mut taken = self.taken.without_measurements();
        if self.is_measured {
            taken.push(self.surveyed - self.launches, self.surveyed, Default::default());
        }
        taken
    }
}

/// What is measured of the layers of one extent.
struct Extent<'a> {
    benches: Benches<'a>,
    points: Vec<Point>,
    /// Nothing where GEMMs alone are timed.
    gradients: Option<Gradients<'a>>,
}

/// What was measured of layers of one format.
pub(super) struct Measured<'a> {
    pub(super) surfaces: Surfaces,
    pub(super) held_out: Batches<'a>,
    pub(super) times: Times,
    pub(super) responses: Responses,
}

/// Measures the surfaces of layers of `format`, and times batches that are held out; `coefficients` are those that don't depend on it.
pub(super) fn measure<'a>(
    device: &'a Device,
    format: LayerFormat,
    effort: &Effort,
    launch: &Launch,
    coefficients: &DeviceCoefficients,
    progress: &mut impl FnMut(u64, u64),
) -> Result<Measured<'a>, DeviceError> {
    let whole = Instant::now();
    let mut clock = Clock::new(device)?;
    let axes: BTreeMap<Kernel, Surface> =
        Kernel::TIMED.iter().map(|(_, kernel)| (*kernel, empty(*kernel, effort))).collect();
    let mut extents = Vec::with_capacity(effort.gemm_extents.len());
    let steps = effort.gemm_extents.len() * (effort.passes + 1);
    for (position, extent) in effort.gemm_extents.iter().enumerate() {
        let layer = PricedLayer { shape: LayerShape { d: format.weight.whole(*extent), k: *extent }, format };
        let mut points = points(device, layer, &axes, effort, launch, &clock)?;
        let most_slots = points.iter().map(|point| point.schedule.in_slots()).max().unwrap_or(1);
        let benches = Benches::new(device, layer, most_slots, launch)?;
        survey(&benches, &mut points, effort)?;
        let is_whole = effort.extents.contains(extent);
        let gradients = is_whole.then(|| Gradients::new(device, layer, effort, &clock)).transpose()?;
        extents.push(Extent { benches, points, gradients });
        progress(position as u64 + 1, steps as u64);
    }
    let surveyed = fit_all(&axes, all_points(&extents), |point| point.first());
    let rough = with_format(coefficients.clone(), format, surveyed);
    let mut held_out = Batches::draw(device, format, effort, launch, (&rough, &clock))?;
    let start = Instant::now();
    let mut step = effort.gemm_extents.len();
    for pass in 0..effort.passes {
        if pass >= FEWEST_PASSES && whole.elapsed().as_secs_f64() > effort.seconds {
            break;
        }
        for own in &mut extents {
            let mut beside = BTreeMap::new();
            for point in &mut own.points {
                for _ in 0..point.repetitions(pass) {
                    point.measure(&own.benches, &mut clock, &mut beside)?;
                }
            }
            if let Some(gradients) = &mut own.gradients {
                gradients.pass(&mut clock)?;
            }
            step += 1;
            progress(step as u64, steps as u64);
        }
        held_out.pass(&mut clock)?;
    }
    let most = start.elapsed().div_f64(SHARE_OF_PASSES);
    measure_again(&mut extents, &mut clock, effort.passes, |start| start.elapsed() < most)?;
    clock.read()?;
    let times = clock.times();
    let responses = Responses::of(&axes, all_points(&extents), &times);
    let seconds_per_mac = fit_all(&axes, all_points(&extents), |point| responses.told(point, &times));
    let of_gradients: Vec<_> =
        extents.into_iter().filter_map(|own| own.gradients).flat_map(Gradients::into_points).collect();
    let gradients = gradients::surfaces(&of_gradients, effort, &times);
    Ok(Measured { surfaces: Surfaces { seconds_per_mac, gradients }, held_out, times, responses })
}

fn all_points<'a>(extents: &'a [Extent<'_>]) -> impl Iterator<Item = &'a Point> + Clone {
    extents.iter().flat_map(|own| &own.points)
}

/// Passes that are made however long they take.
const FEWEST_PASSES: usize = 3;
/// What was disturbed is measured again for this part of what the passes took.
const SHARE_OF_PASSES: f64 = 8.0;

/// Measures again what is unsteady, the unsteadiest first, up to `passes` times and as long as `goes_on`.
fn measure_again(
    extents: &mut [Extent<'_>],
    clock: &mut Clock<'_>,
    passes: usize,
    goes_on: impl Fn(&Instant) -> bool,
) -> Result<(), DeviceError> {
    let times = clock.times();
    let responses = Responses::of(&BTreeMap::new(), all_points(extents), &times);
    let mut unsteady = Vec::new();
    for (extent, own) in extents.iter().enumerate() {
        for (at, point) in own.points.iter().enumerate() {
            let told = responses.told(point, &times);
            if told.is_unsteady() {
                unsteady.push((told.share_apart(), extent, at));
            }
        }
    }
    unsteady.sort_by(|one, other| other.0.total_cmp(&one.0));
    let start = Instant::now();
    for _ in 0..passes {
        let mut beside = vec![BTreeMap::new(); extents.len()];
        for (_, extent, at) in &unsteady {
            if !goes_on(&start) {
                return Ok(());
            }
            let Extent { benches, points, .. } = &mut extents[*extent];
            points[*at].measure(benches, clock, &mut beside[*extent])?;
        }
    }
    Ok(())
}

/// Passes over points that take long. They are the steadiest, and all passes over them would take most of the time.
const PASSES_OF_LONG_CALLS: usize = 3;

/// One layer with pools of several sizes.
#[derive(Debug)]
struct Benches<'a> {
    /// Rising by their slots.
    by_slots: Vec<(u32, LayerBench<'a>)>,
}

/// The next larger pool has so many times the vectors.
const POOL_STEP: u32 = 8;

impl<'a> Benches<'a> {
    fn new(device: &'a Device, layer: PricedLayer, most: u32, launch: &Launch) -> Result<Self, DeviceError> {
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
    let (rows, ranks, adapters, extents) = match kernel.is_gemm() {
        true => (effort.gemm_rows, &[1][..], &[1][..], effort.gemm_extents),
        false => (effort.rows, effort.ranks, effort.adapters, effort.extents),
    };
    // An adapter of one virtual row is stacked whatever the lowering.
    let least = if kernel == Kernel::OnChip { 2 } else { 1 };
    Surface {
        rows: rows.to_vec(),
        ranks: ranks.iter().map(|rank| (*rank).max(least)).collect(),
        adapters: adapters.to_vec(),
        extents: extents.to_vec(),
        ..Surface::default()
    }
}

/// What is run at every place of this layer's extent, the least work first.
fn points(
    device: &Device,
    layer: PricedLayer,
    surfaces: &BTreeMap<Kernel, Surface>,
    effort: &Effort,
    launch: &Launch,
    clock: &Clock<'_>,
) -> Result<Vec<Point>, DeviceError> {
    let mut points = Vec::new();
    for (kernel, surface) in surfaces {
        for place in surface.places().filter(|place| surface.extents[place.extent] == layer.shape.k) {
            let (_, plan) = needed_by(*kernel);
            let equal = timed_batch(*kernel, surface, place);
            if equal.tokens() <= u64::from(MOST_ROWS) && equal.slots() <= u64::from(pool_slots(effort)) {
                let (segments, adapters) = equal.batch();
                let batch = BatchShape::of(&segments, &adapters);
                if can_hold(&plan, layer.shape, &batch, device.info().largest_buffer_bytes) {
                    let taken = Taken::new(clock.estimate());
                    points.push(point(device, (*kernel, place), layer, (plan, equal), launch, taken)?);
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
    (plan, equal): (Plan, EqualSegments),
    launch: &Launch,
    taken: Taken,
) -> Result<Point, DeviceError> {
    let (segments, adapters) = equal.batch();
    let rows = |tokens| Schedule::base_gemm(layer.shape, tokens).map_err(unscheduled);
    let whole = || schedule(&plan, layer.shape, &segments, &adapters, false).map_err(unscheduled);
    let tokens = equal.tokens() as u32;
    let (schedule, beside, base_rows) = match kernel {
        Kernel::Matmul => (rows(equal.rows)?, None, 0),
        // In the base GEMM's launch, so that it is seen in nothing but a difference.
        Kernel::Fused => (whole()?, None, tokens),
        // By themselves, where a time that is all theirs can be had. What is left beside them are the zeros that they add to.
        Kernel::LowRankBmm | Kernel::Segmented => (whole()?.without_gemm(), zeros(device, rows(tokens)?), 0),
        Kernel::Merged | Kernel::Stacked | Kernel::OnChip | Kernel::Bmm | Kernel::Move => (whole()?, None, 0),
    };
    let work = work(&plan, layer, &BatchShape::of(&segments, &adapters), false, false);
    let square = f64::from(layer.shape.d) * f64::from(layer.shape.k);
    let own = work.terms.iter().filter(|term| term.kernel == kernel).map(|term| term.macs as f64).sum::<f64>();
    let macs = if kernel == Kernel::Matmul { f64::from(equal.rows) * square } else { own };
    let base_macs = f64::from(base_rows) * square;
    let all_macs = macs + base_macs;
    let of_base = u64::from(equal.part == Part::Additive);
    let launches = work.launches.saturating_sub(of_base) as f64 * launch.seconds;
    let surveyed = f64::NAN;
    Ok(Point {
        kernel,
        place,
        schedule,
        beside,
        macs,
        base_rows,
        base_macs,
        all_macs,
        launches,
        taken,
        surveyed,
        is_measured: false,
    })
}

/// What a schedule without its base GEMM does to y before it adds to it; nothing but on the host, where y is zeros first.
fn zeros(device: &Device, base: Schedule) -> Option<Schedule> {
    (device.info().backend == BackendKind::Host).then(|| base.without_gemm())
}

/// A point is tried where the last smaller one of its kernel says that it takes no more than so many times the longest call: more
/// work at once is usually cheaper a MAC.
const HOPE: f64 = 2.0;

/// Runs every point once, and leaves out those that take too long.
fn survey(benches: &Benches<'_>, points: &mut [Point], effort: &Effort) -> Result<(), DeviceError> {
    let mut taken: BTreeMap<Kernel, f64> = BTreeMap::new();
    for point in points {
        let expected = taken.get(&point.kernel).map_or(0.0, |seconds_per_mac| point.all_macs * seconds_per_mac);
        if expected <= HOPE * effort.longest_call {
            let bench = benches.of(point.schedule.in_slots());
            let mut seconds = bench.once(&point.schedule)?;
            if seconds > effort.longest_call {
                // A first call may still meet a compiler at work, or memory that nothing has touched.
                seconds = seconds.min(bench.once(&point.schedule)?);
            }
            // A kernel has a point, however slow the device.
            point.is_measured = seconds <= effort.longest_call || !taken.contains_key(&point.kernel);
            point.surveyed = seconds;
            taken.insert(point.kernel, seconds / point.all_macs);
        }
    }
    Ok(())
}
