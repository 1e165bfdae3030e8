//! Norms, φ, sums and cross-entropy: what a row gives depends on that row alone.

use flora_host::HostEngine;
use flora_host::decoder::OperationError;
use flora_ir::Activation;
use flora_ir::evaluate::apply_activation;
use proptest::prelude::*;

use super::{UNIT, bits, difference, rounding, widened};
use crate::problem::{config, random_values};

const EPSILON: f32 = 1e-5;

fn norm_adjoint(engine: &HostEngine, x: &[f32], gamma: &[f32], centred: bool, g: &[f32]) -> Vec<f32> {
    let mut out = g.to_vec();
    match centred {
        false => engine.rms_norm_adjoint(x, gamma, EPSILON, &mut out),
        true => engine.layer_norm_adjoint(x, gamma, EPSILON, &mut out),
    }
    .unwrap();
    out
}

/// Σ g ∘ norm(x) of one row.
fn norm_loss(x: &[f64], gamma: &[f32], centred: bool, g: &[f32]) -> f64 {
    let d = x.len() as f64;
    let mean = if centred { x.iter().sum::<f64>() / d } else { 0.0 };
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / d;
    let scale = 1.0 / (variance + f64::from(EPSILON)).sqrt();
    let terms = x.iter().zip(gamma).zip(g);
    terms.map(|((x, gamma), g)| (x - mean) * scale * f64::from(*gamma) * f64::from(*g)).sum()
}

/// −ln softmax(logits)[target]
fn cross_entropy(logits: &[f64], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln() - logits[target]
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn norms_equal_differences(
        rows in 1usize..6,
        d in 2usize..300,
        centred in any::<bool>(),
        offset in -3f32..3.0,
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let x: Vec<_> = random_values(rows * d, &mut random).iter().map(|value| value + offset).collect();
        let (gamma, g) = (random_values(d, &mut random), random_values(rows * d, &mut random));
        for engine in HostEngine::all() {
            let found = norm_adjoint(&engine, &x, &gamma, centred, &g);
            for (row, g) in g.chunks_exact(d).enumerate() {
                let mut x = widened(&x[row * d..(row + 1) * d]);
                let mean = if centred { x.iter().sum::<f64>() / d as f64 } else { 0.0 };
                let largest = x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
                let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / d as f64;
                let scale = 1.0 / (variance + f64::from(EPSILON)).sqrt();
                let h: Vec<_> = gamma.iter().zip(g).map(|(gamma, g)| f64::from(*gamma * *g).abs()).collect();
                let size = h.iter().sum::<f64>() * largest * scale;
                for column in 0..d {
                    let (right, of_difference) = difference(&mut x, column, size, |x| norm_loss(x, &gamma, centred, g));
                    // s · (h − mean(h) − n · mean(h ∘ n)), of which n is off by what the mean was rounded by, as the largest x.
                    let n = largest * scale;
                    let along: f64 = h.iter().sum::<f64>() / d as f64 * n;
                    let allowed = of_difference + rounding(d, scale * (h[column] + along + n * along));
                    let found = f64::from(found[row * d + column]);
                    prop_assert!(
                        (found - right).abs() <= allowed,
                        "{}: row {row}, column {column}: {found} not {right} ± {allowed}", engine.vectors()
                    );
                }
            }
        }
    }

    #[test]
    fn losses_and_their_gradients_equal_differences(
        rows in 0usize..6,
        vocabulary in 1usize..400,
        scale in 0.1f32..20.0,
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let logits: Vec<_> = random_values(rows * vocabulary, &mut random).iter().map(|value| value * scale).collect();
        let targets: Vec<_> = (0..rows).map(|_| random.u32(0..vocabulary as u32)).collect();
        for engine in HostEngine::all() {
            let mut gradient = logits.clone();
            let losses = engine.cross_entropy(&mut gradient, vocabulary, &targets).unwrap();
            for (row, (loss, target)) in losses.iter().zip(&targets).enumerate() {
                let own = row * vocabulary..(row + 1) * vocabulary;
                let mut x = widened(&logits[own.clone()]);
                let right = cross_entropy(&x, *target as usize);
                // A power errs by its argument's rounding, a product of 2 · `scale` at most, and a few units; the sum as sums do.
                let of_power = UNIT * (2.0 * f64::from(scale) + 8.0);
                let allowed = rounding(vocabulary, 1.0) + of_power;
                prop_assert!((loss - right).abs() <= allowed, "{}: {loss} not {right} ± {allowed}", engine.vectors());
                for (column, found) in gradient[own].iter().enumerate() {
                    let (right, of_difference) =
                        difference(&mut x, column, f64::from(scale) + 8.0, |x| cross_entropy(x, *target as usize));
                    let weight = if column == *target as usize { right + 1.0 } else { right };
                    let allowed = of_difference + weight.abs() * (allowed + of_power) + UNIT;
                    let found = f64::from(*found);
                    prop_assert!(
                        (found - right).abs() <= allowed,
                        "{}: row {row}, column {column}: {found} not {right} ± {allowed}", engine.vectors()
                    );
                }
            }
        }
    }

    #[test]
    fn activations_and_sums_are_taken_number_by_number(count in 0usize..5000, seed in any::<u64>()) {
        let mut random = fastrand::Rng::with_seed(seed);
        let (x, g) = (random_values(count, &mut random), random_values(count, &mut random));
        for engine in HostEngine::all() {
            let mut sum = x.clone();
            engine.add(&mut sum, &g).unwrap();
            prop_assert_eq!(bits(&sum), bits(&x.iter().zip(&g).map(|(x, g)| x + g).collect::<Vec<_>>()));
            for activation in Activation::ALL {
                let (mut out, mut gradient) = (vec![f32::NAN; count], g.clone());
                engine.activate(activation, &x, &mut out).unwrap();
                engine.activate_adjoint(activation, &x, &mut gradient).unwrap();
                for (at, (x, g)) in x.iter().zip(&g).enumerate() {
                    let value = apply_activation(activation, f64::from(*x));
                    prop_assert!((f64::from(out[at]) - value).abs() <= 4e-7 * f64::from(x.abs()).max(1e-3));
                    let mut point = [f64::from(*x)];
                    let (slope, of_difference) =
                        difference(&mut point, 0, 0.0, |x| apply_activation(activation, x[0]));
                    // A dozen roundings of terms of at most 1.2; relu's kink is no number of these.
                    let allowed = (of_difference + 1e-11 + 1.2 * 12.0 * UNIT) * f64::from(g.abs());
                    let right = slope * f64::from(*g);
                    prop_assert!(
                        activation == Activation::Relu && x.abs() < 3e-4
                            || (f64::from(gradient[at]) - right).abs() <= allowed,
                        "{activation:?} at {x}: {} not {right} ± {allowed}", gradient[at]
                    );
                }
            }
        }
    }
}

