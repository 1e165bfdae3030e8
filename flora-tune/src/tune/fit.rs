//! From noisy points to a surface. A coefficient that is a small part of what is timed, as a low-rank sum of few ranks inside a large
//! GEMM, comes out as anything, also as less than nothing; its neighbours on the lattice know better. So a surface is what explains
//! all points, each as far as its noise lets it be believed, and changes little from a place to the next: exactly the points where
//! those are sure, what the nearest sure points say where they aren't, or where nothing was measured.
//!
//! In the logarithms u of the coefficients, with points m of noise s and neighbours p and q on an axis, it is the least of
//! Σ ((m − exp u) / s)² + Σ ((u_p − u_q) / τ)². The curvature there says how sure each coefficient is.

use faer::prelude::Solve;
use faer::{Mat, Side};
use flora_plan::cost::{Place, Surface};

/// What was measured of a coefficient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Observation {
    pub(super) place: Place,
    /// Seconds per MAC; a difference of two times may be negative.
    pub(super) value: f64,
    /// One standard deviation of `value`.
    pub(super) noise: f64,
}

/// By how much a coefficient's logarithm changes, for one of the axis' own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Slopes {
    rows: f64,
    ranks: f64,
    adapters: f64,
    extents: f64,
}

impl Slopes {
    /// Of kernels whose points are times. A large place that would take too long has what fewer adapters have, rather than what a smaller
    /// extent has, whose W_i may be in a cache.
    pub(super) const OF_TIMES: Self = Self { rows: 0.5, ranks: 0.5, adapters: 0.15, extents: 0.4 };
    /// Of kernels whose points are differences, which the smaller extents know best.
    pub(super) const OF_DIFFERENCES: Self = Self { rows: 0.5, ranks: 0.5, adapters: 0.1, extents: 0.1 };
}

/// No point is known better than this share of it.
const LEAST_NOISE: f64 = 0.01;
/// What the same work takes differs by such a share, at one standard deviation, between two tunings: no halves of one tuning show that.
/// Two full ones of a virtual machine with two processors differed by 6 % in the median.
const DRIFT: f64 = 0.05;
/// Nor better than this; far less than any device takes for a MAC.
const LEAST_SECONDS: f64 = 1e-18;
/// Newton's steps; a few suffice.
const STEPS: usize = 60;
/// The most that a logarithm changes in a step.
const LONGEST_STEP: f64 = 1.0;

/// Puts coefficients into a surface that has axes alone, how sure they are, and which places were measured. `noise` is a share of the
/// coefficient, at two standard deviations.
pub(super) fn fit(surface: &mut Surface, slopes: Slopes, observations: &[Observation]) {
    let places: Vec<Place> = surface.places().collect();
    let seen: Vec<Seen> = observations.iter().filter_map(|own| Seen::of(surface, own)).collect();
    let mut logarithms = vec![start(&seen); places.len()];
    let prior = prior(surface, slopes, &places);
    for _ in 0..STEPS {
        let (curvature, slope) = model(&prior, &seen, &logarithms);
        let Ok(factors) = curvature.llt(Side::Lower) else { break };
        let step = factors.solve(&slope);
        let mut longest = 0f64;
        for (at, own) in logarithms.iter_mut().enumerate() {
            let step = step[(at, 0)].clamp(-LONGEST_STEP, LONGEST_STEP);
            longest = longest.max(step.abs());
            *own -= step;
        }
        if longest < 1e-9 {
            break;
        }
    }
    let (curvature, _) = model(&prior, &seen, &logarithms);
    let variances =
        curvature.llt(Side::Lower).ok().map(|factors| factors.solve(Mat::<f64>::identity(places.len(), places.len())));
    surface.seconds_per_mac = logarithms.iter().map(|own| own.exp()).collect();
    let spread = |at: usize| {
        let variance = variances.as_ref().map_or(0.0, |all| all[(at, at)].max(0.0));
        2.0 * (variance + DRIFT * DRIFT).sqrt()
    };
    surface.spread = (0..places.len()).map(|at| spread(at).min(1e6)).collect();
    surface.measured = vec![false; places.len()];
    for own in &seen {
        surface.measured[own.at] = true;
    }
}

