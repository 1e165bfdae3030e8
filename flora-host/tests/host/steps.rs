//! Every plan, weight format and element type, on sizes that are multiples of nothing.

use flora_host::{HostEngine, Weight};
use flora_plan::batch::Segment;
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use proptest::prelude::*;

use crate::problem::{Problem, config, elements, epilogues};

fn check(problem: &Problem, engine: &HostEngine) {
    for plan in Plan::unmerged() {
        let name = format!("{plan}, {}, {:?}", problem.format, problem.epilogue);
        problem.assert_right(&problem.run(engine, &plan), &name);
    }
    // The adapter of the first rows has the batch to itself, and shares it.
    if let Some(own) = problem.segments.iter().find(|segment| segment.rows > 0).map(|segment| segment.adapter) {
        let merged = problem.merged(own as usize);
        for (batch, plans) in
            [(merged.only(own), vec![Plan::MERGED]), (merged, Plan::unmerged().map(Plan::with_merged).collect())]
        {
            for plan in plans {
                let name = format!("{plan} of {own}, {}, {:?}", problem.format, problem.epilogue);
                batch.assert_right(&batch.run(engine, &plan), &name);
            }
        }
    }
}

impl Problem {
    /// The same with all rows given to one adapter.
    fn only(&self, adapter: u32) -> Self {
        let segments = self.segments.iter().map(|segment| Segment { adapter, ..*segment }).collect();
        Self { segments, ..self.clone() }
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn every_plan_is_the_sum_that_defines_it(
        d in 1u32..700,
        k in 1u32..90,
        activations in elements(),
        adapters in elements(),
        (_, weight) in prop::sample::select(WeightFormat::ALL.to_vec()),
        epilogue in epilogues(),
        seed in any::<u64>(),
    ) {
        let d = weight.whole(d);
        let problem = Problem::new(LayerShape { d, k }, LayerFormat { activations, adapters, weight, ..LayerFormat::default() }, epilogue, seed);
        for engine in HostEngine::all() {
            check(&problem, &engine);
        }
    }
}

#[test]
fn pairs_of_bf16_are_multiplied_by_every_plan() {
    let weight = WeightFormat::Float(Element::Bf16);
    for (seed, (d, k)) in [(1, 1), (2, 33), (301, 71), (1025, 7)].into_iter().enumerate() {
        for adapters in Element::ALL {
            let format = LayerFormat { activations: Element::Bf16, adapters, weight, ..LayerFormat::default() };
            let problem = Problem::new(LayerShape { d, k }, format, Epilogue::default(), seed as u64);
            for engine in HostEngine::all() {
                check(&problem, &engine);
            }
        }
    }
}

#[test]
fn long_batches_wide_panels_and_several_slices() {
    let engine = HostEngine::new();
    let cases = [
        (65, 777, 530, 1),
        (300, 290, 1, 2),
        (13, 1030, 14, 3),
        (257, 33, 1100, 4),
        (2100, 40, 33, 5),
        (1061, 35, 290, 6),
        (9, 4500, 20, 7),
    ];
    for (d, k, rows, seed) in cases {
        let mut problem = Problem::new(LayerShape { d, k }, LayerFormat::default(), Epilogue::default(), seed);
        let segments = (0..8).map(|adapter| Segment { rows: rows / 8 + u32::from(adapter < rows % 8), adapter });
        problem.segments = segments.collect();
        let mut random = fastrand::Rng::with_seed(seed);
        problem.x = crate::problem::random_values(problem.tokens() * d as usize, &mut random);
        problem.residual = vec![0.0; problem.tokens() * k as usize];
        check(&problem, &engine);
    }
}

#[test]
fn rows_apart_and_rows_beside_x_have_the_bits_of_rows_together() {
    let engine = HostEngine::new();
    for (seed, activations) in Element::ALL.into_iter().enumerate() {
        let format = LayerFormat { activations, ..LayerFormat::default() };
        let problem = Problem::new(LayerShape { d: 301, k: 71 }, format, Epilogue::default(), seed as u64);
        let own = problem.segments[0].adapter as usize;
        let problem = problem.merged(own);
        for plan in Plan::all() {
            let together = problem.run(&engine, &plan).bits();
            for gaps in [[0, 5], [3, 0], [40, 130]] {
                assert_eq!(
                    problem.run_apart(&engine, &plan, gaps, false).bits(),
                    together,
                    "{plan}, {activations}, {gaps:?}"
                );
            }
            assert_eq!(problem.run_replaced(&engine, &plan).bits(), together, "{plan}, {activations}, beside x");
        }
    }
}

#[test]
fn a_weight_gives_its_numbers_back() {
    let mut random = fastrand::Rng::with_seed(1);
    for (name, format) in WeightFormat::ALL {
        let shape = LayerShape { d: format.whole(333), k: 45 };
        let numbers = crate::problem::random_values((shape.d * shape.k) as usize, &mut random);
        let packed = PackedWeight::from_f32(format, shape, &numbers).unwrap();
        assert_eq!(Weight::new(&packed).to_f32(), packed.to_f32(), "{name}");
    }
}

#[test]
fn empty_batches_give_nothing() {
    let mut problem = Problem::new(LayerShape { d: 5, k: 7 }, LayerFormat::default(), Epilogue::default(), 1);
    problem.segments.clear();
    (problem.x, problem.residual) = (Vec::new(), Vec::new());
    let plan = Plan::new(MultiplicativeLowering::Stacked, AdditiveLowering::Fused);
    assert!(problem.run(&HostEngine::new(), &plan).widened().is_empty());
}