#[test]
fn other_rows_change_no_bit() {
    let mut random = fastrand::Rng::with_seed(2);
    let (rows, d) = (600, 577);
    let (x, g) = (random_values(rows * d, &mut random), random_values(rows * d, &mut random));
    let gamma = random_values(d, &mut random);
    let targets: Vec<u32> = (0..rows).map(|row| (row * 7 % d) as u32).collect();
    let poisoned = |values: &[f32]| [&values[..d], &vec![f32::NAN; values.len() - d]].concat();
    let engine = HostEngine::new();
    for centred in [false, true] {
        let whole = bits(&norm_adjoint(&engine, &x, &gamma, centred, &g));
        let beside = bits(&norm_adjoint(&engine, &poisoned(&x), &gamma, centred, &poisoned(&g)));
        assert_eq!(beside[..d], whole[..d]);
        let alone = bits(&norm_adjoint(&engine, &x[(rows - 1) * d..], &gamma, centred, &g[(rows - 1) * d..]));
        assert_eq!(alone, whole[(rows - 1) * d..]);
    }
    let of = |logits: &[f32], targets: &[u32]| {
        let mut logits = logits.to_vec();
        let losses = engine.cross_entropy(&mut logits, d, targets).unwrap();
        (losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>(), bits(&logits))
    };
    let (whole, beside, alone) = (of(&x, &targets), of(&poisoned(&x), &targets), of(&x[..d], &targets[..1]));
    assert_eq!((&beside.0[0], &beside.1[..d]), (&whole.0[0], &whole.1[..d]));
    assert_eq!((&alone.0[0], &alone.1[..]), (&whole.0[0], &whole.1[..d]));
    assert!(f64::from_bits(beside.0[1]).is_nan(), "NaN says that something is wrong");
}

#[test]
fn logits_far_apart_give_no_wrong_number() {
    for engine in HostEngine::all() {
        let mut logits = [1e30, -1e30, 0.0, 1000.0, -1000.0, 1000.0];
        let losses = engine.cross_entropy(&mut logits, 3, &[0, 1]).unwrap();
        assert_eq!(losses[0], 0.0);
        assert_eq!(losses[1], 2000.0 + 2f64.ln());
        assert!(logits[..3].iter().all(|g| g.abs() < 1e-30), "{logits:?}");
        assert_eq!(logits[3..], [0.5, -1.0, 0.5]);
    }
}

#[test]
fn other_lengths_are_refused() {
    let engine = HostEngine::new();
    let (x, mut g) = ([1.0; 12], [1.0; 12]);
    use OperationError::*;
    assert!(matches!(engine.rms_norm_adjoint(&x, &[1.0; 5], EPSILON, &mut g), Err(PartialRow { width: 5, found: 12 })));
    assert!(matches!(engine.layer_norm_adjoint(&x, &[], EPSILON, &mut g), Err(PartialRow { width: 0, found: 12 })));
    let refused = engine.rms_norm_adjoint(&x, &[1.0; 4], EPSILON, &mut g[..11]);
    assert!(matches!(refused, Err(WrongLength { expected: 12, found: 11, .. })));
    assert!(matches!(engine.add(&mut g, &x[..11]), Err(WrongLength { .. })));
    assert!(matches!(engine.activate(Activation::Silu, &x, &mut g[..11]), Err(WrongLength { .. })));
    assert!(matches!(engine.activate_adjoint(Activation::Silu, &x[..11], &mut g), Err(WrongLength { .. })));
    assert!(matches!(engine.cross_entropy(&mut g, 5, &[0, 1]), Err(WrongLength { expected: 10, found: 12, .. })));
    let refused = engine.cross_entropy(&mut g, 6, &[0, 6]);
    assert!(matches!(refused, Err(NoTarget { target: 6, vocabulary: 6 })));
    assert_eq!(g, [1.0; 12], "nothing is written");
}
