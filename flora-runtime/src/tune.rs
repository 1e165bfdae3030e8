//! Measures the coefficients of the cost model on a device: c0, the bandwidth, and seconds per MAC of every kernel at a few
//! regimes. Each is read off the time of a real step of a schedule, less what the model says of the step's other terms.

use std::collections::BTreeMap;
use std::time::Instant;

use flora_codegen::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use flora_codegen::cost::{Coefficients, Kernel, SCHEMA, Term, Work, work};
use flora_codegen::layer::{Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_codegen::lowering::Lowering;
use flora_codegen::plan::Plan;
use flora_codegen::schedule::{Schedule, ScheduleError, schedule};
use flora_codegen::weight::PackedWeight;
use flora_ir::Activation;
use serde::Serialize;

use crate::device::{BackendKind, Device, DeviceError, LayerOperands, PoolBuffer};

/// How long to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// d and k of the layers that are timed.
    width: u32,
    /// Rows, and rows an adapter, that every kernel is timed at; rising.
    regimes: &'static [u64],
    /// Timed runs of each point, after one to warm up.
    runs: usize,
}

impl Effort {
    /// A few seconds on a host.
    pub const SHORT: Self = Self { width: 1024, regimes: &[1, 4, 16, 64, 256], runs: 7 };
    /// Under a second; where a command needs coefficients and none were saved.
    pub const QUICK: Self = Self { width: 512, regimes: &[1, 16, 128], runs: 5 };
}

/// One measured point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measurement {
    /// The kernel.
    pub kernel: Kernel,
    /// The point of its curve.
    pub regime: u64,
    /// Median seconds of the step.
    pub seconds: f64,
    /// (third quartile − first quartile) / median.
    pub spread: f64,
    /// What the step gave for the coefficient; `None` where the model's other terms explain all of its time, so that the point
    /// is left out of the curve.
    pub seconds_per_mac: Option<f64>,
}

/// Coefficients and the measurements behind them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tuning {
    /// The coefficients.
    pub coefficients: Coefficients,
    /// The spread of the launch measurement.
    pub launch_spread: f64,
    /// Seconds from a schedule's last launch until the device says that it is done; once a batch, so in no lowering's price.
    pub seconds_to_synchronize: f64,
    /// The spread of the bandwidth measurement.
    pub bandwidth_spread: f64,
    /// Every point.
    pub measurements: Vec<Measurement>,
}

/// Adapters in every timed batch of several.
const ADAPTERS: u64 = 4;
/// The rank of timed additive adapters.
const RANK: u32 = 16;
/// Virtual rows of the adapter that tells making W_i from using it.
const MANY_VIRTUAL_ROWS: usize = 17;

/// Measures `device`. `progress` is told the points done and to do.
///
/// # Errors
/// The device fails at a timed step.
pub fn tune(device: &Device, effort: Effort, mut progress: impl FnMut(usize, usize)) -> Result<Tuning, DeviceError> {
    let bench = Bench::new(device, effort)?;
    let total = 3 + timed().count() * effort.regimes.len();
    let mut done = 0;
    let mut advance = || {
        done += 1;
        progress(done, total);
    };
    let mut coefficients = Coefficients {
        schema: SCHEMA,
        flora: env!("CARGO_PKG_VERSION").to_owned(),
        device: device.info().fingerprint(),
        pads_blocks: bench.pads(),
        largest_buffer_bytes: device.info().largest_buffer_bytes,
        seconds_per_launch: 0.0,
        seconds_per_byte: 0.0,
        seconds_per_mac: BTreeMap::new(),
    };

    // A batch waits for the device once, however many launches it makes: the slope is a launch, the rest is the wait.
    let (one, many) = (bench.finish(1, 1)?, bench.finish(1, MANY_LAUNCHES)?);
    coefficients.seconds_per_launch = ((many.seconds - one.seconds) / (MANY_LAUNCHES - 1) as f64).max(0.0);
    let wait = (one.seconds - coefficients.seconds_per_launch).max(0.0);
    advance();
    let bandwidth = bench.bandwidth(one.seconds)?;
    coefficients.seconds_per_byte = bandwidth.seconds;
    advance();

    let mut measurements = Vec::new();
    let mut point = |coefficients: &mut Coefficients, kernel, regime, sample: Sample, macs: f64, rest: f64| {
        let own = (sample.seconds - rest) / macs;
        let seconds_per_mac = (own > 0.0).then_some(own);
        measurements.push(Measurement {
            kernel,
            regime,
            seconds: sample.seconds,
            spread: sample.spread,
            seconds_per_mac,
        });
        let curve = coefficients.seconds_per_mac.entry(kernel).or_default();
        curve.points.extend(seconds_per_mac.map(|seconds| (regime, seconds)));
    };

    let (few, many) = (bench.materialised(1)?, bench.materialised(MANY_VIRTUAL_ROWS)?);
    let added = Sample { seconds: (many.seconds - few.seconds).max(0.0), spread: many.spread };
    let macs = bench.square() * ADAPTERS as f64 * (MANY_VIRTUAL_ROWS - 1) as f64;
    point(&mut coefficients, Kernel::Materialise, 1, added, macs, 0.0);
    advance();

    for &regime in effort.regimes {
        for kernel in timed() {
            let (sample, work) = bench.kernel(kernel, regime)?;
            let (macs, rest) = unexplained(&work, kernel, &coefficients);
            point(&mut coefficients, kernel, regime, sample, macs, rest + wait);
            advance();
        }
    }
    // A kernel that is never slower than its bytes costs nothing beside them; the curve still has to have a point.
    for kernel in Coefficients::KERNELS {
        let curve = coefficients.seconds_per_mac.entry(kernel).or_default();
        if curve.points.is_empty() {
            curve.points.push((1, f64::MIN_POSITIVE));
        }
    }
    let (launch_spread, bandwidth_spread) = (one.spread, bandwidth.spread);
    Ok(Tuning { coefficients, launch_spread, seconds_to_synchronize: wait, bandwidth_spread, measurements })
}

