//! What is timed: one schedule with its operands on a device.

use std::sync::Arc;
use std::time::Instant;

use flora::prelude::*;
use flora_plan::layer::Epilogue;
use flora_plan::schedule::Schedule;
use flora_runtime::{Buffer, DeviceError, LayerOperands, PoolBuffer};

use crate::commands::error::CommandError;

/// A batch that is ready to run.
#[derive(Clone, Debug)]
pub(super) struct Timed {
    pub(super) operands: Arc<LayerOperands>,
    pub(super) schedule: Schedule,
    pub(super) x: Buffer,
}

/// A repetition needs no more calls than take this long: their own time is then far above the wait for the device's end.
const REPETITION_SECONDS: f64 = 0.02;

/// Untimed calls before a timed repetition take this long at least: a processor that was idle, or at another program's work, takes
/// milliseconds to be as fast as in a loop over the same layer.
const WARM_UP_SECONDS: f64 = 0.02;

/// A device and how it is timed.
#[derive(Clone, Copy)]
pub(super) struct Clock<'a> {
    pub(super) device: &'a Device,
    /// The least and most calls in a timed repetition: as many as take [`REPETITION_SECONDS`].
    pub(super) calls: [usize; 2],
}

impl Clock<'_> {
    /// One timed repetition, after untimed calls that wake the threads and fill the caches: seconds of a call.
    pub(super) fn seconds(self, timed: &Timed) -> Result<f64, DeviceError> {
        self.seconds_of(|| self.device.execute(&timed.operands, &timed.schedule, &timed.x, None))
    }

    /// The same of any call that queues work on the device.
    pub(super) fn seconds_of<E: From<DeviceError>>(self, call: impl Fn() -> Result<Buffer, E>) -> Result<f64, E> {
        let warm_up = Instant::now();
        let own = loop {
            let start = Instant::now();
            drop(call()?);
            self.device.synchronize()?;
            if warm_up.elapsed().as_secs_f64() >= WARM_UP_SECONDS {
                break start.elapsed().as_secs_f64();
            }
        };
        let [least, most] = self.calls;
        let calls = ((REPETITION_SECONDS / own) as usize).clamp(least, most);
        let start = Instant::now();
        let mut last = call()?;
        for _ in 1..calls {
            last = call()?;
        }
        self.device.synchronize()?;
        let elapsed = start.elapsed().as_secs_f64();
        drop(last);
        Ok(elapsed / calls as f64)
    }

    /// The best of a few repetitions.
    pub(super) fn best(self, timed: &Timed) -> Result<f64, DeviceError> {
        (0..3).try_fold(f64::INFINITY, |best, _| Ok(best.min(self.seconds(timed)?)))
    }
}

/// Operands of random numbers for a layer without an epilogue, with pools of `slots` vectors.
pub(super) fn random_operands(
    device: &Device,
    shape: LayerShape,
    format: LayerFormat,
    slots: u32,
) -> Result<LayerOperands, CommandError> {
    let LayerShape { d, k } = shape;
    let slots = slots.max(1);
    let pool = |width: u32, seed: u64| -> Result<PoolBuffer, DeviceError> {
        let values = random(slots as usize * width as usize, 1.0, seed);
        Ok(PoolBuffer::new(device.upload_as(&values, format.adapters)?, slots))
    };
    // A product of d such weights with inputs of variance 1 has variance 1.
    let values = random(d as usize * k as usize, (3.0 / d as f32).sqrt(), 1);
    let weight = PackedWeight::from_f32(format.weight, shape, &values)?;
    let (weight, pools) = (device.upload_weight(&weight)?, (pool(d, 2)?, pool(k, 3)?));
    Ok(LayerOperands::new(format, weight, None, pools, Epilogue::default()).map_err(DeviceError::from)?)
}

/// `count` numbers, uniform in 0 ± `half_width`. They come again after a while: their values don't matter to any kernel's time,
/// as long as they are no denormals.
pub(super) fn random(count: usize, half_width: f32, seed: u64) -> Vec<f32> {
    const PERIOD: usize = 65_521;
    let mut random = fastrand::Rng::with_seed(seed);
    let period: Vec<_> = (0..count.min(PERIOD)).map(|_| half_width * (2.0 * random.f32() - 1.0)).collect();
    period.iter().copied().cycle().take(count).collect()
}

/// Inputs `[tokens, d]`.
pub(super) fn random_input(
    device: &Device,
    shape: LayerShape,
    format: LayerFormat,
    tokens: u32,
) -> Result<Buffer, DeviceError> {
    let values = random(tokens as usize * shape.d as usize, 3f32.sqrt(), 4);
    device.upload_as(&values, format.activations)
}
