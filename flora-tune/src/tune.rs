//! Measures the coefficients of the cost model: launches, bandwidth, and seconds per MAC of every kernel on a lattice of rows,
//! ranks, adapters and extents. Points are taken pass after pass, so that what disturbs the machine for a while disturbs one pass
//! of all of them and shows in the spread.
//!
//! A kernel's coefficient is what a batch that needs it takes beyond what the rest of it takes, divided by the kernel's MACs. The
//! rest of a batch of additive adapters is its base GEMM, which is measured beside it every time. Gradients of adapters' vectors are
//! timed in the same passes.

mod blueprints;
mod effort;
mod gradients;
mod held_out;
mod lattice;

use std::collections::BTreeMap;

use flora_plan::cost::{Coefficients, DeviceCoefficients, PricedLayer, SCHEMA};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::schedule::Schedule;
use serde::Serialize;

pub use self::effort::Effort;
pub use self::held_out::HeldOut;
pub use self::lattice::needed_by;
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
        seconds_per_byte: bandwidth.median(),
        bandwidth_spread: bandwidth.spread(),
        blueprints,
        formats: BTreeMap::new(),
    };
    let mut held_out = BTreeMap::new();
    for (position, format) in formats.iter().enumerate() {
        // Every format is a share of the whole; within it the lattice says how far it is.
        let whole = formats.len() as u64;
        let mut share = |done: u64, total: u64| progress(position as u64 * total.max(1) + done, whole * total.max(1));
        let measured = lattice::measure(device, *format, effort, &launch, &mut share)?;
        let lattice::Surfaces { seconds_per_mac, gradients } = measured;
        let name = format.to_string();
        coefficients.formats.insert(name.clone(), Coefficients { seconds_per_mac, gradients, error: None });
        let points = held_out::measure(device, *format, effort, &launch, &coefficients)?;
        let pairs = points.iter().flat_map(|point| &point.plans).map(|plan| (plan.predicted_seconds, plan.seconds));
        let error = flora_plan::cost::FitError::of(pairs);
        if let Some(own) = coefficients.formats.get_mut(&name) {
            own.error = error;
        }
        held_out.insert(name, points);
    }
    Ok(Tuning { coefficients, seconds_to_synchronize: launch.wait, held_out })
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
    let (mut one, mut slope) = (Sample::default(), Sample::default());
    for _ in 0..4 * effort.passes {
        let seconds = [bench.seconds(&schedules[0])?, bench.seconds(&schedules[1])?];
        one.push(seconds[0]);
        slope.push((seconds[1] - seconds[0]) / (MANY_LAUNCHES - 1) as f64);
    }
    let seconds = slope.median().max(0.0);
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
fn bandwidth(device: &Device, effort: &Effort, launch: &Launch) -> Result<Sample, DeviceError> {
    let limit = device.info().largest_buffer_bytes.unwrap_or(u64::MAX);
    let bytes = u64::from(BANDWIDTH_BYTES).min(limit) as u32;
    let epilogue = epilogue(device)?;
    let finish = Schedule::finish(epilogue.layer().shape, bytes / 4 / EPILOGUE_WIDTH, 1).map_err(unscheduled)?;
    let side = f64::from(bytes / 4).sqrt() as u32;
    let shape = LayerShape { d: side, k: side };
    let gemm = LayerBench::new(device, PricedLayer { shape, format: LayerFormat::default() }, 1)?;
    let row = Schedule::base_gemm(shape, 1).map_err(unscheduled)?;
    let (mut by_epilogue, mut by_gemm) = (Sample::default(), Sample::default());
    for _ in 0..effort.passes {
        let each = |seconds: f64, bytes: f64| (seconds - launch.seconds - launch.wait).max(0.0) / bytes;
        by_epilogue.push(each(epilogue.seconds(&finish)?, 2.0 * f64::from(bytes)));
        by_gemm.push(each(gemm.seconds(&row)?, f64::from(side) * f64::from(side) * 4.0));
    }
    Ok(if by_gemm.median() < by_epilogue.median() { by_gemm } else { by_epilogue })
}
