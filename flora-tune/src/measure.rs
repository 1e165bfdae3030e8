//! Times one layer on a device, as a model would run it: the threads awake, the base weight in memory and not in a cache, because
//! the layers before it have been there.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flora_ir::Activation;
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::cost::PricedLayer;
use flora_plan::layer::{Element, Epilogue, LayerShape};
use flora_plan::lowering::Part;
use flora_plan::schedule::{BackwardSchedule, Schedule, ScheduleError};
use flora_plan::weight::PackedWeight;

use flora_runtime::{BackendKind, Buffer, Device, DeviceError, LayerOperands, PoolBuffer, Wanted, WeightBuffer};

/// Copies of a weight, and of a pool, are taken in turn until they are this large together: three times the third-level cache of most
/// processors' slices, and more than the second-level cache of a GPU.
const ROTATED_BYTES: u64 = 96 << 20;
/// No more copies than this, however small the layer: a layer so small is in a cache in a model, too.
const MOST_COPIES: u64 = 64;
/// No more copies of a pool than calls follow one another in a repetition on the host: before the next one, others have run.
const MOST_POOLS: u64 = 17;
/// A repetition on a device that queues needs no more calls than take this long.
const REPETITION_SECONDS: f64 = 0.02;
/// Calls in a repetition on a device that queues.
const MOST_CALLS: usize = 20;
/// A repetition on the host needs no more calls than take this long; they are timed one by one, and their lower
/// quartile counts.
const HOST_REPETITION_SECONDS: f64 = 3e-3;
/// Calls in a repetition on the host.
const MOST_HOST_CALLS: usize = 7;
/// A call on the host that takes this long needs none before it: to wake the threads is nothing beside it.
const LONG_CALL_SECONDS: f64 = 8e-3;
/// A call whose threads waited for a processor for more than this share of it was disturbed.
const WAITED: f64 = 0.02;
/// How long threads of the host are left alone before the call that wakes them. Without that, short calls that follow one another were
/// seen to take up to twice their time for long stretches, as if two threads shared a processor.
const REST: Duration = Duration::from_micros(300);

/// A layer of random numbers, ready to be timed.
#[derive(Debug)]
pub struct LayerBench<'a> {
    device: &'a Device,
    layer: PricedLayer,
    weights: Vec<WeightBuffer>,
    copies: Vec<LayerOperands>,
    next: AtomicUsize,
    /// By their rows and width.
    inputs: Arc<Mutex<BTreeMap<(u32, u32), Buffer>>>,
    /// Seconds from the last launch of a repetition until the device says that it is done.
    wait: f64,
}

impl<'a> LayerBench<'a> {
    /// A layer with a bias, and with pools of `slots` vectors.
    ///
    /// # Errors
    /// The device can't hold it, or hasn't got its types.
    pub fn new(device: &'a Device, layer: PricedLayer, slots: u32) -> Result<Self, DeviceError> {
        let PricedLayer { shape, format } = layer;
        let values = numbers(shape.d as usize * shape.k as usize, (3.0 / shape.d.max(1) as f32).sqrt());
        let weight = PackedWeight::from_f32(format.weight, shape, &values)
            .map_err(|error| DeviceError::Execution(error.to_string()))?;
        let weights = (0..copies(format.weight.bytes(shape), MOST_COPIES)).map(|_| device.upload_weight(&weight));
        let weights = weights.collect::<Result<Vec<_>, _>>()?;
        Self {
            device,
            layer,
            weights,
            copies: Vec::new(),
            next: AtomicUsize::new(0),
            inputs: Arc::default(),
            wait: 0.0,
        }
        .with_slots(slots)
    }

    /// The same layer, sharing its weights and inputs, with pools of `slots` vectors. As few as a batch needs: the vectors of a
    /// batch should come from memory too, and pools take turns only as far as they are small.
    ///
    /// # Errors
    /// The device can't hold them.
    pub fn with_slots(&self, slots: u32) -> Result<Self, DeviceError> {
        let PricedLayer { shape, format } = self.layer;
        let slots = slots.max(1);
        let bias = self.device.upload(&numbers(shape.k as usize, 1.0))?;
        let pool = |width: u32| -> Result<_, DeviceError> {
            let values = numbers(slots as usize * width as usize, 1.0);
            Ok(PoolBuffer::new(self.device.upload_as(&values, format.adapters)?, slots))
        };
        let bytes = u64::from(slots) * (u64::from(shape.d) + u64::from(shape.k)) * format.adapters.bytes();
        let pools = (0..copies(bytes, MOST_POOLS)).map(|_| Ok((pool(shape.d)?, pool(shape.k)?)));
        let pools = pools.collect::<Result<Vec<_>, DeviceError>>()?;
        let epilogue = Epilogue { bias: true, activation: Activation::Identity, residual: false };
        let copy = |at: usize| {
            let weight = self.weights[at % self.weights.len()].clone();
            Ok(LayerOperands::new(format, weight, Some(bias.clone()), pools[at % pools.len()].clone(), epilogue)?)
        };
        let copies = (0..self.weights.len().max(pools.len())).map(copy).collect::<Result<Vec<_>, DeviceError>>()?;
        Ok(Self {
            device: self.device,
            layer: self.layer,
            weights: self.weights.clone(),
            copies,
            next: AtomicUsize::new(0),
            inputs: self.inputs.clone(),
            wait: self.wait,
        })
    }