/// The kernels with a curve over regimes, in the order in which one's time explains another's.
fn timed() -> impl Iterator<Item = Kernel> {
    Coefficients::KERNELS.into_iter().filter(|kernel| *kernel != Kernel::Materialise)
}

/// Launches of the schedule whose time less one launch's gives c0.
const MANY_LAUNCHES: usize = 9;
/// More than the last-level caches of most devices.
const BANDWIDTH_BYTES: u32 = 64 << 20;

/// The MACs of `kernel` in `work`, and the seconds of everything else in it.
fn unexplained(work: &Work, kernel: Kernel, coefficients: &Coefficients) -> (f64, f64) {
    let own = |term: &&Term| term.kernel == kernel;
    let macs = work.terms.iter().filter(own).map(|term| term.macs as f64).sum();
    let others = work.terms.iter().copied().filter(|term| term.kernel != kernel).collect();
    let others = Work { launches: work.launches, terms: others };
    (macs, others.price(coefficients))
}

#[derive(Clone, Copy)]
struct Sample {
    seconds: f64,
    spread: f64,
}

/// A layer of the timed width with enough vectors for every timed batch.
struct Bench<'a> {
    device: &'a Device,
    effort: Effort,
    operands: LayerOperands,
}

impl<'a> Bench<'a> {
    fn new(device: &'a Device, effort: Effort) -> Result<Self, DeviceError> {
        let width = effort.width as usize;
        let slots = ADAPTERS as usize * MANY_VIRTUAL_ROWS.max(RANK as usize);
        let pool = || -> Result<_, DeviceError> {
            Ok(PoolBuffer { buffer: device.upload(&numbers(slots * width))?, slots: slots as u32 })
        };
        let shape = LayerShape { d: effort.width, k: effort.width };
        let weight = PackedWeight::from_f32(WeightFormat::default(), shape, &numbers(width * width))
            .map_err(|error| DeviceError::Execution(error.to_string()))?;
        let operands = LayerOperands {
            shape,
            format: LayerFormat::default(),
            base_weight: device.upload_weight(&weight)?,
            bias: Some(device.upload(&numbers(width))?),
            in_pool: pool()?,
            out_pool: pool()?,
            epilogue: Epilogue { bias: true, activation: Activation::Identity, residual: false },
            merged: None,
        };
        Ok(Self { device, effort, operands })
    }

    /// The host multiplies one adapter after the other, and so no padding.
    fn pads(&self) -> bool {
        self.device.info().backend != BackendKind::Host
    }

    fn square(&self) -> f64 {
        f64::from(self.effort.width) * f64::from(self.effort.width)
    }

    /// Median and spread of a schedule's time.
    fn time(&self, schedule: Result<Schedule, ScheduleError>) -> Result<Sample, DeviceError> {
        let schedule = schedule.map_err(|error| DeviceError::Execution(error.to_string()))?;
        let x = self.device.upload(&numbers(schedule.tokens() as usize * self.effort.width as usize))?;
        let mut seconds = Vec::with_capacity(self.effort.runs);
        for run in 0..=self.effort.runs {
            let start = Instant::now();
            let y = self.device.execute(&self.operands, &schedule, &x, None)?;
            self.device.synchronize()?;
            let elapsed = start.elapsed().as_secs_f64();
            drop(y);
            // The first one warms up.
            if run > 0 {
                seconds.push(elapsed);
            }
        }
        seconds.sort_by(f64::total_cmp);
        let at = |part: f64| seconds[((seconds.len() - 1) as f64 * part).round() as usize];
        let median = at(0.5);
        Ok(Sample { seconds: median, spread: (at(0.75) - at(0.25)) / median.max(f64::MIN_POSITIVE) })
    }

    /// The epilogue of `rows` rows, `times` times: every number is read and written.
    fn finish(&self, rows: u32, times: usize) -> Result<Sample, DeviceError> {
        self.time(Schedule::finish(self.operands.shape, rows, times))
    }

