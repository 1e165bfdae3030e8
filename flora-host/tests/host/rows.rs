//! Norms and products against what defines them, in f64.

use flora_host::HostEngine;
use flora_host::decoder::OperationError;
use flora_plan::layer::Element;
use proptest::prelude::*;

use crate::problem::{Numbers, config, elements, random_values};

const EPSILON: f32 = 1e-5;

fn widened(numbers: &Numbers) -> Vec<f64> {
    numbers.widened().into_iter().map(f64::from).collect()
}

/// Half a unit in the last place of a stored number, and f16's least.
fn stored(element: Element, right: f64) -> f64 {
    if element == Element::F32 { 0.0 } else { 1.001 * element.rounding() * right.abs() + 3e-8 }
}

fn run(engine: &HostEngine, x: &Numbers, element: Element, gamma: &[f32], beta: Option<&[f32]>) -> Numbers {
    let mut out = Numbers::new(element, &vec![f32::NAN; x.widened().len()]);
    match beta {
        None => engine.rms_norm(x.values(), gamma, EPSILON, out.values_mut()),
        Some(beta) => engine.layer_norm(x.values(), [gamma, beta], EPSILON, out.values_mut()),
    }
    .unwrap();
    out
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn norms_are_what_defines_them(
        rows in 0usize..9,
        d in 1usize..700,
        element in elements(),
        centred in any::<bool>(),
        offset in -3f32..3.0,
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let x: Vec<_> = random_values(rows * d, &mut random).iter().map(|value| value + offset).collect();
        let x = Numbers::new(element, &x);
        let (gamma, beta) = (random_values(d, &mut random), random_values(d, &mut random));
        for engine in HostEngine::all() {
            let out = run(&engine, &x, element, &gamma, centred.then_some(&beta));
            let (numbers, out) = (widened(&x), widened(&out));
            for (row, (x, out)) in numbers.chunks_exact(d).zip(out.chunks_exact(d)).enumerate() {
                let mean = if centred { x.iter().sum::<f64>() / d as f64 } else { 0.0 };
                let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / d as f64;
                let deviation = (variance + f64::from(EPSILON)).sqrt();
                // The mean errs by a sum's rounding, and what it is taken from has one too.
                let largest = x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
                let unit = f64::from(f32::EPSILON) / 2.0 * (d as f64 + 8.0).sqrt();
                for column in 0..d {
                    let factor = f64::from(gamma[column]) / deviation;
                    let beta = if centred { f64::from(beta[column]) } else { 0.0 };
                    let right = (x[column] - mean) * factor + beta;
                    let magnitude = largest * factor.abs() + beta.abs();
                    let allowed = 4.0 * unit * magnitude + stored(element, right);
                    prop_assert!(
                        (out[column] - right).abs() <= allowed,
                        "{}: row {row}, column {column}: {} not {right} ± {allowed}", engine.vectors(), out[column]
                    );
                }
            }
        }
    }

    #[test]
    fn products_are_rounded_once(
        count in 0usize..5000,
        elements in [elements(), elements(), elements()],
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let [one, other] = [0, 1].map(|at: usize| Numbers::new(elements[at], &random_values(count, &mut random)));
        let products: Vec<_> = one.widened().iter().zip(other.widened()).map(|(one, other)| one * other).collect();
        for engine in HostEngine::all() {
            let mut out = Numbers::new(elements[2], &vec![f32::NAN; count]);
            engine.multiply(one.values(), other.values(), out.values_mut()).unwrap();
            prop_assert_eq!(out.bits(), Numbers::new(elements[2], &products).bits());
        }
    }
}

#[test]
fn other_rows_change_no_bit() {
    let mut random = fastrand::Rng::with_seed(2);
    let (rows, d) = (600, 577);
    let x = random_values(rows * d, &mut random);
    let (gamma, beta) = (random_values(d, &mut random), random_values(d, &mut random));
    for element in Element::ALL {
        for beta in [None, Some(&beta[..])] {
            let engine = HostEngine::new();
            let whole = run(&engine, &Numbers::new(element, &x), element, &gamma, beta).bits();
            let mut poisoned = x.clone();
            poisoned[d..].fill(f32::NAN);
            let beside = run(&engine, &Numbers::new(element, &poisoned), element, &gamma, beta).bits();
            assert_eq!(beside[..d], whole[..d]);
            let alone = run(&engine, &Numbers::new(element, &x[(rows - 1) * d..]), element, &gamma, beta).bits();
            assert_eq!(alone, whole[(rows - 1) * d..]);
        }
    }
}

#[test]
fn other_lengths_are_refused() {
    let engine = HostEngine::new();
    let x = Numbers::new(Element::F32, &[1.0; 12]);
    let refused = |gamma: usize, beta: Option<usize>, out: usize| {
        let (gamma, mut out) = (vec![1.0; gamma], Numbers::new(Element::F32, &vec![0.0; out]));
        match beta {
            None => engine.rms_norm(x.values(), &gamma, EPSILON, out.values_mut()),
            Some(beta) => engine.layer_norm(x.values(), [&gamma, &vec![0.0; beta]], EPSILON, out.values_mut()),
        }
        .unwrap_err()
    };
    assert!(matches!(refused(5, None, 12), OperationError::PartialRow { width: 5, found: 12 }));
    assert!(matches!(refused(0, None, 12), OperationError::PartialRow { width: 0, found: 12 }));
    assert!(matches!(refused(4, None, 11), OperationError::WrongLength { expected: 12, found: 11, .. }));
    assert!(matches!(refused(4, Some(3), 12), OperationError::WrongLength { expected: 4, found: 3, .. }));
    let mut out = Numbers::new(Element::F32, &[0.0; 12]);
    let short = Numbers::new(Element::F32, &[0.0; 11]);
    let refused = engine.multiply(x.values(), short.values(), out.values_mut()).unwrap_err();
    assert!(matches!(refused, OperationError::WrongLength { expected: 12, found: 11, .. }));
}
