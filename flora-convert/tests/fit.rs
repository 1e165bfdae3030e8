//! Fits on sizes that are multiples of nothing, held against the outputs that they are of.

use flora_convert::{Fit, FitError, Gram, GramError, Kind, Limits, Problem, fit, residual};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

/// A layer's inputs, its weight and an update.
#[derive(Clone, Debug)]
struct Case {
    d: usize,
    k: usize,
    x: Vec<f32>,
    base: Vec<f32>,
    update: Vec<f64>,
}

fn normal(random: &mut fastrand::Rng) -> f64 {
    (0..12).map(|_| random.f64()).sum::<f64>() - 6.0
}

fn numbers(count: usize, random: &mut fastrand::Rng) -> Vec<f64> {
    (0..count).map(|_| normal(random)).collect()
}

fn floats(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    (0..count).map(|_| normal(random) as f32).collect()
}

/// b a, `[d, k]`.
fn product(b: &[f64], a: &[f64], rank: usize) -> Vec<f64> {
    let (d, k) = (b.len() / rank, a.len() / rank);
    let at = |row: usize, column: usize| (0..rank).map(|own| b[row * rank + own] * a[own * k + column]).sum();
    (0..d * k).map(|index| at(index / k, index % k)).collect()
}

/// The update of a LoRA adapter.
fn low_rank((d, k, rows): (usize, usize, usize), rank: usize, random: &mut fastrand::Rng) -> Case {
    let (x, base) = (floats(rows * d, random), floats(d * k, random));
    let update = product(&numbers(d * rank, random), &numbers(rank * k, random), rank);
    Case { d, k, x, base, update }
}

/// An update that is w0 ∘ (b a), less w0 for fLoRA.
fn multiplicative(kind: Kind, (d, k, rows): (usize, usize, usize), rank: usize, random: &mut fastrand::Rng) -> Case {
    let mut case = low_rank((d, k, rows), 1, random);
    let factors = product(&numbers(d * rank, random), &numbers(rank * k, random), rank);
    let without = if kind == Kind::Flora { 1.0 } else { 0.0 };
    case.update = case.base.iter().zip(factors).map(|(base, factor)| f64::from(*base) * (factor - without)).collect();
    case
}

impl Case {
    fn gram(&self) -> Gram {
        let mut gram = Gram::new(self.d);
        gram.add(&self.x).expect("whole rows");
        gram
    }

    fn problem<'a>(&'a self, kind: Kind, inputs: &'a Gram) -> Problem<'a> {
        Problem { kind, base: &self.base, update: &self.update, inputs }
    }

    /// ‖x of‖, by plain loops.
    fn norm(&self, of: &[f64]) -> f64 {
        let squares = self.x.chunks_exact(self.d).flat_map(|row| {
            (0..self.k).map(move |output| {
                let products = row.iter().enumerate().map(|(input, x)| f64::from(*x) * of[input * self.k + output]);
                products.sum::<f64>().powi(2)
            })
        });
        squares.sum::<f64>().sqrt()
    }

    /// The relative residual by its definition.
    fn residual(&self, kind: Kind, b: &[f64], a: &[f64]) -> f64 {
        let factors = product(b, a, b.len() / self.d);
        let whole = if kind == Kind::Flora { 1.0 } else { 0.0 };
        let left = self.base.iter().zip(&self.update).zip(factors);
        let left: Vec<f64> =
            left.map(|((base, update), factor)| update + (whole - factor) * f64::from(*base)).collect();
        self.norm(&left) / self.norm(&self.update)
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Flora), Just(Kind::Hira)]
}

