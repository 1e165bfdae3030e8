//! Every lowering equals the oracle.

use flora::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::case::{Adapter, Case, cases, device, kinds, plans};

/// Few cases on a device that compiles a kernel for every blueprint it meets.
fn config() -> ProptestConfig {
    let cases = if device().info().id == "host" { 600 } else { 80 };
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(20), failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn every_lowering_equals_the_oracle() {
    let mut runner = proptest::test_runner::TestRunner::new(config());
    let outcome = runner.run(&cases(), |case| {
        let loaded = case.load(device());
        for plan in plans() {
            let deviation = loaded.deviation(&loaded.run(&plan));
            prop_assert!(deviation.is_rounding(), "{plan:?}: {deviation:?}");
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
}

/// Every kind by itself at the sizes of the models, decode and prefill.
#[test]
fn every_kind_at_awkward_sizes() {
    for (d, k) in [(37, 96), (96, 37), (576, 192), (61, 3424)] {
        for kind in kinds() {
            for (rank, rows) in [(1, 1), (3, 7), (17, 33), (64, 5)] {
                let case = Case {
                    d,
                    k,
                    bias: true,
                    activation: Activation::Silu,
                    residual: false,
                    format: LayerFormat::default(),
                    adapters: vec![Adapter { name: "own".to_owned(), kind, rank }],
                    segments: vec![(0, rows), (1, 2)],
                    seed: (d * k + rank) as u64,
                };
                let loaded = case.load(device());
                for plan in plans() {
                    let deviation = loaded.deviation(&loaded.run(&plan));
                    assert!(
                        deviation.is_rounding(),
                        "{kind} rank {rank} [{d}, {k}] {rows} rows {plan:?}: {deviation:?}"
                    );
                }
            }
        }
    }
}

fn plain(segments: Vec<(usize, u32)>) -> Case {
    let (activation, format) = (Activation::Identity, LayerFormat::default());
    Case { d: 37, k: 29, bias: false, activation, residual: false, format, adapters: Vec::new(), segments, seed: 5 }
}

#[test]
fn a_batch_may_be_empty() {
    for segments in [vec![], vec![(0, 0)], vec![(0, 0), (0, 0)]] {
        let loaded = plain(segments).load(device());
        for plan in plans() {
            assert!(loaded.run(&plan).is_empty());
        }
    }
}

#[test]
fn a_batch_may_be_all_base() {
    for activation in Activation::ALL {
        let case = Case { activation, bias: true, ..plain(vec![(0, 3), (0, 0), (0, 70)]) };
        let loaded = case.load(device());
        for plan in plans() {
            let deviation = loaded.deviation(&loaded.run(&plan));
            assert!(deviation.is_rounding(), "{activation:?} {plan:?}: {deviation:?}");
        }
    }
}

#[test]
fn wrong_batches_are_refused() {
    let loaded = plain(vec![(0, 2)]).load(device());
    let plan = plans()[0];
    let unknown =
        loaded.projection.with(|projection| projection.forward(&Batch::new([(Some("nobody"), 2)]), &plan, &loaded.x));
    assert!(unknown.unwrap_err().to_string().contains("`nobody`"));
    let short = loaded.projection.with(|projection| projection.forward(&Batch::new([(None, 3)]), &plan, &loaded.x));
    assert!(short.unwrap_err().to_string().contains("3 rows of 37 inputs, 111 numbers, but 74"));
    let huge = loaded
        .projection
        .with(|projection| projection.forward(&Batch::new([(None, u32::MAX), (None, u32::MAX)]), &plan, &loaded.x));
    assert!(huge.is_err());
}
