//! Axes: what they span, and where their ticks are.

/// An axis, with its ticks.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::commands) struct Axis {
    label: String,
    spacing: Spacing,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

/// What equal distances are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spacing {
    /// Equal ratios: times, rates and ranks are compared by them.
    Logarithmic,
    /// Equal differences; a tick is a multiple of this.
    #[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "only training draws it"))]
    Linear(f64),
}

/// More ticks than these run into one another.
const MOST_TICKS: usize = 7;

impl Axis {
    /// Spans the positive ones of these values; ticks at decades, and between them where there is room.
    pub(in crate::commands) fn over(label: &str, values: impl Iterator<Item = f64>) -> Self {
        const ROOM: f64 = 1.2;
        let (low, high) = span(values);
        let (low, high) = (low / ROOM, high * ROOM);
        Self { label: label.to_owned(), spacing: Spacing::Logarithmic, low, high, ticks: ticks(low, high) }
    }

    /// Spans these values and has its ticks at them; where there is no room, at those that are the lowest times a power of two.
    pub(in crate::commands) fn at(label: &str, values: impl Iterator<Item = f64>) -> Self {
        const ROOM: f64 = 1.12;
        let mut ticks: Vec<_> = values.filter(|value| is_positive(*value)).collect();
        let (low, high) = span(ticks.iter().copied());
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        if ticks.len() > MOST_TICKS {
            ticks.retain(|tick| (tick / low).log2().fract() == 0.0);
        }
        while ticks.len() > MOST_TICKS {
            let mut place = 0;
            ticks.retain(|_| {
                place += 1;
                place % 2 == 1
            });
        }
        Self { label: label.to_owned(), spacing: Spacing::Logarithmic, low: low / ROOM, high: high * ROOM, ticks }
    }

    /// Spans the finite ones of these values by equal differences; ticks at round numbers.
    #[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "only training draws it"))]
    pub(in crate::commands) fn linear(label: &str, values: impl Iterator<Item = f64>) -> Self {
        const ROOM: f64 = 0.04;
        let ends = |(low, high): (f64, f64), value: f64| (low.min(value), high.max(value));
        let finite = values.filter(|value| value.is_finite()).map(|value| value.clamp(-1e300, 1e300));
        let (low, high) = match finite.fold((f64::INFINITY, f64::NEG_INFINITY), ends) {
            // Nothing, or too little to tell apart.
            (low, high) if low > high => (0.0, 1.0),
            (low, high) if high - low <= 1e-9 * high.abs().max(low.abs()) => {
                let around = if high == 0.0 { 1.0 } else { 0.1 * high.abs() };
                (low - around, high + around)
            }
            ends => ends,
        };
        let room = ROOM * (high - low);
        let (low, high) = (low - room, high + room);
        let step = round_step((high - low) / MOST_TICKS as f64);
        let first = (low / step).ceil();
        let ticks = (0..MOST_TICKS).map(|tick| (first + tick as f64) * step).filter(|tick| *tick <= high).collect();
        Self { label: label.to_owned(), spacing: Spacing::Linear(step), low, high, ticks }
    }

    pub(in crate::commands) fn label(&self) -> &str {
        &self.label
    }

    pub(in crate::commands) fn low(&self) -> f64 {
        self.low
    }

    pub(in crate::commands) fn high(&self) -> f64 {
        self.high
    }

    pub(in crate::commands) fn ticks(&self) -> Vec<f64> {
        self.ticks.clone()
    }

    /// What is written at a tick: without its unit, short.
    pub(in crate::commands) fn tick_label(&self, tick: f64) -> String {
        match self.spacing {
            // Digits up to the step's own.
            Spacing::Linear(step) if (1e-5..1.0).contains(&step) && tick.abs() < 1e4 => {
                let digits = -step.log10().floor();
                format!("{:.*}", digits as usize, tick + 0.0)
            }
            Spacing::Linear(step) if (1.0..1e15).contains(&step) && tick.abs() < 1e4 => format!("{:.0}", tick + 0.0),
            _ => short(tick),
        }
    }

    /// Whether a value is on the axis.
    pub(in crate::commands) fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// How far along the axis a value is, from 0 to 1; values beyond an end are at it.
    pub(in crate::commands) fn place(&self, value: f64) -> f64 {
        let place = match self.spacing {
            Spacing::Logarithmic => (value / self.low).ln() / (self.high / self.low).ln(),
            Spacing::Linear(_) => (value - self.low) / (self.high - self.low),
        };
        if place.is_nan() { 0.0 } else { place.clamp(0.0, 1.0) }
    }
}

/// The least of 1, 2 and 5 times powers of ten that isn't below `least`.
#[cfg_attr(not(feature = "serve"), allow(dead_code, reason = "only training draws it"))]
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|step| step * power).find(|step| *step >= least).unwrap_or(10.0 * power)
}

fn is_positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

/// The least and the greatest of the positive values; 1 to 10 of none.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let ends = |(low, high): (f64, f64), value: f64| (low.min(value), high.max(value));
    match values.filter(|value| is_positive(*value)).fold((f64::INFINITY, 0.0), ends) {
        (low, high) if low <= high => (low.max(1e-300), high.min(1e300)),
        _ => (1.0, 10.0),
    }
}