/// The same cases in every run.
fn config() -> ProptestConfig {
    let (rng_algorithm, rng_seed) = (RngAlgorithm::ChaCha, RngSeed::Fixed(0xF10A));
    ProptestConfig { cases: 64, rng_algorithm, rng_seed, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    /// Whatever the update is, and however few the inputs are.
    #[test]
    fn the_residual_never_rises(
        kind in kinds(), d in 3usize..23, k in 2usize..19, rows in 1usize..60, rank in 1usize..4, seed in 0u64..1000
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let case = low_rank((d, k, rows), 2, &mut random);
        let (gram, rank) = (case.gram(), rank.min(d.min(k)));
        let Fit { b, a, residuals } =
            fit(&case.problem(kind, &gram), rank, Limits { rounds: 12, least_gain: 0.0 }).expect("a fit");
        prop_assert_eq!((b.len(), a.len()), (d * rank, rank * k));
        for pair in residuals.windows(2) {
            // What is rounded is of the size of x w0, which is up to some ten times x U.
            prop_assert!(pair[1].powi(2) <= pair[0].powi(2) + 1e-11, "{residuals:?}");
        }
        let (last, right) = (residuals[residuals.len() - 1], case.residual(kind, &b, &a));
        prop_assert!((last.powi(2) - right.powi(2)).abs() <= 1e-10, "{last} is {right}");
        let again = residual(&case.problem(kind, &gram), &b, &a).expect("as many numbers");
        prop_assert!((again.powi(2) - right.powi(2)).abs() <= 1e-10, "{again} is {right}");
    }

    #[test]
    fn what_is_a_product_is_found(
        kind in kinds(), d in 11usize..27, k in 9usize..23, rank in 1usize..4, seed in 0u64..1000
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let case = multiplicative(kind, (d, k, 2 * d + 3), rank, &mut random);
        let gram = case.gram();
        let found = fit(&case.problem(kind, &gram), rank, Limits { rounds: 400, least_gain: 0.0 }).expect("a fit");
        let left = case.residual(kind, &found.b, &found.a);
        prop_assert!(left < 1e-6, "{left} after {} half-steps", found.residuals.len() - 1);
    }

    /// The last half-step solved for b: no other b does better with that a.
    #[test]
    fn a_half_step_is_a_minimum(kind in kinds(), d in 3usize..13, k in 3usize..11, seed in 0u64..1000) {
        let mut random = fastrand::Rng::with_seed(seed);
        let case = low_rank((d, k, 2 * d), 2, &mut random);
        let gram = case.gram();
        let Fit { b, a, .. } =
            fit(&case.problem(kind, &gram), 2, Limits { rounds: 1, least_gain: 0.0 }).expect("a fit");
        let least = case.residual(kind, &b, &a).powi(2);
        for at in 0..b.len() {
            for change in [1e-3, -1e-3] {
                let mut other = b.clone();
                other[at] += change;
                prop_assert!(case.residual(kind, &other, &a).powi(2) >= least - 1e-12);
            }
        }
    }
}

#[test]
fn an_update_of_zeros_is_the_base() {
    let mut random = fastrand::Rng::with_seed(3);
    let mut case = low_rank((7, 5, 11), 1, &mut random);
    case.update.iter_mut().for_each(|number| *number = 0.0);
    let gram = case.gram();
    for (kind, whole) in [(Kind::Flora, 1.0), (Kind::Hira, 0.0)] {
        let found = fit(&case.problem(kind, &gram), 2, Limits { rounds: 9, least_gain: 0.0 }).expect("a fit");
        assert_eq!(found.residuals, [0.0]);
        assert!(product(&found.b, &found.a, 2).iter().all(|factor| *factor == whole));
    }
}

#[test]
fn inputs_of_few_directions_have_all_energy_in_them() {
    let mut random = fastrand::Rng::with_seed(4);
    let (d, rows) = (13, 40);
    // Two directions, the first of four times the energy.
    let directions = numbers(2 * d, &mut random);
    let norm = |own: usize| directions[own * d..(own + 1) * d].iter().map(|x| x * x).sum::<f64>().sqrt();
    let row = |row: usize| {
        let (first, second) = if row.is_multiple_of(2) { (2.0 / norm(0), 0.0) } else { (0.0, 1.0 / norm(1)) };
        (0..d).map(|at| first * directions[at] + second * directions[d + at]).map(|x| x as f32).collect::<Vec<_>>()
    };
    let mut gram = Gram::new(d);
    (0..rows).for_each(|index| gram.add(&row(index)).expect("a row"));
    let spectrum = gram.spectrum().expect("eigenvalues");
    assert_eq!(gram.rows(), rows as u64);
    assert!(spectrum.share(1) >= 0.8 - 1e-6, "at least the stronger one: {}", spectrum.share(1));
    assert!((spectrum.share(2) - 1.0).abs() < 1e-6 && spectrum.share(d) <= 1.0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut random = fastrand::Rng::with_seed(5);
    let case = low_rank((7, 5, 11), 1, &mut random);
    let gram = case.gram();
    let limits = Limits { rounds: 2, least_gain: 0.0 };
    let refused = |problem: &Problem<'_>, rank| fit(problem, rank, limits).expect_err("no fit");
    let problem = case.problem(Kind::Hira, &gram);
    assert_eq!(refused(&problem, 0), FitError::Rank { rank: 0, d: 7, k: 5, most: 5 });
    assert_eq!(refused(&problem, 6), FitError::Rank { rank: 6, d: 7, k: 5, most: 5 });
    assert!(fit(&case.problem(Kind::Flora, &gram), 6, limits).is_ok());
    let short = Problem { update: &case.update[1..], ..problem };
    assert!(matches!(refused(&short, 1), FitError::Shape { what: "the update", found: 34, expected: 35 }));
    let mut broken = case.clone();
    broken.update[3] = f64::NAN;
    assert_eq!(refused(&broken.problem(Kind::Hira, &gram), 1), FitError::NotFinite("the update"));
    let mut gram = gram.clone();
    assert_eq!(gram.add(&[1.0; 8]), Err(GramError::Ragged { numbers: 8, d: 7 }));
    assert_eq!(gram.add(&[f32::INFINITY; 7]), Err(GramError::NotFinite));
    assert_eq!(gram.rows(), 11, "nothing was added");
}
