//! Measures the coefficients of the cost model: launches, bandwidth, and seconds per MAC of every kernel on a lattice of rows,
//! ranks, adapters and extents. Points are taken pass after pass, and batches that no coefficient is made from between them, so that what
//! disturbs the machine for a while disturbs one pass of all of them and shows in the spread. What a processor's speed did meanwhile is
//! taken out by a clock.
//!
//! A kernel's coefficient is what it takes divided by its MACs. Low-rank sums that have launches of their own are timed without the
//! base GEMM; what is fused into it is what a batch takes beyond what its base GEMM was found to take. Surfaces are
//! fitted to all points of a kernel, each by its noise. Gradients of adapters' vectors are timed in the same passes.

mod blueprints;
mod clock;
mod effort;
mod fit;
mod gradients;
mod held_out;
mod lattice;
mod surfaces;
mod taken;

use std::collections::BTreeMap;

use flora_plan::batch::BatchShape;
use flora_plan::cost::{Coefficients, DeviceCoefficients, Kernel, PricedLayer, SCHEMA, Surface, work};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::plan::Plan;
use flora_plan::schedule::Schedule;
use serde::Serialize;

use self::clock::Moment;
pub use self::effort::Effort;
pub use self::held_out::HeldOut;
pub use self::lattice::{needed_by, timed_batch};
use self::surfaces::Surfaces;
use self::taken::{Estimate, Taken};
use crate::measure::{LayerBench, Sample, unscheduled};
use flora_runtime::{BackendKind, Device, DeviceError};

/// Coefficients and what was measured beside them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tuning {
    /// The coefficients.
    pub coefficients: DeviceCoefficients,
    /// Seconds from a schedule's last launch until the device says that it is done; once a batch, so in no lowering's price.
    pub seconds_to_synchronize: f64,
    /// The batches that no coefficient was made from, by format.
    pub held_out: BTreeMap<String, Vec<HeldOut>>,
}

/// Launches of the schedule whose time less one launch's gives c0.
const MANY_LAUNCHES: usize = 17;
/// More than the last-level caches of most devices.
const BANDWIDTH_BYTES: u32 = 64 << 20;
/// Outputs of the layer whose epilogue is timed.
const EPILOGUE_WIDTH: u32 = 1024;

/// Measures `device` for layers of `formats`. `progress` is told the work done and to do, in units that take about as long as one
/// another.
///
/// # Errors
/// The device fails at a timed step, or hasn't got a format's types.
pub fn tune(
    device: &Device,
    formats: &[LayerFormat],
    effort: &Effort,
    mut progress: impl FnMut(u64, u64),
) -> Result<Tuning, DeviceError> {
    let launch = launch(device, effort)?;
    let bandwidth = bandwidth(device, effort, &launch)?;
    let blueprints = blueprints::measure(device, formats, effort, &launch)?;
    // What follows is measured as it will run.
    let device = &device.tuned(&blueprints);
    let mut coefficients = DeviceCoefficients {
        schema: SCHEMA,
        flora: env!("CARGO_PKG_VERSION").to_owned(),
        device: device.info().fingerprint(),
        // The host multiplies one adapter after the other, and so no padding.
        pads_blocks: device.info().backend != BackendKind::Host,
        largest_buffer_bytes: device.info().largest_buffer_bytes,
        seconds_per_launch: launch.seconds,
        launch_spread: launch.spread,
        seconds_per_byte: bandwidth.seconds(),
        bandwidth_spread: bandwidth.spread(),
        blueprints,
        formats: BTreeMap::new(),
    };
    let mut held_out = BTreeMap::new();
    for (position, format) in formats.iter().enumerate() {
        // Every format is a share of the whole; within it the lattice says how far it is.
        let whole = formats.len() as u64;
        let mut share = |done: u64, total: u64| progress(position as u64 * total.max(1) + done, whole * total.max(1));
        let measured = lattice::measure(device, *format, effort, &launch, &coefficients, &mut share)?;
        let lattice::Measured {
            surfaces: Surfaces { seconds_per_mac, gradients },
            held_out: batches,
            times,
            responses,
        } = measured;
        if let Some((seconds, spread)) = fastest_pass(&seconds_per_mac, *format)
            && seconds < coefficients.seconds_per_byte
        {
            (coefficients.seconds_per_byte, coefficients.bandwidth_spread) = (seconds, spread);
        }
        let name = format.to_string();
        coefficients = with_format(coefficients, *format, seconds_per_mac);
        let points = batches.compared(&coefficients, &responses, &times);
        let pairs = points.iter().flat_map(|point| &point.plans).map(|plan| (plan.predicted_seconds, plan.seconds));
        let error = flora_plan::cost::FitError::of(pairs);
        if let Some(own) = coefficients.formats.get_mut(&name) {
            (own.gradients, own.error) = (gradients, error);
        }
        held_out.insert(name, points);
    }
    Ok(Tuning { coefficients, seconds_to_synchronize: launch.wait, held_out })
}

