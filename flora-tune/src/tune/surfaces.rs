//! From what was taken at the points of a lattice to seconds per MAC.

use std::collections::BTreeMap;

use flora_plan::cost::{GradientKernel, Kernel, Place, Regime, Surface, Term};

use super::clock::{Response, Times};
use super::fit::{Observation, Slopes, fit};
use super::lattice::Point;
use super::taken::{Taken, typical};

/// What was measured of layers of one format.
pub(super) struct Surfaces {
    pub(super) seconds_per_mac: BTreeMap<Kernel, Surface>,
    /// Nothing where the device computes none.
    pub(super) gradients: BTreeMap<GradientKernel, Surface>,
}

/// How kernels' times follow the machine's: each at every number of rows, from all its points there.
#[derive(Clone, Debug, Default)]
pub(super) struct Responses {
    of: BTreeMap<(Kernel, usize), Response>,
    /// The axis of rows.
    rows: BTreeMap<Kernel, Vec<u32>>,
}

impl Responses {
    pub(super) fn of<'a>(
        axes: &BTreeMap<Kernel, Surface>,
        points: impl Iterator<Item = &'a Point>,
        times: &Times,
    ) -> Self {
        let mut groups: BTreeMap<(Kernel, usize), Vec<&Taken>> = BTreeMap::new();
        points.for_each(|point| groups.entry((point.kernel, point.place.rows)).or_default().push(&point.taken));
        let of = groups.into_iter().map(|(group, points)| (group, times.response(points.into_iter())));
        let rows = axes.iter().map(|(kernel, surface)| (*kernel, surface.rows.clone()));
        Self { of: of.collect(), rows: rows.collect() }
    }

    /// What was taken of a point, at the machine's usual speed.
    pub(super) fn told(&self, point: &Point, times: &Times) -> Taken {
        let response = self.of.get(&(point.kernel, point.place.rows)).copied().unwrap_or_default();
        times.told(&point.taken, response)
    }

    /// That of the nearest points.
    pub(super) fn of_term(&self, term: &Term) -> Response {
        let rows = self.rows.get(&term.kernel).map_or(&[][..], Vec::as_slice);
        let off = |own: u32| (f64::from(own) / term.regime.rows).ln().abs();
        let nearest = (0..rows.len()).min_by(|one, other| off(rows[*one]).total_cmp(&off(rows[*other])));
        self.of.get(&(term.kernel, nearest.unwrap_or(0))).copied().unwrap_or_default()
    }
}

/// The surfaces with these axes of what `taken` says of the points.
pub(super) fn fit_all<'a>(
    axes: &BTreeMap<Kernel, Surface>,
    points: impl Iterator<Item = &'a Point> + Clone,
    taken: impl Fn(&Point) -> Taken,
) -> BTreeMap<Kernel, Surface> {
    let mut surfaces = axes.clone();
    // The base GEMM comes first, because others are what is taken beyond it.
    let (first, others): (Vec<Kernel>, Vec<Kernel>) = axes.keys().partition(|kernel| **kernel == Kernel::Matmul);
    for kernel in first.into_iter().chain(others) {
        let own: Vec<(&Point, Taken)> =
            points.clone().filter(|point| point.kernel == kernel).map(|point| (point, taken(point))).collect();
        let observations = observations(own.iter().map(|(point, taken)| (point.place, point.macs, taken)));
        let is_difference = own.iter().any(|(point, _)| point.base_rows > 0);
        let observations: Vec<Observation> = match surfaces.get(&Kernel::Matmul).filter(|_| is_difference) {
            Some(base) => {
                let by_place: BTreeMap<usize, &Point> =
                    own.iter().map(|(point, _)| (axes[&kernel].index(point.place), *point)).collect();
                let beyond = |own: Observation| match by_place.get(&axes[&kernel].index(own.place)) {
                    Some(point) => beyond_base(own, point, axes[&kernel].extents[own.place.extent].into(), base),
                    None => own,
                };
                observations.into_iter().map(beyond).collect()
            }
            None => observations,
        };
        if let Some(surface) = surfaces.get_mut(&kernel) {
            fit(surface, if is_difference { Slopes::OF_DIFFERENCES } else { Slopes::OF_TIMES }, &observations);
        }
    }
    raise_differences(&mut surfaces);
    surfaces
}

/// What a point takes beyond its base GEMM, which was measured in the same passes; a price has both, and what one has too much the other
/// has too little.
fn beyond_base(whole: Observation, point: &Point, extent: f64, base: &Surface) -> Observation {
    let seconds_per_mac = base.at(extent, Regime::of_rows(point.base_rows.into()));
    Observation { value: whole.value - seconds_per_mac * point.base_macs / point.macs, ..whole }
}

/// What was taken of points of one kernel, by MAC.
pub(super) fn observations<'a>(points: impl Iterator<Item = (Place, f64, &'a Taken)>) -> Vec<Observation> {
    let points: Vec<_> = points.filter(|(_, _, taken)| !taken.is_empty()).collect();
    let typical = typical(points.iter().map(|(_, _, taken)| *taken));
    let observation = |(place, macs, taken): (Place, f64, &Taken)| Observation {
        place,
        value: taken.seconds() / macs,
        noise: taken.noise(typical) / macs,
    };
    points.into_iter().map(observation).collect()
}

/// What a low-rank MAC is priced at least, as a share of the base GEMM's best: a difference of two times can come out as nothing,
/// and nothing has no logarithm.
const LEAST_SHARE: f64 = 0.25;

fn raise_differences(surfaces: &mut BTreeMap<Kernel, Surface>) {
    let best = surfaces[&Kernel::Matmul].seconds_per_mac.iter().copied().fold(f64::INFINITY, f64::min);
    let least = LEAST_SHARE * best;
    for surface in surfaces.values_mut() {
        for value in surface.seconds_per_mac.iter_mut().filter(|value| value.is_nan() || **value < least) {
            *value = least;
        }
    }
}
