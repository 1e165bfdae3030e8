//! A row's bits depend on its own x and adapter alone.

use flora_host::HostEngine;
use flora_plan::batch::{AdapterSlots, Segment};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use proptest::prelude::*;

use crate::problem::{Problem, config, elements, epilogues, random_values};

/// The rows of one segment.
fn alone(problem: &Problem, position: usize) -> Problem {
    let first = problem.segments[..position].iter().map(|segment| segment.rows as usize).sum::<usize>();
    let segment = problem.segments[position];
    let rows = |values: &[f32], width: u32| {
        values[first * width as usize..(first + segment.rows as usize) * width as usize].to_vec()
    };
    Problem {
        segments: vec![segment],
        x: rows(&problem.x, problem.shape.d),
        residual: rows(&problem.residual, problem.shape.k),
        ..problem.clone()
    }
}

/// NaN in every vector that the adapter doesn't use.
fn poisoned(problem: &Problem, adapter: &AdapterSlots) -> Problem {
    let low_rank = adapter.low_rank;
    let poison = |pool: &[f32], width: u32, scales: Vec<Option<u32>>, first: u32| {
        let mut pool = pool.to_vec();
        for (slot, vector) in pool.chunks_exact_mut(width as usize).enumerate() {
            let slot = slot as u32;
            if !scales.contains(&Some(slot)) && !(first..first + low_rank.rank).contains(&slot) {
                vector.fill(f32::NAN);
            }
        }
        pool
    };
    let in_scales = adapter.virtual_rows.iter().map(|scales| scales.in_scale).collect();
    let out_scales = adapter.virtual_rows.iter().map(|scales| scales.out_scale).collect();
    Problem {
        in_pool: poison(&problem.in_pool, problem.shape.d, in_scales, low_rank.shrink),
        out_pool: poison(&problem.out_pool, problem.shape.k, out_scales, low_rank.expand),
        ..problem.clone()
    }
}

fn check(problem: &Problem) {
    for engine in HostEngine::all() {
        check_on(problem, &engine);
    }
}

fn check_on(problem: &Problem, engine: &HostEngine) {
    for plan in Plan::unmerged().flat_map(|plan| [plan, plan.with_on_chip_from(4)]) {
        let whole = problem.run(engine, &plan).bits();
        let mut first = 0;
        for (position, segment) in problem.segments.iter().enumerate() {
            let adapter = &problem.adapters[segment.adapter as usize];
            let rows = segment.rows as usize * problem.shape.k as usize;
            let expected = &whole[first..first + rows];
            assert_eq!(alone(problem, position).run(engine, &plan).bits(), expected, "{plan}, alone");
            let poisoned = poisoned(problem, adapter).run(engine, &plan).bits();
            assert_eq!(&poisoned[first..first + rows], expected, "{plan}, beside NaN");
            first += rows;
        }
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn other_rows_and_adapters_change_no_bit(
        d in 1u32..600,
        k in 1u32..70,
        activations in elements(),
        epilogue in epilogues(),
        seed in any::<u64>(),
    ) {
        let format = LayerFormat { activations, adapters: Element::F32, weight: WeightFormat::default(), ..LayerFormat::default() };
        check(&Problem::new(LayerShape { d, k }, format, epilogue, seed));
    }
}

#[test]
fn several_panels_and_slices_change_no_bit() {
    for (d, k) in [(330, 600), (1061, 70)] {
        for (_, weight) in WeightFormat::ALL {
            let d = weight.whole(d);
            let format = LayerFormat { weight, ..LayerFormat::default() };
            check(&Problem::new(LayerShape { d, k }, format, Epilogue::default(), 5));
        }
    }
}

#[test]
fn blocks_of_rows_change_no_bit() {
    let shape = LayerShape { d: 150, k: 33 };
    let mut problem = Problem::new(shape, LayerFormat::default(), Epilogue::default(), 9);
    // Blocks end within segments, far from their ends and near them.
    let rows = [3, 250, 20, 130, 170, 40, 300, 1];
    problem.segments = rows.into_iter().enumerate().map(|(at, rows)| Segment { rows, adapter: at as u32 }).collect();
    let mut random = fastrand::Rng::with_seed(9);
    problem.x = random_values(problem.tokens() * shape.d as usize, &mut random);
    problem.residual = vec![0.0; problem.tokens() * shape.k as usize];
    check(&problem);
}