/// An observation at its position on the surface.
struct Seen {
    at: usize,
    value: f64,
    noise: f64,
}

impl Seen {
    /// `None` for what is no number.
    fn of(surface: &Surface, &Observation { place, value, noise }: &Observation) -> Option<Self> {
        let noise = noise.max(LEAST_NOISE * value.abs()).max(LEAST_SECONDS);
        (value.is_finite() && noise.is_finite()).then(|| Self { at: surface.index(place), value, noise })
    }
}

/// Where the search begins: the logarithm of the middle of what is more than its noise; NaN without any.
fn start(seen: &[Seen]) -> f64 {
    let of = |is: &dyn Fn(&Seen) -> bool| {
        let mut values: Vec<f64> =
            seen.iter().filter(|own| is(own)).map(|own| own.value.abs().max(own.noise)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    of(&|own| own.value > own.noise).or_else(|| of(&|_| true)).map_or(f64::NAN, f64::ln)
}

/// Pairs of neighbours, with 1 / τ².
fn prior(surface: &Surface, slopes: Slopes, places: &[Place]) -> Vec<(usize, usize, f64)> {
    let mut pairs = Vec::new();
    for place in places {
        let at = surface.index(*place);
        let next = [
            (&surface.rows, place.rows, Place { rows: place.rows + 1, ..*place }, slopes.rows),
            (&surface.ranks, place.rank, Place { rank: place.rank + 1, ..*place }, slopes.ranks),
            (&surface.adapters, place.adapters, Place { adapters: place.adapters + 1, ..*place }, slopes.adapters),
            (&surface.extents, place.extent, Place { extent: place.extent + 1, ..*place }, slopes.extents),
        ];
        for (axis, own, other, slope) in next {
            if let (Some(one), Some(two)) = (axis.get(own), axis.get(own + 1)) {
                let change = slope * (f64::from(*two) / f64::from(*one)).ln();
                pairs.push((at, surface.index(other), change.powi(-2)));
            }
        }
    }
    pairs
}

/// Half of the sum's second and first derivatives.
fn model(prior: &[(usize, usize, f64)], seen: &[Seen], logarithms: &[f64]) -> (Mat<f64>, Mat<f64>) {
    let count = logarithms.len();
    let (mut curvature, mut slope) = (Mat::zeros(count, count), Mat::zeros(count, 1));
    for (one, two, weight) in prior.iter().copied() {
        let difference = weight * (logarithms[one] - logarithms[two]);
        curvature[(one, one)] += weight;
        curvature[(two, two)] += weight;
        curvature[(one, two)] -= weight;
        curvature[(two, one)] -= weight;
        slope[(one, 0)] += difference;
        slope[(two, 0)] -= difference;
    }
    for own in seen {
        let value = logarithms[own.at].exp();
        curvature[(own.at, own.at)] += (value / own.noise).powi(2);
        slope[(own.at, 0)] += value * (value - own.value) / own.noise.powi(2);
    }
    (curvature, slope)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn axes() -> Surface {
        Surface {
            rows: vec![1, 4, 16, 64],
            ranks: vec![1, 4, 16],
            adapters: vec![1, 8],
            extents: vec![512, 2048],
            ..Surface::default()
        }
    }

    /// A coefficient that falls with rows and ranks as they do on processors.
    fn truth(surface: &Surface, place: Place, powers: [f64; 4]) -> f64 {
        let Place { extent, adapters, rank, rows } = place;
        let axes = [surface.rows[rows], surface.ranks[rank], surface.adapters[adapters], surface.extents[extent]];
        1e-11 * axes.iter().zip(powers).map(|(own, power)| f64::from(*own).powf(power)).product::<f64>()
    }

    /// A normal number, near enough.
    fn normal(random: &mut fastrand::Rng) -> f64 {
        (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

        /// Sure points are met.
        #[test]
        fn what_is_sure_is_kept(powers in proptest::array::uniform4(-0.5..0.3)) {
            let mut surface = axes();
            let of = |place| truth(&axes(), place, powers);
            let observations: Vec<_> =
                surface.places().map(|place| Observation { place, value: of(place), noise: 0.0 }).collect();
            fit(&mut surface, Slopes::OF_TIMES, &observations);
            for place in surface.places() {
                let at = surface.index(place);
                prop_assert!((surface.seconds_per_mac[at] / of(place) - 1.0).abs() < 0.02);
                prop_assert!(surface.spread[at] <= 0.103 && surface.measured[at]);
            }
        }

        /// A place without a point has what the surest neighbour has, and is the less sure the further that is.
        #[test]
        fn what_was_not_measured_is_its_neighbours(value in 1e-12..1e-9f64) {
            let mut surface = axes();
            let first = Place { extent: 0, adapters: 0, rank: 0, rows: 0 };
            fit(&mut surface, Slopes::OF_TIMES, &[Observation { place: first, value, noise: 0.1 * value }]);
            prop_assert!(surface.seconds_per_mac.iter().all(|own| (own / value - 1.0).abs() < 1e-6));
            let sure = |place| surface.spread[surface.index(place)];
            prop_assert!((sure(first) - 0.05f64.sqrt()).abs() < 1e-6);
            let [second, third] = [1, 2].map(|rows| Place { rows, ..first });
            prop_assert!(sure(second) > sure(first) && sure(third) > sure(second));
            prop_assert!(surface.measured[surface.index(first)] && !surface.measured[surface.index(second)]);
        }
    }

    /// Of differences that are mostly noise, some negative, surfaces come out that are nearer to the truth than they are, and that say how
    /// near: two standard deviations hold 95 of 100. Over surfaces as steep as is expected, the same ones every time.
    #[test]
    fn noise_is_smoothed_and_its_size_is_known() {
        let mut random = fastrand::Rng::with_seed(17);
        let (mut raw, mut fitted, mut within, mut all) = (0.0, 0.0, 0, 0);
        for _ in 0..200 {
            let powers = [0.5, 0.5, 0.1, 0.1].map(|slope| slope * (2.0 * random.f64() - 1.0));
            let mut surface = axes();
            let of = |place| truth(&axes(), place, powers);
            let observe = |place: Place| {
                // The larger the extent, the smaller the part that is sought.
                let share = if place.extent == 0 { 0.1 } else { 1.5 };
                let (value, noise) = (of(place), share * of(place));
                Observation { place, value: value + noise * normal(&mut random), noise }
            };
            let observations: Vec<_> = surface.places().map(observe).collect();
            fit(&mut surface, Slopes::OF_DIFFERENCES, &observations);
            for own in &observations {
                let (at, value) = (surface.index(own.place), of(own.place));
                let off = (surface.seconds_per_mac[at] / value).ln().abs();
                raw += (own.value / value - 1.0).abs();
                fitted += off;
                within += usize::from(off <= surface.spread[at]);
                all += 1;
            }
        }
        assert!(fitted < 0.25 * raw, "off by {fitted} in place of {raw}");
        assert!(within * 100 >= all * 95, "{within} of {all}");
    }

    #[test]
    fn differences_below_nothing_leave_a_positive_surface() {
        let mut surface = axes();
        let observations: Vec<_> =
            surface.places().map(|place| Observation { place, value: -1e-12, noise: 1e-11 }).collect();
        fit(&mut surface, Slopes::OF_DIFFERENCES, &observations);
        assert!(surface.seconds_per_mac.iter().all(|own| own.is_finite() && *own > 0.0 && *own < 1e-11));
        // A number that is none, as where a device says nothing, doesn't spoil the others.
        let mut surface = axes();
        let place = |rows| Place { extent: 0, adapters: 0, rank: 0, rows };
        let sure = Observation { place: place(0), value: 1e-11, noise: 1e-13 };
        fit(&mut surface, Slopes::OF_TIMES, &[sure, Observation { place: place(1), value: f64::NAN, noise: 1e-13 }]);
        assert!((surface.seconds_per_mac[1] / 1e-11 - 1.0).abs() < 1e-6 && !surface.measured[1]);
    }
}
