//! What a MAC of one kernel takes, measured at the points of a lattice and interpolated between them.

use serde::{Deserialize, Serialize};

/// Where a kernel works: what its seconds per MAC depend on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regime {
    /// Rows of the GEMM, or rows an adapter.
    pub rows: f64,
    /// Virtual rows, or the rank, of an adapter; 1 for kernels that know no adapters.
    pub rank: f64,
    /// Distinct adapters; 1 for kernels that know none.
    pub adapters: f64,
}

impl Regime {
    /// Of a GEMM.
    pub fn of_rows(rows: u64) -> Self {
        Self { rows: rows as f64, rank: 1.0, adapters: 1.0 }
    }
}

/// Seconds per MAC over rows × rank × adapters × extent, where extent is √(d·k). Linear between the points when everything is on
/// a logarithmic axis, constant beyond the ends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Surface {
    /// Rising, as are the other axes.
    pub rows: Vec<u32>,
    /// Of an adapter.
    pub ranks: Vec<u32>,
    /// Distinct ones.
    pub adapters: Vec<u32>,
    /// √(d·k)
    pub extents: Vec<u32>,
    /// `[extents, adapters, ranks, rows]`, row-major.
    pub seconds_per_mac: Vec<f64>,
    /// How far another tuning's value is likely to lie from this one's, as a share of it: two standard deviations, by how far halves of
    /// the measurements lay apart and by what the points around say. As long as `seconds_per_mac`.
    pub spread: Vec<f64>,
    /// Whether the point was measured; the others, which would have taken too long, have what their neighbours say.
    pub measured: Vec<bool>,
}

/// A point of a [`Surface`], by its place on every axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// On the axis of extents, and so on.
    pub extent: usize,
    /// Of adapters.
    pub adapters: usize,
    /// Of ranks.
    pub rank: usize,
    /// Of rows.
    pub rows: usize,
}

/// The most points on an axis, so that a damaged file can't ask for more than a page of memory.
const LONGEST_AXIS: usize = 32;

impl Surface {
    /// Every place, in the order of the values.
    pub fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let (extents, adapters, ranks, rows) =
            (self.extents.len(), self.adapters.len(), self.ranks.len(), self.rows.len());
        (0..extents * adapters * ranks * rows).map(move |at| Place {
            extent: at / (adapters * ranks * rows),
            adapters: at / (ranks * rows) % adapters,
            rank: at / rows % ranks,
            rows: at % rows,
        })
    }

    /// The position of a place's value.
    pub fn index(&self, place: Place) -> usize {
        let by_adapters = place.extent * self.adapters.len() + place.adapters;
        (by_adapters * self.ranks.len() + place.rank) * self.rows.len() + place.rows
    }

    /// The surface of one extent, ready to be asked many times.
    pub(super) fn at_extent(&self, extent: f64) -> Sheet {
        let extents = Axis::of(&self.extents);
        let (low, high, share) = extents.cell(extent.ln());
        let size = self.adapters.len() * self.ranks.len() * self.rows.len();
        let slice = |at: usize| self.seconds_per_mac.get(at * size..(at + 1) * size).unwrap_or_default();
        let values = slice(low).iter().zip(slice(high));
        Sheet {
            rows: Axis::of(&self.rows),
            ranks: Axis::of(&self.ranks),
            adapters: Axis::of(&self.adapters),
            logarithms: values.map(|(low, high)| low.ln() + share * (high.ln() - low.ln())).collect(),
        }
    }

    /// Seconds per MAC of a layer of this extent.
    pub fn at(&self, extent: f64, regime: Regime) -> f64 {
        self.at_extent(extent).at(regime)
    }

    /// What makes it unusable.
    pub(super) fn check(&self) -> Result<(), String> {
        let axes = [&self.rows, &self.ranks, &self.adapters, &self.extents];
        if axes.iter().any(|axis| axis.is_empty() || axis.len() > LONGEST_AXIS) {
            return Err(format!("has an axis of no points or of more than {LONGEST_AXIS}"));
        }
        if axes.iter().any(|axis| axis[0] == 0 || axis.windows(2).any(|pair| pair[0] >= pair[1])) {
            return Err("has an axis that doesn't rise from 1".to_owned());
        }
        let points: usize = axes.iter().map(|axis| axis.len()).product();
        for (what, found) in [
            ("seconds_per_mac", self.seconds_per_mac.len()),
            ("spread", self.spread.len()),
            ("measured", self.measured.len()),
        ] {
            if found != points {
                return Err(format!("has {found} numbers in `{what}` for {points} points"));
            }
        }
        if let Some(value) = self.seconds_per_mac.iter().find(|value| !(value.is_finite() && **value > 0.0)) {
            return Err(format!("holds {value}, which is no time"));
        }
        match self.spread.iter().find(|value| !(value.is_finite() && **value >= 0.0)) {
            Some(value) => Err(format!("holds {value}, which is no spread")),
            None => Ok(()),
        }
    }
}

/// A [`Surface`] at one extent.
#[derive(Clone, Debug)]
pub(super) struct Sheet {
    rows: Axis,
    ranks: Axis,
    adapters: Axis,
    /// `[adapters, ranks, rows]`
    logarithms: Box<[f64]>,
}

