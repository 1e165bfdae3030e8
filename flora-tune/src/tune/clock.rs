//! How fast the machine is from one moment to the next. A processor that others use as well changes its speed by tens of per cent, and
//! more where two of its threads share a core, for a part of a second or for minutes. So two small GEMMs are timed again and again between
//! the measurements, one that arithmetic bounds and one that memory bounds, and every time is told as what it would have been at the
//! usual speed: that of the middle reading of each.

use std::time::{Duration, Instant};

use flora_plan::cost::PricedLayer;
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::schedule::Schedule;

use super::taken::{Estimate, Taken};
use crate::measure::{LayerBench, Sample, unscheduled};
use flora_runtime::{BackendKind, Device, DeviceError};

/// d = k, and rows, of the GEMM that arithmetic bounds.
const ARITHMETIC: (u32, u32) = (768, 64);
/// The same of the one that memory bounds.
const MEMORY: (u32, u32) = (1536, 1);
/// A reading serves measurements for so long.
const FRESH: Duration = Duration::from_millis(40);

/// Two GEMMs that are timed again and again.
#[derive(Debug)]
pub(super) struct Clock<'a> {
    /// None on a device that nothing else uses.
    gemms: Vec<(LayerBench<'a>, Schedule)>,
    /// Logarithms of their seconds.
    readings: Vec<[f64; 2]>,
    read: Instant,
}

/// When something was measured: how many readings were before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment(usize);

/// Logarithms of what arithmetic and memory took at a moment, as multiples of what they usually take.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Slowness([f64; 2]);

/// How a kernel's time follows the machine's: as the time of arithmetic does, to this share of its logarithm, for the rest as that of
/// memory. What slows down both slows down every kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Response(f64);

impl Response {
    /// In tenths.
    fn all() -> impl Iterator<Item = Self> {
        (0..=10).map(|tenths| Self(f64::from(tenths) / 10.0))
    }
}

impl<'a> Clock<'a> {
    /// The clock of `device`: on the host, because nothing else runs on another device while flora does.
    ///
    /// # Errors
    /// The device can't hold its weights.
    pub(super) fn new(device: &'a Device) -> Result<Self, DeviceError> {
        let gemm = |(side, rows)| -> Result<_, DeviceError> {
            let layer = PricedLayer { shape: LayerShape { d: side, k: side }, format: LayerFormat::default() };
            let schedule = Schedule::base_gemm(layer.shape, rows).map_err(unscheduled)?;
            Ok((LayerBench::new(device, layer, 1)?, schedule))
        };
        let gemms = if Self::is_needed(device) { vec![gemm(ARITHMETIC)?, gemm(MEMORY)?] } else { Vec::new() };
        Ok(Self { gemms, readings: Vec::new(), read: Instant::now() })
    }

    /// Reads the clock, unless it was read just before.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn now(&mut self) -> Result<Moment, DeviceError> {
        if self.readings.is_empty() || self.read.elapsed() > FRESH {
            self.read()?;
        }
        Ok(Moment(self.readings.len()))
    }

    /// Reads the clock: behind the last measurement, too.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn read(&mut self) -> Result<(), DeviceError> {
        if let [(arithmetic, rows), (memory, row)] = &self.gemms[..] {
            self.readings.push([arithmetic.glance(rows)?, memory.glance(row)?].map(f64::ln));
        }
        self.read = Instant::now();
        Ok(())
    }

    /// What counts of measurements: where the clock says how much of them is the machine's, nothing else is left to add to them.
    pub(super) fn estimate(&self) -> Estimate {
        if self.gemms.is_empty() { Estimate::LowerQuartile } else { Estimate::Median }
    }

    fn is_needed(device: &Device) -> bool {
        device.info().backend == BackendKind::Host
    }

    /// What the readings say, once all are there.
    pub(super) fn times(&self) -> Times {
        Times { readings: self.readings.clone(), usual: middle(&self.readings) }
    }
}

/// The middle of the readings of either.
fn middle(readings: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|which| {
        let mut sample = Sample::default();
        readings.iter().for_each(|reading| sample.push(reading[which]));
        sample.median()
    })
}

