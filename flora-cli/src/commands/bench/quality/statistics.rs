//! Whether two adapters are of equal quality, or one is the better: a bootstrap over files. Files are drawn, and not tokens, because
//! those of one file have much in common. A file has one difference of the two adapters, so that what makes a file hard for both
//! isn't in it.

use serde::Serialize;

/// The part of all draws that an interval holds.
const CONFIDENCE: f64 = 0.95;
const DRAWS: usize = 10_000;
/// An interval over fewer files says nothing.
pub(super) const LEAST_FILES: usize = 8;

/// What one file adds to a ratio: bits saved for so many bytes, lines won of so many.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) part: f64,
    pub(super) of: f64,
}

/// A ratio of sums over files, and where it lies for 95 % of the sets of files that might have been there instead.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Interval {
    pub(super) estimate: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Interval {
    /// By the percentiles of the bootstrap: as many files are drawn as there are, with replacement. NaN where nothing is counted.
    pub(super) fn of(shares: &[Share], seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut drawn: Vec<f64> = (0..DRAWS)
            .map(|_| ratio((0..shares.len()).filter_map(|_| shares.get(random.usize(0..shares.len())))))
            .collect();
        drawn.sort_by(f64::total_cmp);
        let tail = (1.0 - CONFIDENCE) / 2.0;
        let at = |part: f64| drawn[((DRAWS - 1) as f64 * part).round() as usize];
        Self { estimate: ratio(shares.iter()), low: at(tail), high: at(1.0 - tail) }
    }
}

fn ratio<'a>(shares: impl Iterator<Item = &'a Share>) -> f64 {
    let (part, of) = shares.fold((0.0, 0.0), |(part, of), share| (part + share.part, of + share.of));
    part / of
}

/// What an interval of a difference says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Order {
    /// All of it is above zero.
    Better,
    /// All of it is below zero.
    Worse,
    /// Zero is in it, and that shows nothing.
    Open,
}

/// What is said of two adapters: how much more the one gains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Verdict {
    /// Of the one's gain less the other's.
    pub(super) difference: Interval,
    /// The same over the other's gain.
    pub(super) relative: Interval,
    pub(super) order: Order,
    /// Whether the interval lies within the margin: shown to be equal, and not only not shown to differ.
    pub(super) equal: bool,
}

/// How far gains that count as equal may be apart, over that of the adapter that is compared with.
pub(super) const MARGIN: f64 = 0.2;

impl Verdict {
    /// Of the difference by file, where the adapter that is compared with gains `gain`. Where it gains nothing, nothing equals it.
    pub(super) fn of(differences: &[Share], gain: f64, seed: u64) -> Self {
        let difference = Interval::of(differences, seed);
        let Interval { estimate, low, high } = difference;
        let relative = Interval { estimate: estimate / gain, low: low / gain, high: high / gain };
        let order = match () {
            () if low > 0.0 => Order::Better,
            () if high < 0.0 => Order::Worse,
            () => Order::Open,
        };
        let margin = MARGIN * gain;
        Self { difference, relative, order, equal: gain > 0.0 && low >= -margin && high <= margin }
    }