impl Sheet {
    pub(super) fn at(&self, regime: Regime) -> f64 {
        let (rows, ranks) = (self.rows.logarithms.len(), self.ranks.logarithms.len());
        let (row, next_row, row_share) = self.rows.cell(regime.rows.ln());
        let (rank, next_rank, rank_share) = self.ranks.cell(regime.rank.ln());
        let (low, high, adapter_share) = self.adapters.cell(regime.adapters.ln());
        let along_rows = |adapters: usize, rank: usize| {
            let line = (adapters * ranks + rank) * rows;
            let value = |row: usize| self.logarithms.get(line + row).copied().unwrap_or(f64::NEG_INFINITY);
            mix(value(row), value(next_row), row_share)
        };
        let along_ranks =
            |adapters: usize| mix(along_rows(adapters, rank), along_rows(adapters, next_rank), rank_share);
        mix(along_ranks(low), along_ranks(high), adapter_share).exp()
    }
}

fn mix(one: f64, other: f64, share: f64) -> f64 {
    if share == 0.0 { one } else { one + share * (other - one) }
}

/// A logarithmic axis.
#[derive(Clone, Debug)]
struct Axis {
    logarithms: Box<[f64]>,
}

impl Axis {
    fn of(points: &[u32]) -> Self {
        Self { logarithms: points.iter().map(|point| f64::from(*point).ln()).collect() }
    }

    /// The points on either side, and how far between them `logarithm` is.
    fn cell(&self, logarithm: f64) -> (usize, usize, f64) {
        let high = self.logarithms.iter().take_while(|point| **point < logarithm).count();
        let last = self.logarithms.len().saturating_sub(1);
        if high == 0 || high > last {
            let end = high.min(last);
            return (end, end, 0.0);
        }
        let (below, above) = (self.logarithms[high - 1], self.logarithms[high]);
        (high - 1, high, (logarithm - below) / (above - below))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn surface(value: impl Fn(f64, f64, f64, f64) -> f64) -> Surface {
        let mut surface = Surface {
            rows: vec![1, 4, 16],
            ranks: vec![1, 8],
            adapters: vec![1, 64],
            extents: vec![512, 2048],
            ..Surface::default()
        };
        for place in surface.places() {
            let axes = [
                surface.rows[place.rows],
                surface.ranks[place.rank],
                surface.adapters[place.adapters],
                surface.extents[place.extent],
            ];
            let [rows, rank, adapters, extent] = axes.map(f64::from);
            assert_eq!(surface.index(place), surface.seconds_per_mac.len());
            surface.seconds_per_mac.push(value(rows, rank, adapters, extent));
            surface.spread.push(0.0);
            surface.measured.push(true);
        }
        surface
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        /// A product of powers is a plane on logarithmic axes.
        #[test]
        fn powers_are_met_everywhere_inside(
            rows in 1.0..16.0, rank in 1.0..8.0, adapters in 1.0..64.0, extent in 512.0..2048.0,
            powers in proptest::array::uniform4(-2.0..2.0),
        ) {
            let power = |rows: f64, rank: f64, adapters: f64, extent: f64| {
                let [one, two, three, four]: [f64; 4] = powers;
                1e-11 * rows.powf(one) * rank.powf(two) * adapters.powf(three) * extent.powf(four)
            };
            let surface = surface(power);
            prop_assert_eq!(surface.check(), Ok(()));
            let found = surface.at(extent, Regime { rows, rank, adapters });
            let expected = power(rows, rank, adapters, extent);
            prop_assert!((found / expected - 1.0).abs() < 1e-9, "{} for {}", found, expected);
        }
    }

    #[test]
    fn beyond_the_ends_it_is_constant() {
        let surface = surface(|rows, rank, adapters, extent| rows * rank * adapters * extent);
        let far = Regime { rows: 1e9, rank: 1e9, adapters: 1e9 };
        assert!((surface.at(1e9, far) / (16.0 * 8.0 * 64.0 * 2048.0) - 1.0).abs() < 1e-12);
        let near = Regime { rows: 0.1, rank: 0.1, adapters: 0.1 };
        assert!((surface.at(1.0, near) / 512.0 - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_surface_is_said() {
        let good = surface(|_, _, _, _| 1.0);
        let broken = |change: &dyn Fn(&mut Surface)| {
            let mut surface = good.clone();
            change(&mut surface);
            surface.check().expect_err("it is broken")
        };
        assert!(broken(&|surface| surface.rows.clear()).contains("no points"));
        assert!(broken(&|surface| surface.rows[0] = 0).contains("rise"));
        assert!(broken(&|surface| surface.ranks[0] = 8).contains("rise"));
        assert!(broken(&|surface| surface.seconds_per_mac[3] = f64::NAN).contains("no time"));
        assert!(broken(&|surface| surface.seconds_per_mac[3] = -1.0).contains("no time"));
        assert!(broken(&|surface| surface.spread[0] = -1.0).contains("no spread"));
        assert!(broken(&|surface| surface.measured.clear()).contains("0 numbers in `measured` for 24 points"));
        assert!(broken(&|surface| surface.extents = (1..=40).collect()).contains("more than 32"));
    }
}