/// All readings, by which measurements are told at the usual speed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Times {
    readings: Vec<[f64; 2]>,
    usual: [f64; 2],
}

impl Times {
    /// By the readings on both sides: those further away are of another speed.
    fn at(&self, Moment(before): Moment) -> Slowness {
        let beside = self.readings.get(before.saturating_sub(1)..(before + 1).min(self.readings.len()));
        let own = beside.filter(|beside| !beside.is_empty()).map(middle);
        own.map_or_else(Slowness::default, |own| Slowness([0, 1].map(|which| own[which] - self.usual[which])))
    }

    /// The response that makes repeated measurements of the same things agree best.
    pub(super) fn response<'a>(&self, points: impl Iterator<Item = &'a Taken>) -> Response {
        let of_point = |taken: &Taken| -> Vec<(f64, Slowness)> {
            taken.wholes().map(|(seconds, moment)| (seconds.ln(), self.at(moment))).collect()
        };
        let points: Vec<_> = points.map(of_point).filter(|own| own.len() > 2).collect();
        let apart = |response: &Response| -> f64 {
            let of_point = |own: &Vec<(f64, Slowness)>| {
                let mut sample = Sample::default();
                own.iter().for_each(|(whole, slowness)| sample.push(whole - slowness.by(*response)));
                sample.deviation() * own.len() as f64
            };
            points.iter().map(of_point).sum()
        };
        let responses = Response::all().map(|response| (apart(&response), response));
        let best = responses.min_by(|one, other| one.0.total_cmp(&other.0));
        best.filter(|_| !points.is_empty()).map_or_else(Response::default, |(_, response)| response)
    }

    /// What was taken, as it would have been at the usual speed.
    pub(super) fn told(&self, taken: &Taken, response: Response) -> Taken {
        taken.retold(|moment| (-self.at(moment).by(response)).exp())
    }
}

impl Slowness {
    fn by(self, Response(arithmetic): Response) -> f64 {
        arithmetic * self.0[0] + (1.0 - arithmetic) * self.0[1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine that goes back and forth between two speeds of arithmetic, and slows down altogether now and then.
    fn times(random: &mut fastrand::Rng) -> Times {
        let readings = (0..400).map(|at| {
            let arithmetic = if at / 17 % 3 == 0 { 0.0 } else { 0.6 };
            let both = if at / 23 % 5 == 0 { 0.7 } else { 0.0 };
            [arithmetic + both, both].map(|own| own + 0.01 * random.f64())
        });
        Times { readings: readings.collect(), usual: [0.6, 0.0] }
    }

    #[test]
    fn a_kernel_is_told_at_the_usual_speed() {
        let mut random = fastrand::Rng::with_seed(3);
        let times = times(&mut random);
        for response in [1.0, 0.0, 0.4].map(Response) {
            let points: Vec<Taken> = (0..20)
                .map(|point| {
                    let mut taken = Taken::new(Estimate::Median);
                    for pass in 0..6 {
                        let moment = Moment(1 + point + 60 * pass);
                        let seconds = 2.0 * times.at(moment).by(response).exp() * (1.0 + 0.01 * random.f64());
                        taken.push(seconds / 2.0, seconds, moment);
                    }
                    taken
                })
                .collect();
            let found = times.response(points.iter());
            assert!((found.0 - response.0).abs() < 0.11, "{found:?} in place of {response:?}");
            for taken in &points {
                let told = times.told(taken, found);
                assert!((told.seconds() - 1.0).abs() < 0.08 && told.whole_seconds() / told.seconds() > 1.9);
            }
        }
    }

    #[test]
    fn without_readings_nothing_changes() {
        let times = Times { readings: Vec::new(), usual: [f64::NAN; 2] };
        let mut taken = Taken::new(Estimate::LowerQuartile);
        [3.0, 1.0, 2.0].into_iter().for_each(|seconds| taken.push(seconds, seconds, Moment(0)));
        let response = times.response([&taken].into_iter());
        assert_eq!(times.told(&taken, response).seconds(), taken.seconds());
        assert_eq!(times.response([].into_iter()), Response::default());
    }
}
