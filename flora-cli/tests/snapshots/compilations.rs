//! No kernel is compiled for a batch: a thousand random ones need as many compilations as there are blueprints.

use std::collections::BTreeSet;

use flora::prelude::*;
use flora_codegen::target::{Emission, Pass, Target, emit};
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::Epilogue;

/// An adapter of a random kind and rank whose vectors start at `first`.
fn adapter(random: &mut fastrand::Rng, first: u32) -> AdapterSlots {
    let rank = random.u32(1..=64);
    let scaled = |count: u32| {
        let scales = (first..).take(count as usize);
        scales.map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) }).collect::<Vec<_>>()
    };
    let low_rank = LowRankSlots { shrink: first, expand: first, rank };
    match random.u32(0..5) {
        0 => AdapterSlots::base(),
        1 => AdapterSlots { low_rank, ..AdapterSlots::base() },
        2 => AdapterSlots { virtual_rows: scaled(1), ..AdapterSlots::base() },
        3 => AdapterSlots { virtual_rows: scaled(rank), ..AdapterSlots::base() },
        _ => AdapterSlots {
            virtual_rows: [vec![VirtualRowSlots::default()], scaled(rank)].concat(),
            ..AdapterSlots::base()
        },
    }
}

#[test]
fn a_thousand_batches_compile_few_kernels() {
    const SEED: u64 = 22;
    println!("seed {SEED}");
    let mut random = fastrand::Rng::with_seed(SEED);
    let target: Target = "cuda:sm_90".parse().expect("a target");
    let plans: Vec<Plan> = Plan::unmerged().collect();
    let mut kernels = BTreeSet::new();
    let (mut launches, mut halfway) = (0, 0);
    for batch in 0..1000 {
        let count = random.u32(1..=12);
        let adapters: Vec<_> = (0..count).map(|own| adapter(&mut random, 65 * own)).collect();
        let segments: Vec<_> = (0..random.u32(1..=40))
            .map(|_| {
                let rows = if random.bool() { random.u32(0..4) } else { random.u32(4..300) };
                Segment { rows, adapter: random.u32(0..count) }
            })
            .collect();
        let emission = Emission {
            pass: Pass::Forward,
            shape: LayerShape { d: 576, k: 192 },
            format: LayerFormat::uniform(Element::F16),
            epilogue: Epilogue::default(),
            plan: plans[random.usize(0..plans.len())],
            segments: &segments,
            adapters: &adapters,
        };
        for kernel in emit(target, &emission).expect("a batch that runs") {
            launches += 1;
            kernels.insert((kernel.name, kernel.cube_dim, kernel.source));
        }
        if batch == 499 {
            halfway = kernels.len();
        }
    }
    println!("{launches} launches, {} kernels, {halfway} of them in the first half", kernels.len());
    // A W_i of more ranks than tensor cores multiply at once has kernels of its own.
    assert!(kernels.len() <= 85, "{} kernels for {launches} launches", kernels.len());
    assert!(kernels.len() - halfway <= 8, "{halfway} kernels after 500 batches, {} after 1000", kernels.len());
}
