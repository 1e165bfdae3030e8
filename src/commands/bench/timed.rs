//! What is timed: one schedule with its operands on a device.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use flora::codegen::layer::Epilogue;
use flora::codegen::schedule::Schedule;
use flora::prelude::*;
use flora::runtime::device::{BackendKind, LayerOperands, PoolBuffer};
use flora::runtime::{Buffer, DeviceError};

use crate::commands::error::CommandError;

/// Layers of one shape that calls go through in turn, as a model goes through its own: with enough of them, a call finds its
/// operands in memory and not in the caches that the call before filled. Clones share the turn.
#[derive(Clone, Debug)]
pub(super) struct Layers {
    /// At least one.
    operands: Arc<[LayerOperands]>,
    turn: Arc<AtomicUsize>,
}

impl Layers {
    /// The layer whose turn it is.
    fn next(&self) -> &LayerOperands {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        &self.operands[turn % self.operands.len()]
    }

    /// Layers made of these, one of each.
    pub(super) fn try_map<E>(&self, change: impl FnMut(&LayerOperands) -> Result<LayerOperands, E>) -> Result<Self, E> {
        let operands = self.operands.iter().map(change).collect::<Result<_, E>>()?;
        Ok(Self { operands, turn: Arc::default() })
    }
}

/// Where a call finds its base weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Residence {
    /// Wherever the call before left it: one layer.
    Warm,
    /// In memory: as many layers as exceed [`COLD_BYTES`].
    Cold,
}

/// More than the last-level caches of most devices.
const COLD_BYTES: u64 = 128 << 20;
/// The most memory of the layers that a call goes through; reached where adapters are much larger than the base weight.
const MOST_BYTES: u64 = 1 << 30;

impl Residence {
    /// How many layers, of so many bytes of base weight and so many in all.
    fn layers(self, weight: u64, all: u64) -> usize {
        match self {
            Self::Warm => 1,
            Self::Cold => COLD_BYTES.div_ceil(weight.max(1)).min(MOST_BYTES / all.max(1)).max(1) as usize,
        }
    }
}

/// A batch that is ready to run.
#[derive(Clone, Debug)]
pub(super) struct Timed {
    pub(super) layers: Layers,
    pub(super) schedule: Schedule,
    pub(super) x: Buffer,
}

/// A repetition needs no more calls than take this long: their own time is then far above the wait for the device's end.
const REPETITION_SECONDS: f64 = 0.02;

/// A device and how it is timed.
#[derive(Clone, Copy)]
pub(super) struct Clock<'a> {
    pub(super) device: &'a Device,
    /// The least and most calls in a timed repetition: as many as take [`REPETITION_SECONDS`].
    pub(super) calls: [usize; 2],
    /// An untimed call that takes this long is the repetition: waking threads is nothing beside it. Infinite where the first call
    /// also compiles.
    pub(super) long_call: f64,
}

impl<'a> Clock<'a> {
    /// So many calls a repetition; unless given 1 on the host, elsewhere as many as make a repetition, at most 20.
    pub(super) fn new(device: &'a Device, calls: Option<usize>) -> Self {
        let calls = match (calls, device.info().backend) {
            (Some(calls), _) => [calls; 2],
            (None, BackendKind::Host) => [1, 1],
            (None, _) => [1, 20],
        };
        Self { device, calls, long_call: f64::INFINITY }
    }

    /// One timed repetition, after an untimed call that wakes the threads and fills the caches: seconds of a call.
    pub(super) fn seconds(self, timed: &Timed) -> Result<f64, DeviceError> {
        let call = || self.device.execute(timed.layers.next(), &timed.schedule, &timed.x, None);
        let start = Instant::now();
        drop(call()?);
        self.device.synchronize()?;
        let first = start.elapsed().as_secs_f64();
        if first >= self.long_call {
            return Ok(first);
        }
        let [least, most] = self.calls;
        let calls = ((REPETITION_SECONDS / first) as usize).clamp(least, most);
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

/// Layers of random numbers without an epilogue, with pools of `slots` vectors; each has tensors of its own, of the same numbers.
pub(super) fn random_layers(
    device: &Device,
    shape: LayerShape,
    format: LayerFormat,
    slots: u32,
    residence: Residence,
) -> Result<Layers, CommandError> {
    let LayerShape { d, k } = shape;
    let slots = slots.max(1);
    let pool = |width: u32, seed: u64| random(slots as usize * width as usize, 1.0, seed);
    let (in_pool, out_pool) = (pool(d, 2), pool(k, 3));
    let pool = |values: &[f32]| -> Result<PoolBuffer, DeviceError> {
        Ok(PoolBuffer { buffer: device.upload_as(values, format.adapters)?, slots })
    };
    // A product of d such weights with inputs of variance 1 has variance 1.
    let values = random(d as usize * k as usize, (3.0 / d as f32).sqrt(), 1);
    let weight = PackedWeight::from_f32(format.weight, shape, &values)?;
    let weight_bytes = format.weight.bytes(shape);
    let pool_bytes = format.adapters.bytes() * u64::from(slots) * (u64::from(d) + u64::from(k));
    let operands = (0..residence.layers(weight_bytes, weight_bytes + pool_bytes)).map(|_| {
        Ok(LayerOperands {
            shape,
            format,
            base_weight: device.upload_weight(&weight)?,
            bias: None,
            in_pool: pool(&in_pool)?,
            out_pool: pool(&out_pool)?,
            epilogue: Epilogue::default(),
            merged: None,
        })
    });
    Ok(Layers { operands: operands.collect::<Result<_, DeviceError>>()?, turn: Arc::default() })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_layers_exceed_the_caches_within_the_memory() {
        let layers = |weight, all| Residence::Cold.layers(weight, all);
        assert_eq!((layers(16 << 20, 17 << 20), layers(144 << 20, 150 << 20)), (8, 1));
        assert_eq!(layers(1 << 17, 1 << 23), 128, "1 GiB of adapters");
        assert_eq!((layers(0, 0), layers(1, u64::MAX)), (COLD_BYTES as usize, 1));
        assert_eq!(Residence::Warm.layers(1 << 20, 1 << 20), 1);
    }
}