    /// Seconds a byte, the lesser of two: the epilogue over rows that fill no cache, and one row by a weight that fills none.
    /// Devices differ in which of them something else slows down (fresh pages on a host, a lone row's GEMM on a GPU).
    fn bandwidth(&self, one_launch: f64) -> Result<Sample, DeviceError> {
        let rows = BANDWIDTH_BYTES / 4 / self.effort.width;
        let epilogue = self.finish(rows, 1)?;
        let weight =
            Bench::new(self.device, Effort { width: (f64::from(BANDWIDTH_BYTES) / 4.0).sqrt() as u32, ..self.effort })?;
        let gemm = weight.time(Schedule::base_gemm(weight.operands.shape, 1))?;
        let each =
            |sample: Sample, bytes: f64| Sample { seconds: (sample.seconds - one_launch).max(0.0) / bytes, ..sample };
        let epilogue = each(epilogue, 2.0 * f64::from(BANDWIDTH_BYTES));
        let gemm = each(gemm, f64::from(BANDWIDTH_BYTES));
        Ok(if gemm.seconds < epilogue.seconds { gemm } else { epilogue })
    }

    /// `bmm` of multiplicative adapters with `virtual_rows` each.
    fn materialised(&self, virtual_rows: usize) -> Result<Sample, DeviceError> {
        let (segments, adapters) = distinct(16, |first| multiplicative(first, virtual_rows));
        Ok(self.lowered(Lowering::Bmm, Lowering::Segmented, &segments, &adapters)?.0)
    }

    fn kernel(&self, kernel: Kernel, regime: u64) -> Result<(Sample, Work), DeviceError> {
        let rows = regime as u32;
        let additive = |first| AdapterSlots {
            low_rank: LowRankSlots { shrink: first, expand: first, rank: RANK },
            ..AdapterSlots::base()
        };
        let (stacked, bmm, segmented) = (Lowering::Stacked, Lowering::Bmm, Lowering::Segmented);
        let (on_chip, fused) = (Lowering::OnChip, Lowering::Fused);
        match kernel {
            Kernel::Stacked => {
                self.lowered(stacked, segmented, &[Segment { rows, adapter: 0 }], &[multiplicative(0, 1)])
            }
            Kernel::Bmm => {
                let (segments, adapters) = distinct(rows, |first| multiplicative(first, 1));
                self.lowered(bmm, segmented, &segments, &adapters)
            }
            Kernel::OnChip => {
                let (segments, adapters) = distinct(rows, |first| multiplicative(first, RANK as usize));
                self.lowered(on_chip, segmented, &segments, &adapters)
            }
            Kernel::Fused => {
                let (segments, adapters) = distinct(rows, additive);
                self.lowered(stacked, fused, &segments, &adapters)
            }
            Kernel::LowRankBmm => {
                let (segments, adapters) = distinct(rows, additive);
                self.lowered(stacked, bmm, &segments, &adapters)
            }
            Kernel::Segmented => {
                let (segments, adapters) = distinct(rows, additive);
                self.lowered(stacked, segmented, &segments, &adapters)
            }
            Kernel::Matmul | Kernel::Materialise | Kernel::Move => {
                self.lowered(stacked, segmented, &[Segment { rows, adapter: 0 }], &[AdapterSlots::base()])
            }
        }
    }

    /// Times a batch, the GEMM of additive adapters' base rows left out where it is a step of its own, and says what the rest is.
    fn lowered(
        &self,
        multiplicative: Lowering,
        additive: Lowering,
        segments: &[Segment],
        adapters: &[AdapterSlots],
    ) -> Result<(Sample, Work), DeviceError> {
        let shape = self.operands.shape;
        let plan = Plan::new(multiplicative, additive).map_err(|error| DeviceError::Execution(error.to_string()))?;
        let batch = BatchShape::of(segments, adapters);
        let mut whole = schedule(&plan, shape, segments, adapters, false);
        let mut whole_work = work(&plan, shape, &batch, false, self.pads());
        if batch.additive.tokens > 0 && additive != Lowering::Fused {
            whole = whole.map(Schedule::without_gemm);
            whole_work.launches -= 1;
            whole_work.terms.retain(|term| term.kernel != Kernel::Matmul);
        }
        Ok((self.time(whole)?, whole_work))
    }
}

/// An adapter of `virtual_rows` rows whose vectors start at slot `first`.
fn multiplicative(first: u32, virtual_rows: usize) -> AdapterSlots {
    let scales = (first..).take(virtual_rows);
    let scales = scales.map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) });
    AdapterSlots { virtual_rows: scales.collect(), low_rank: LowRankSlots::default() }
}

/// A segment of `rows` rows for each of a few adapters.
fn distinct(rows: u32, adapter: impl Fn(u32) -> AdapterSlots) -> (Vec<Segment>, Vec<AdapterSlots>) {
    let positions = 0..ADAPTERS as u32;
    let slots = MANY_VIRTUAL_ROWS.max(RANK as usize) as u32;
    let segments = positions.clone().map(|position| Segment { rows, adapter: position }).collect();
    (segments, positions.map(|position| adapter(position * slots)).collect())
}

/// Numbers between −0.5 and 0.5 without a pattern; their values don't matter, that they are no denormals does.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(next).collect()
}
