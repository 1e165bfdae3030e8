//! Measures the coefficients of the cost model on a device: c0, the bandwidth, and seconds per MAC of every kernel at a few
//! regimes. Each is read off the time of a real step of a schedule, less what the model says of the step's other terms.

use std::collections::BTreeMap;
use std::time::Instant;

use flora_codegen::batch::{AdapterSlots, BatchShape, LayerShape, LowRankSlots, Segment, VirtualRowSlots};
use flora_codegen::cost::{Coefficients, Curve, Kernel, SCHEMA, Term, Work};
use flora_codegen::kernels::Epilogue;
use flora_codegen::lowering::{Lowering, Part, lowerings_of};
use flora_codegen::plan::Plan;
use flora_codegen::schedule::{Schedule, Step, schedule};
use flora_ir::Activation;
use serde::Serialize;

use crate::device::{Buffer, Device, DeviceError, LayerOperands, PoolBuffer};

/// How long to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// d and k of the layers that are timed.
    pub width: u32,
    /// Rows, and rows an adapter, that every kernel is timed at; rising.
    pub regimes: &'static [u64],
    /// Timed runs of each point, after one to warm up.
    pub runs: usize,
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
    /// What the step gave for the coefficient.
    pub seconds_per_mac: f64,
}

/// Coefficients and the measurements behind them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tuning {
    /// The coefficients.
    pub coefficients: Coefficients,
    /// Median seconds of an empty launch's schedule, and its spread.
    pub launch_spread: f64,
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
    let bench = Bench::new(device, effort);
    let total = 3 + 5 * effort.regimes.len();
    let mut done = 0;
    let mut advance = || {
        done += 1;
        progress(done, total);
    };
    let mut coefficients = Coefficients {
        schema: SCHEMA,
        flora: env!("CARGO_PKG_VERSION").to_owned(),
        device: device.info().fingerprint(),
        seconds_per_launch: 0.0,
        seconds_per_byte: 0.0,
        seconds_per_mac: BTreeMap::new(),
    };

    let launch = bench.launch()?;
    coefficients.seconds_per_launch = launch.seconds;
    advance();
    let (bandwidth, bytes) = bench.bandwidth()?;
    coefficients.seconds_per_byte = (bandwidth.seconds - launch.seconds).max(0.0) / bytes;
    advance();

    let mut measurements = Vec::new();
    let mut point = |coefficients: &mut Coefficients, kernel, regime, sample: Sample, macs: f64, rest: f64| {
        // A step that is no slower than the model's other terms costs next to nothing; it may not cost less than that.
        let seconds_per_mac = ((sample.seconds - rest) / macs).max(1e-16);
        measurements.push(Measurement { kernel, regime, seconds: sample.seconds, spread: sample.spread, seconds_per_mac });
        coefficients.seconds_per_mac.entry(kernel).or_insert_with(Curve::default).points.push((regime, seconds_per_mac));
    };

    let few = bench.multiplicative(1, 16)?;
    let many = bench.multiplicative(MANY_VIRTUAL_ROWS, 16)?;
    let added = Sample { seconds: (many.seconds - few.seconds).max(0.0), spread: many.spread };
    let macs = bench.square() * ADAPTERS as f64 * (MANY_VIRTUAL_ROWS - 1) as f64;
    point(&mut coefficients, Kernel::Materialise, 1, added, macs, 0.0);
    advance();

    for &regime in effort.regimes {
        for kernel in [Kernel::Matmul, Kernel::Stacked, Kernel::Bmm, Kernel::LowRankBmm, Kernel::Segmented] {
            let (sample, work) = bench.kernel(kernel, regime)?;
            let (macs, rest) = unexplained(&work, kernel, &coefficients);
            point(&mut coefficients, kernel, regime, sample, macs, rest);
            advance();
        }
    }
    Ok(Tuning { coefficients, launch_spread: launch.spread, bandwidth_spread: bandwidth.spread, measurements })
}

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
    fn new(device: &'a Device, effort: Effort) -> Self {
        let width = effort.width as usize;
        let slots = ADAPTERS as usize * MANY_VIRTUAL_ROWS.max(RANK as usize);
        let pool = || PoolBuffer { buffer: device.upload(&numbers(slots * width)), slots: slots as u32 };
        let operands = LayerOperands {
            shape: LayerShape { d: effort.width, k: effort.width },
            base_weight: device.upload(&numbers(width * width)),
            bias: Some(device.upload(&numbers(width))),
            in_pool: pool(),
            out_pool: pool(),
            epilogue: Epilogue { bias: true, activation: Activation::Identity },
        };
        Self { device, effort, operands }
    }

    fn square(&self) -> f64 {
        f64::from(self.effort.width) * f64::from(self.effort.width)
    }

    /// Median and spread of a schedule's time.
    fn time(&self, schedule: &Schedule, x: &Buffer) -> Result<Sample, DeviceError> {
        let mut seconds = Vec::with_capacity(self.effort.runs);
        for run in 0..=self.effort.runs {
            let start = Instant::now();
            let y = self.device.execute(&self.operands, schedule, x)?;
            self.device.synchronize()?;
            drop(y);
            if run > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let at = |part: f64| seconds[((seconds.len() - 1) as f64 * part).round() as usize];
        let median = at(0.5);
        Ok(Sample { seconds: median, spread: (at(0.75) - at(0.25)) / median.max(f64::MIN_POSITIVE) })
    }

    fn input(&self, tokens: u32) -> Buffer {
        self.device.upload(&numbers(tokens as usize * self.effort.width as usize))
    }

    /// A launch of one row's epilogue.
    fn launch(&self) -> Result<Sample, DeviceError> {
        let schedule = Schedule { tokens: 1, in_slots: 0, out_slots: 0, steps: vec![Step::Finish] };
        self.time(&schedule, &self.input(1))
    }

    /// The epilogue over 16 MiB: every number is read and written.
    fn bandwidth(&self) -> Result<(Sample, f64), DeviceError> {
        let tokens = (4 << 20) / self.effort.width;
        let schedule = Schedule { tokens, in_slots: 0, out_slots: 0, steps: vec![Step::Finish] };
        let bytes = 2.0 * 4.0 * f64::from(tokens) * f64::from(self.effort.width);
        Ok((self.time(&schedule, &self.input(1))?, bytes))
    }

    /// `bmm` of multiplicative adapters with `virtual_rows` each.
    fn multiplicative(&self, virtual_rows: usize, rows: u32) -> Result<Sample, DeviceError> {
        let (segments, adapters) = distinct(rows, |first| multiplicative(first, virtual_rows));
        let (sample, _) = self.step(Lowering::Bmm, Part::Multiplicative, &segments, &adapters)?;
        Ok(sample)
    }

    fn kernel(&self, kernel: Kernel, regime: u64) -> Result<(Sample, Work), DeviceError> {
        let rows = regime as u32;
        let additive = |first| AdapterSlots {
            low_rank: LowRankSlots { shrink: first, expand: first, rank: RANK },
            ..AdapterSlots::base()
        };
        let one_segment = [Segment { rows, adapter: 0 }];
        match kernel {
            Kernel::Matmul => {
                let schedule = Schedule { tokens: rows, in_slots: 0, out_slots: 0, steps: vec![Step::BaseGemm] };
                let work = Work {
                    launches: 1,
                    terms: vec![Term { kernel, regime, macs: regime * self.square() as u64, bytes: 0 }],
                };
                Ok((self.time(&schedule, &self.input(rows))?, work))
            }
            Kernel::Stacked => {
                self.step(Lowering::Stacked, Part::Multiplicative, &one_segment, &[multiplicative(0, 1)])
            }
            Kernel::LowRankBmm => {
                let (segments, adapters) = distinct(rows, additive);
                self.step(Lowering::Bmm, Part::Additive, &segments, &adapters)
            }
            Kernel::Segmented => {
                let (segments, adapters) = distinct(rows, additive);
                self.step(Lowering::Segmented, Part::Additive, &segments, &adapters)
            }
            Kernel::Bmm | Kernel::Materialise | Kernel::Move => {
                let (segments, adapters) = distinct(rows, |first| multiplicative(first, 1));
                self.step(Lowering::Bmm, Part::Multiplicative, &segments, &adapters)
            }
        }
    }

    /// Times the step of one lowering alone, without the base GEMM that goes before it.
    fn step(
        &self,
        lowering: Lowering,
        part: Part,
        segments: &[Segment],
        adapters: &[AdapterSlots],
    ) -> Result<(Sample, Work), DeviceError> {
        let plan = match part {
            Part::Multiplicative => Plan { multiplicative: lowering, additive: Lowering::Segmented },
            Part::Additive => Plan { multiplicative: Lowering::Stacked, additive: lowering },
        };
        let mut whole = schedule(&plan, self.operands.shape, segments, adapters, false)
            .map_err(|error| DeviceError::Execution(error.to_string()))?;
        if part == Part::Additive {
            whole.steps.retain(|step| !matches!(step, Step::BaseGemm));
        }
        let batch = BatchShape::of(segments, adapters);
        let row = lowerings_of(part).find(|row| row.lowering == lowering);
        let work = row.map(|row| (row.work)(self.operands.shape, &batch)).unwrap_or_default();
        Ok((self.time(&whole, &self.input(whole.tokens))?, work))
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