    /// In words.
    pub(super) fn words(&self) -> &'static str {
        match (self.order, self.equal) {
            (Order::Better, false) => "better",
            (Order::Better, true) => "better, yet equal",
            (Order::Worse, false) => "worse",
            (Order::Worse, true) => "worse, yet equal",
            (Order::Open, true) => "equal",
            (Order::Open, false) => "open",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sum of twelve uniform numbers: nearly normal, of deviation 1.
    fn normal(random: &mut fastrand::Rng) -> f64 {
        (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
    }

    fn shares(count: usize, random: &mut fastrand::Rng, value: impl Fn(f64) -> f64) -> Vec<Share> {
        (0..count).map(|_| Share { part: value(normal(random)), of: 1.0 }).collect()
    }

    #[test]
    fn the_interval_of_a_mean_is_the_normal_one() {
        let mut random = fastrand::Rng::with_seed(1);
        let sample = shares(400, &mut random, |z| 3.0 + 2.0 * z);
        let mean = sample.iter().map(|share| share.part).sum::<f64>() / 400.0;
        let variance = sample.iter().map(|share| (share.part - mean).powi(2)).sum::<f64>() / 400.0;
        let half = 1.96 * (variance / 400.0).sqrt();
        let found = Interval::of(&sample, 2);
        assert!((found.estimate - mean).abs() < 1e-12);
        // A percentile of 10,000 draws has a deviation of some 3 % of half the interval.
        assert!(((found.high - mean) / half - 1.0).abs() < 0.12, "{found:?} {half}");
        assert!(((mean - found.low) / half - 1.0).abs() < 0.12, "{found:?} {half}");
    }

    #[test]
    fn nineteen_of_twenty_intervals_hold_the_truth() {
        let mut random = fastrand::Rng::with_seed(3);
        let holds = (0..200).filter(|round| {
            let found = Interval::of(&shares(60, &mut random, |z| 1.0 + z), *round);
            found.low <= 1.0 && 1.0 <= found.high
        });
        // 190 are expected, of deviation 3; percentiles of 60 draws are a little narrow.
        let held = holds.count();
        assert!((178..=199).contains(&held), "{held} of 200");
    }

    #[test]
    fn files_count_by_their_size() {
        let sample = [Share { part: 10.0, of: 100.0 }, Share { part: 3.0, of: 1.0 }];
        assert!((Interval::of(&sample, 1).estimate - 13.0 / 101.0).abs() < 1e-12);
    }

    #[test]
    fn equal_gains_are_equal_only_where_the_interval_is_narrow() {
        let mut random = fastrand::Rng::with_seed(5);
        let narrow = Verdict::of(&shares(200, &mut random, |z| 0.1 * z), 1.0, 1);
        assert_eq!((narrow.order, narrow.equal, narrow.words()), (Order::Open, true, "equal"));
        let wide = Verdict::of(&shares(10, &mut random, |z| 2.0 * z), 1.0, 1);
        assert_eq!((wide.order, wide.equal, wide.words()), (Order::Open, false, "open"), "{wide:?}");
    }

    #[test]
    fn a_better_one_is_better_and_a_worse_one_worse() {
        let mut random = fastrand::Rng::with_seed(6);
        let better = Verdict::of(&shares(100, &mut random, |z| 0.5 + 0.3 * z), 1.0, 1);
        assert_eq!((better.order, better.equal), (Order::Better, false), "{better:?}");
        let worse = Verdict::of(&shares(100, &mut random, |z| -0.5 + 0.3 * z), 1.0, 1);
        assert_eq!((worse.order, worse.equal), (Order::Worse, false), "{worse:?}");
        // So close that the difference, which is there, is within the margin.
        let close = Verdict::of(&shares(400, &mut random, |z| 0.05 + 0.1 * z), 1.0, 1);
        assert_eq!((close.order, close.equal), (Order::Better, true), "{close:?}");
        assert!((close.relative.estimate - close.difference.estimate).abs() < 1e-12);
    }

    #[test]
    fn nothing_equals_an_adapter_without_gain() {
        for gain in [0.0, -1.0, f64::NAN] {
            let verdict = Verdict::of(&[Share { part: 0.0, of: 1.0 }; 10], gain, 1);
            assert_eq!((verdict.order, verdict.equal), (Order::Open, false), "{gain}");
        }
    }

    #[test]
    fn what_makes_a_file_hard_for_both_is_not_in_the_difference() {
        let mut random = fastrand::Rng::with_seed(9);
        let hard: Vec<f64> = (0..50).map(|_| 10.0 * normal(&mut random)).collect();
        let gains = |gain: f64| hard.iter().map(move |hard| hard + gain).collect::<Vec<_>>();
        let paired: Vec<Share> =
            gains(1.1).iter().zip(gains(1.0)).map(|(one, other)| Share { part: one - other, of: 1.0 }).collect();
        let verdict = Verdict::of(&paired, 1.0, 1);
        assert!((verdict.difference.high - verdict.difference.low).abs() < 1e-9);
        assert_eq!(verdict.order, Order::Better);
    }
}
