//! What was taken of one point: its value, and how far another tuning's may lie from that.

use super::clock::Moment;
use crate::measure::Sample;

/// What counts of several measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Estimate {
    /// Of times as they were: what else uses the machine adds to them.
    LowerQuartile,
    /// Of differences of two times, which it changes either way, and of times that a clock has told at the usual speed.
    Median,
}

impl Estimate {
    fn of(self, sample: &Sample) -> f64 {
        match self {
            Estimate::LowerQuartile => sample.lower_quartile(),
            Estimate::Median => sample.median(),
        }
    }
}

/// Measurements of one point.
#[derive(Clone, Debug)]
pub(super) struct Taken {
    estimate: Estimate,
    /// Seconds of what the point is about.
    own: Sample,
    /// Seconds of all that was run for that.
    whole: Sample,
    /// When.
    moments: Vec<Moment>,
}

/// What takes longer than this is long.
const LONG_SECONDS: f64 = 0.02;
/// What is measured again, because the halves of its measurements differ by more of the whole.
const UNSTEADY: f64 = 0.05;

impl Taken {
    pub(super) fn new(estimate: Estimate) -> Self {
        Self { estimate, own: Sample::default(), whole: Sample::default(), moments: Vec::new() }
    }

    /// Adds a measurement: seconds of what it is about, and of all that was run.
    pub(super) fn push(&mut self, own: f64, whole: f64, moment: Moment) {
        self.own.push(own);
        self.whole.push(whole);
        self.moments.push(moment);
    }

    /// Seconds of all that was run, and when.
    pub(super) fn wholes(&self) -> impl Iterator<Item = (f64, Moment)> {
        self.whole.iter().zip(self.moments.iter().copied())
    }

    /// Every measurement times the factor of its moment.
    pub(super) fn retold(&self, factor: impl Fn(Moment) -> f64) -> Self {
        let mut retold = self.without_measurements();
        for ((own, whole), moment) in self.own.iter().zip(self.whole.iter()).zip(&self.moments) {
            let factor = factor(*moment);
            retold.push(factor * own, factor * whole, *moment);
        }
        retold
    }

    /// The same before anything was measured.
    pub(super) fn without_measurements(&self) -> Self {
        Self::new(self.estimate)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// Seconds.
    pub(super) fn seconds(&self) -> f64 {
        self.estimate.of(&self.own)
    }

    /// Seconds of all that was run.
    pub(super) fn whole_seconds(&self) -> f64 {
        self.estimate.of(&self.whole)
    }

    /// How far the halves of the measurements are apart, in seconds: two standard deviations of [`Self::seconds`], if a single pair
    /// of halves is to say it. 0 with fewer than two.
    pub(super) fn apart(&self) -> f64 {
        if self.own.len() < 2 {
            return 0.0;
        }
        let [one, other] = self.own.halves().map(|half| self.estimate.of(&half));
        (one - other).abs()
    }

    /// The same as a share of [`Self::seconds`].
    pub(super) fn spread(&self) -> f64 {
        (self.apart() / self.seconds().abs().max(f64::MIN_POSITIVE)).min(1e6)
    }

    /// The same as a share of all that was run.
    pub(super) fn share_apart(&self) -> f64 {
        self.apart() / self.whole_seconds().max(f64::MIN_POSITIVE)
    }

    /// Whether a measurement takes long.
    pub(super) fn is_long(&self) -> bool {
        !self.is_empty() && self.whole_seconds() > LONG_SECONDS
    }

    /// Whether it should be measured again.
    pub(super) fn is_unsteady(&self) -> bool {
        !self.is_empty() && self.share_apart() > UNSTEADY
    }

    /// One standard deviation of [`Self::seconds`], where the halves of points like this one differ by `typical` of the whole. The
    /// halves of a single point may agree by chance.
    pub(super) fn noise(&self, typical: f64) -> f64 {
        self.apart().max(typical * self.whole_seconds()) / 2.0
    }
}

/// What the halves of points of one kind differ by as a share of the whole: the median, seen as a standard deviation; 0 of none.
pub(super) fn typical<'a>(points: impl Iterator<Item = &'a Taken>) -> f64 {
    let mut shares = Sample::default();
    points.filter(|taken| !taken.is_empty()).for_each(|taken| shares.push(taken.share_apart()));
    // Half of all normal numbers are within 0.67 standard deviations.
    if shares.is_empty() { 0.0 } else { shares.median() / 0.67 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(estimate: Estimate, seconds: &[f64]) -> Taken {
        let mut taken = Taken::new(estimate);
        seconds.iter().for_each(|own| taken.push(*own, 10.0, Moment::default()));
        taken
    }

    #[test]
    fn a_disturbance_changes_no_time_but_says_that_it_was_there() {
        let calm = taken(Estimate::LowerQuartile, &[1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_eq!((calm.seconds(), calm.apart(), calm.is_unsteady()), (1.0, 0.0, false));
        assert_eq!(calm.noise(0.02), 0.1);
        let disturbed = taken(Estimate::LowerQuartile, &[1.0, 9.0, 1.0, 9.0, 1.0]);
        assert_eq!((disturbed.seconds(), disturbed.apart(), disturbed.is_unsteady()), (1.0, 8.0, true));
        assert_eq!((disturbed.noise(0.02), disturbed.share_apart()), (4.0, 0.8));
    }

    #[test]
    fn a_difference_may_be_negative() {
        let taken = taken(Estimate::Median, &[-1.0, 2.0, -3.0, 0.0, -2.0]);
        assert_eq!((taken.seconds(), taken.apart()), (-1.0, 3.0));
        assert_eq!(typical([&taken].into_iter()), 0.3 / 0.67);
        assert_eq!(typical([].into_iter()), 0.0);
    }
}