/// Coefficients with these surfaces for layers of `format`.
fn with_format(
    mut coefficients: DeviceCoefficients,
    format: LayerFormat,
    seconds_per_mac: BTreeMap<Kernel, Surface>,
) -> DeviceCoefficients {
    let own = Coefficients { seconds_per_mac, gradients: BTreeMap::new(), error: None };
    coefficients.formats.insert(format.to_string(), own);
    coefficients
}

/// Seconds a byte of the pass over a base weight that reads fastest, with the spread of that. Nothing may be priced at less, and so
/// nothing that was measured may have taken less: a byte's price is a bound.
fn fastest_pass(seconds_per_mac: &BTreeMap<Kernel, Surface>, format: LayerFormat) -> Option<(f64, f64)> {
    let surface = seconds_per_mac.get(&Kernel::Matmul)?;
    let passes = surface.places().filter(|place| surface.measured[surface.index(*place)]).map(|place| {
        let (extent, rows) = (surface.extents[place.extent], u64::from(surface.rows[place.rows]));
        let layer = PricedLayer { shape: LayerShape { d: format.weight.whole(extent), k: extent }, format };
        let batch = BatchShape { tokens: rows, plain_rows: rows, adapters: 1, ..BatchShape::default() };
        let work = work(&Plan::default(), layer, &batch, false, false);
        let at = surface.index(place);
        (surface.seconds_per_mac[at] * work.macs() as f64 / work.bytes() as f64, surface.spread[at])
    });
    passes.min_by(|one, other| one.0.total_cmp(&other.0))
}

/// What a launch costs, and the wait at the end of a batch.
struct Launch {
    seconds: f64,
    spread: f64,
    wait: f64,
}

/// A batch waits for the device once, however many launches it makes: the slope is a launch, the rest is the wait.
fn launch(device: &Device, effort: &Effort) -> Result<Launch, DeviceError> {
    let bench = epilogue(device)?;
    let finish = |times| Schedule::finish(bench.layer().shape, 1, times).map_err(unscheduled);
    let schedules = [finish(1)?, finish(MANY_LAUNCHES)?];
    let (mut one, mut slope) = (Sample::default(), Taken::new(Estimate::Median));
    for _ in 0..4 * effort.passes {
        let seconds = [bench.seconds(&schedules[0])?, bench.seconds(&schedules[1])?];
        one.push(seconds[0]);
        slope.push((seconds[1] - seconds[0]) / (MANY_LAUNCHES - 1) as f64, seconds[1], Moment::default());
    }
    let seconds = slope.seconds().max(0.0);
    // On the host a call returns when it is done.
    let waits = device.info().backend != BackendKind::Host;
    let wait = if waits { (one.median() - seconds).max(0.0) } else { 0.0 };
    Ok(Launch { seconds, spread: slope.spread(), wait })
}

fn epilogue(device: &Device) -> Result<LayerBench<'_>, DeviceError> {
    let shape = LayerShape { d: 8, k: EPILOGUE_WIDTH };
    LayerBench::new(device, PricedLayer { shape, format: LayerFormat::default() }, 1)
}

/// Seconds a byte, the lesser of two: the epilogue over rows that fill no cache, and one row by a weight that fills none.
/// Devices differ in which of them something else slows down (fresh pages on a host, a lone row's GEMM on a GPU).
fn bandwidth(device: &Device, effort: &Effort, launch: &Launch) -> Result<Taken, DeviceError> {
    let limit = device.info().largest_buffer_bytes.unwrap_or(u64::MAX);
    let bytes = u64::from(BANDWIDTH_BYTES).min(limit) as u32;
    let epilogue = epilogue(device)?;
    let finish = Schedule::finish(epilogue.layer().shape, bytes / 4 / EPILOGUE_WIDTH, 1).map_err(unscheduled)?;
    let side = f64::from(bytes / 4).sqrt() as u32;
    let shape = LayerShape { d: side, k: side };
    let gemm = LayerBench::new(device, PricedLayer { shape, format: LayerFormat::default() }, 1)?;
    let row = Schedule::base_gemm(shape, 1).map_err(unscheduled)?;
    let [mut by_epilogue, mut by_gemm] = [(); 2].map(|()| Taken::new(Estimate::LowerQuartile));
    for _ in 0..effort.passes {
        let each = |taken: &mut Taken, seconds: f64, bytes: f64| {
            taken.push((seconds - launch.seconds - launch.wait).max(0.0) / bytes, seconds / bytes, Moment::default());
        };
        each(&mut by_epilogue, epilogue.seconds(&finish)?, 2.0 * f64::from(bytes));
        each(&mut by_gemm, gemm.seconds(&row)?, f64::from(side) * f64::from(side) * 4.0);
    }
    Ok(if by_gemm.seconds() < by_epilogue.seconds() { by_gemm } else { by_epilogue })
}