/// At 1, 2 and 5 times powers of ten, at powers alone, or at some of them.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = (low.log10().floor() as i32)..=(high.log10().ceil() as i32);
    let at = |steps: &[f64], every: i32| -> Vec<f64> {
        let decades = decades.clone().filter(|decade| decade.rem_euclid(every) == 0);
        let ticks = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
        ticks.filter(|tick| (low..=high).contains(tick)).collect()
    };
    const FINEST: [f64; 17] = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0, 9.5];
    let fine = [&FINEST[..], &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0], &[1.0, 2.0, 5.0], &[1.0, 3.0]];
    let candidates =
        fine.into_iter().map(|steps| at(steps, 1)).chain([1, 2, 3, 5, 10, 20, 50, 100].map(|every| at(&[1.0], every)));
    let mut best = Vec::new();
    for ticks in candidates {
        if ticks.len() <= MOST_TICKS {
            best = ticks;
            break;
        }
    }
    best
}

/// A number without its unit, short.
fn short(value: f64) -> String {
    let with = |scaled: f64, prefix: &str| {
        // Ticks have two digits at most.
        let rounded = (scaled * 100.0).round() / 100.0;
        format!("{rounded}{prefix}")
    };
    match value {
        v if !(1e-3..1e15).contains(&v) => format!("{v:.1e}").replace(".0e", "e"),
        v if v >= 1e12 => with(v / 1e12, "T"),
        v if v >= 1e9 => with(v / 1e9, "G"),
        v if v >= 1e6 => with(v / 1e6, "M"),
        v if v >= 1e4 => with(v / 1e3, "k"),
        v if v >= 0.1 => with(v, ""),
        v => format!("{v}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_axis_has_a_few_ticks() {
        for low in [1e-12, 0.3, 0.97, 1.0, 7.3, 99.0, 1e9] {
            for ratio in [1.0, 1.01, 1.3, 2.0, 9.0, 30.0, 1e3, 1e7, 1e20, 1e200] {
                let axis = Axis::over("x", [low, low * ratio].into_iter());
                let ticks = axis.ticks();
                assert!((2..=MOST_TICKS).contains(&ticks.len()), "{low} × {ratio}: {ticks:?}");
                assert!(ticks.iter().all(|tick| axis.holds(*tick)));
                let labels: std::collections::BTreeSet<_> = ticks.iter().map(|tick| axis.tick_label(*tick)).collect();
                assert_eq!(labels.len(), ticks.len(), "{labels:?}");
            }
        }
    }

    #[test]
    fn equal_differences_have_round_ticks() {
        let labels = |low: f64, high: f64| {
            let axis = Axis::linear("x", [low, high].into_iter());
            axis.ticks().into_iter().map(|tick| axis.tick_label(tick)).collect::<Vec<_>>()
        };
        assert_eq!(labels(0.0, 300.0), ["0", "50", "100", "150", "200", "250", "300"]);
        assert_eq!(labels(3.402, 3.629), ["3.40", "3.45", "3.50", "3.55", "3.60"]);
        assert_eq!(labels(0.0, 0.008), ["0.000", "0.002", "0.004", "0.006", "0.008"]);
        assert_eq!(labels(-2.0, 5.0), ["-2", "0", "2", "4"]);
        for low in [-1e300, -7.0, 0.0, 1e-12, 5e4] {
            for width in [0.0, 1e-3, 1.0, 12.0, 1e5, 1e300] {
                let axis = Axis::linear("x", [low, low + width].into_iter());
                let found = axis.ticks();
                assert!((2..=MOST_TICKS).contains(&found.len()), "{low} and {width} more: {found:?}");
                assert!(found.iter().all(|tick| axis.holds(*tick) && (0.0..=1.0).contains(&axis.place(*tick))));
            }
        }
        let nothing = Axis::linear("x", [f64::NAN, f64::INFINITY].into_iter());
        assert!(nothing.holds(0.0) && nothing.holds(1.0));
        assert_eq!(nothing.place(f64::NAN), 0.0);
    }

    #[test]
    fn what_is_no_length_is_on_no_axis() {
        let axis = Axis::over("x", [f64::NAN, f64::INFINITY, -1.0, 0.0].into_iter());
        assert!(axis.holds(1.0) && axis.holds(10.0));
        assert_eq!((axis.place(f64::NAN), axis.place(0.0), axis.place(f64::INFINITY)), (0.0, 0.0, 1.0));
        assert_eq!(Axis::over("x", std::iter::empty()), axis);
    }

    #[test]
    fn ticks_at_ranks_are_ranks() {
        let axis = Axis::at("rank", [1, 2, 3, 4, 6, 8, 12, 16].into_iter().map(f64::from));
        assert_eq!(axis.ticks(), [1.0, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!(Axis::at("rank", [6.0, 5.0, 6.0].into_iter()).ticks(), [5.0, 6.0]);
        assert_eq!(Axis::at("rank", (0..20).map(|power| 2f64.powi(power))).ticks().len(), 5);
        assert_eq!(["10k", "1.5M", "20", "0.2", "0.05"].map(str::to_owned), [1e4, 1.5e6, 20.0, 0.2, 0.05].map(short));
    }
}