    /// What it is timed on.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The layer.
    pub fn layer(&self) -> PricedLayer {
        self.layer
    }

    /// The same, with what a repetition spends on waiting for the device left out of what is measured.
    #[must_use]
    pub fn without_wait(self, seconds: f64) -> Self {
        Self { wait: seconds, ..self }
    }

    fn input(&self, tokens: u32, width: u32) -> Result<Buffer, DeviceError> {
        let mut inputs = self.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(x) = inputs.get(&(tokens, width)) {
            return Ok(x.clone());
        }
        let values = numbers(tokens as usize * width as usize, 3f32.sqrt());
        let x = self.device.upload_as(&values, self.layer.format.activations)?;
        inputs.insert((tokens, width), x.clone());
        Ok(x)
    }

    /// The operands whose turn it is.
    fn operands(&self) -> &LayerOperands {
        &self.copies[self.next.fetch_add(1, Ordering::Relaxed) % self.copies.len()]
    }

    /// Seconds of a call: one repetition, after an untimed call that wakes the threads; by the device's own clock where it has one.
    ///
    /// # Errors
    /// The device fails.
    pub fn seconds(&self, schedule: &Schedule) -> Result<f64, DeviceError> {
        self.seconds_on(self.device, schedule)
    }

    /// The same on the device as it is tuned otherwise ([`Device::tuned`]).
    ///
    /// # Errors
    /// The device fails, or is another.
    pub fn seconds_on(&self, device: &Device, schedule: &Schedule) -> Result<f64, DeviceError> {
        let x = self.input(schedule.tokens(), self.layer.shape.d)?;
        self.timed(device, || device.execute(self.operands(), schedule, &x, None).map(drop))
    }

    /// Seconds of a call, the lesser of two behind one that wakes the threads: what can be had in a few milliseconds. On the host.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn glance(&self, schedule: &Schedule) -> Result<f64, DeviceError> {
        std::thread::sleep(REST);
        let seconds = [self.once(schedule)?, self.once(schedule)?, self.once(schedule)?];
        Ok(seconds[1].min(seconds[2]))
    }

    /// Seconds of a single call, with what it takes to wake the threads or to wait for the device.
    ///
    /// # Errors
    /// The device fails.
    pub(crate) fn once(&self, schedule: &Schedule) -> Result<f64, DeviceError> {
        let x = self.input(schedule.tokens(), self.layer.shape.d)?;
        let start = Instant::now();
        self.device.execute(self.operands(), schedule, &x, None)?;
        self.device.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds of the gradients of the vectors of a batch's adapters, likewise.
    ///
    /// # Errors
    /// The device fails, or computes no gradients.
    pub fn gradient_seconds(&self, schedule: &BackwardSchedule) -> Result<f64, DeviceError> {
        let (tokens, LayerShape { d, k }) = (schedule.tokens(), self.layer.shape);
        let (x, g) = (self.input(tokens, d)?, self.input(tokens, k)?);
        self.timed(self.device, || {
            self.device.backward(self.operands(), schedule, (&x, &g), Wanted::Adapters).map(drop)
        })
    }

    fn timed(&self, device: &Device, call: impl Fn() -> Result<(), DeviceError> + Sync) -> Result<f64, DeviceError> {
        let start = Instant::now();
        call()?;
        device.synchronize()?;
        let first = start.elapsed().as_secs_f64();
        if device.info().backend == BackendKind::Host {
            return on_host(first, call);
        }
        let calls = ((REPETITION_SECONDS / first) as usize).clamp(1, MOST_CALLS);
        let mut queue = || -> Result<(), DeviceError> {
            for _ in 0..calls {
                call()?;
            }
            Ok(())
        };
        if let Some(seconds) = device.device_seconds(&mut queue) {
            return Ok(seconds? / calls as f64);
        }
        let start = Instant::now();
        queue()?;
        device.synchronize()?;
        let elapsed = start.elapsed().as_secs_f64();
        Ok((elapsed - self.wait).max(0.1 * elapsed) / calls as f64)
    }
}

/// Seconds of a call on the host, of which one took `first`: each call that is timed follows one that wakes the threads.
fn on_host(first: f64, call: impl Fn() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    if first >= LONG_CALL_SECONDS {
        return Ok(first);
    }
    let calls = ((HOST_REPETITION_SECONDS / first) as usize).clamp(1, MOST_HOST_CALLS);
    let (mut undisturbed, mut all) = (Sample::default(), Sample::default());
    for _ in 0..=calls {
        std::thread::sleep(REST);
        call()?;
        let (waited, start) = (waited(), Instant::now());
        call()?;
        let seconds = start.elapsed().as_secs_f64();
        all.push(seconds);
        if self::waited() - waited <= WAITED * seconds {
            undisturbed.push(seconds);
        }
        // One more than there should be, where one was disturbed.
        if undisturbed.len() == calls {
            break;
        }
    }
    Ok(if undisturbed.is_empty() { all } else { undisturbed }.lower_quartile())
}

/// Seconds that the process' threads have waited for a processor that others ran on; 0 where the system doesn't say.
fn waited() -> f64 {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return 0.0 };
    let nanoseconds = threads.flatten().filter_map(|thread| {
        // Time on a processor, time of waiting for one, and how often.
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse::<f64>().ok()
    });
    1e-9 * nanoseconds.sum::<f64>()
}

/// How many operands of so many bytes take turns, `most` at most.
fn copies(bytes: u64, most: u64) -> usize {
    ROTATED_BYTES.div_ceil(bytes.max(1)).clamp(1, most) as usize
}

/// A failure to lay out a batch, as one of the device.
pub(crate) fn unscheduled(error: ScheduleError) -> DeviceError {
    DeviceError::Execution(error.to_string())
}

/// Several measurements of the same thing, in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    seconds: Vec<f64>,
}

impl Sample {
    /// Adds one.
    pub fn push(&mut self, seconds: f64) {
        self.seconds.push(seconds);
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The median; NaN without any.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[count / 2],
            count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
        }
    }

    /// The lower quartile, the least of up to four; NaN without any. What it takes where nothing else uses the machine, as far as
    /// three quarters of the measurements may have been disturbed: that only ever adds.
    pub fn lower_quartile(&self) -> f64 {
        self.sorted().get(self.seconds.len().saturating_sub(1) / 4).copied().unwrap_or(f64::NAN)
    }

    /// (largest − smallest) / median; 0 without any.
    pub fn spread(&self) -> f64 {
        let sorted = self.sorted();
        match (sorted.first(), sorted.last()) {
            (Some(least), Some(most)) => ((most - least) / self.median().abs().max(f64::MIN_POSITIVE)).min(1e6),
            _ => 0.0,
        }
    }

    /// How far they lie from the median on average; NaN without any.
    pub fn deviation(&self) -> f64 {
        let median = self.median();
        self.seconds.iter().map(|own| (own - median).abs()).sum::<f64>() / self.seconds.len() as f64
    }

    /// Every other one, and the others.
    pub fn halves(&self) -> [Self; 2] {
        [0, 1].map(|first| Self { seconds: self.seconds.iter().skip(first).step_by(2).copied().collect() })
    }

    /// In the order in which they were taken.
    pub fn iter(&self) -> impl Iterator<Item = f64> {
        self.seconds.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.seconds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }
}

/// Segments of equal length, each with an adapter of its own and vectors that no other has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EqualSegments {
    /// What the adapters have: virtual rows with scales, or a low-rank sum.
    pub part: Part,
    /// Distinct adapters.
    pub adapters: u32,
    /// Rows of each.
    pub rows: u32,
    /// Virtual rows, or the rank.
    pub rank: u32,
}

impl EqualSegments {
    /// Segments, the table of adapters, and the vectors that the pools need.
    pub fn batch(self) -> (Vec<Segment>, Vec<AdapterSlots>) {
        let Self { part, adapters, rows, rank } = self;
        let slots = |position: u32| {
            let first = position * rank;
            match part {
                Part::Multiplicative => AdapterSlots {
                    virtual_rows: (first..first + rank)
                        .map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) })
                        .collect(),
                    ..AdapterSlots::base()
                },
                Part::Additive => AdapterSlots {
                    low_rank: LowRankSlots { shrink: first, expand: first, rank },
                    ..AdapterSlots::base()
                },
            }
        };
        let segments = (0..adapters).map(|adapter| Segment { rows, adapter }).collect();
        (segments, (0..adapters).map(slots).collect())
    }

    /// Vectors in either pool.
    pub fn slots(self) -> u64 {
        u64::from(self.adapters) * u64::from(self.rank)
    }

    /// Rows of the batch.
    pub fn tokens(self) -> u64 {
        u64::from(self.adapters) * u64::from(self.rows)
    }
}

/// `count` numbers within ± `half_width`; they come again after a while. Their values don't matter to any kernel's time, as long
/// as they are no denormals.
fn numbers(count: usize, half_width: f32) -> Vec<f32> {
    const PERIOD: usize = 65_521;
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        half_width * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
    };
    let period: Vec<f32> = (0..count.min(PERIOD)).map(|_| Element::F16.round(next())).collect();
    period.iter().copied().cycle().take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_says_its_middle_and_its_width() {
        let mut sample = Sample::default();
        assert!(sample.is_empty() && sample.median().is_nan() && sample.spread() == 0.0);
        [3.0, 1.0, 2.0].into_iter().for_each(|seconds| sample.push(seconds));
        assert_eq!((sample.median(), sample.spread(), sample.len()), (2.0, 1.0, 3));
        sample.push(4.0);
        assert_eq!((sample.median(), sample.lower_quartile()), (2.5, 1.0));
        sample.push(5.0);
        assert_eq!(sample.lower_quartile(), 2.0);
        let [one, other] = sample.halves();
        assert_eq!((one.median(), other.median()), (3.0, 2.5));
    }
}
