//! Rows in 8 bits by quantised weights: the sums of what they are rounded to, as near as rounding brings them to those of the rows
//! themselves, and NaN where a row isn't finite.

use std::ops::Range;

use flora_host::HostEngine;
use flora_plan::batch::{AdapterSlots, Segment};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use proptest::prelude::*;

use crate::problem::{Problem, config, elements, epilogues, random_values};

fn quantised() -> Vec<WeightFormat> {
    let formats = WeightFormat::ALL.into_iter().map(|(_, format)| format);
    formats.filter(|format| format.quantisation().is_some()).collect()
}

/// Inputs that share a scale.
fn block(format: WeightFormat) -> usize {
    format.quantisation().and_then(|quantisation| quantisation.block()).unwrap_or(32) as usize
}

/// The scale of a block.
fn scale(block: &[f32]) -> f32 {
    block.iter().fold(1e-30f32, |most, number| most.max(number.abs())) * (1.0 / 127.0)
}

/// What numbers are rounded to.
fn rounded(numbers: &[f32], format: WeightFormat) -> Vec<f32> {
    let round = |block: &[f32]| -> Vec<f32> {
        let (scale, largest) = (scale(block), block.iter().fold(1e-30f32, |most, number| most.max(number.abs())));
        block.iter().map(|number| (number * (127.0 / largest)).round_ties_even() * scale).collect()
    };
    numbers.chunks(block(format)).flat_map(round).collect()
}

/// Half a scale for every number.
fn most_off(numbers: &[f32], format: WeightFormat) -> Vec<f32> {
    numbers.chunks(block(format)).flat_map(|block| vec![scale(block) / 2.0; block.len()]).collect()
}

const STACKED: Plan = Plan::new(MultiplicativeLowering::Stacked, AdditiveLowering::Fused);

fn engines() -> impl Iterator<Item = HostEngine> {
    HostEngine::all().into_iter().map(HostEngine::rounding_activations)
}

/// Against both oracles, on every instruction set, by plans that multiply all rows by the weight as it is, and such as don't.
fn check(problem: &Problem) {
    let weight = problem.format.weight;
    // Others make a weight of several virtual rows, and leave the row as it is.
    let is_rounded = |plan: &Plan, adapter: &AdapterSlots| *plan == STACKED || adapter.virtual_rows.len() == 1;
    for plan in [STACKED, Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Segmented)] {
        let exact = problem.oracle();
        let of_rounded = problem.oracle_of(|adapter, x| is_rounded(&plan, adapter).then(|| rounded(x, weight)));
        let off = problem.oracle_of(|adapter, x| match is_rounded(&plan, adapter) {
            true => Some(most_off(x, weight)),
            false => Some(vec![0.0; x.len()]),
        });
        for engine in engines() {
            let what = format!("{weight}, {plan}, {}", engine.vectors());
            let y = problem.run(&engine, &plan);
            problem.assert_as(&y, &of_rounded, |_| 0.0, &what);
            // Without activations, which have slopes of their own.
            if problem.epilogue == Epilogue::default() {
                problem.assert_as(&y, &exact, |at| 1.001 * off[at].1.sum, &format!("{what}, unrounded"));
            }
        }
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn outputs_are_those_of_rounded_rows(
        d in 1u32..600,
        k in 1u32..70,
        activations in elements(),
        weight in prop::sample::select(quantised()),
        epilogue in prop_oneof![Just(Epilogue::default()), epilogues()],
        seed in any::<u64>(),
    ) {
        let format = LayerFormat { activations, weight, ..LayerFormat::default() };
        check(&Problem::new(LayerShape { d: weight.whole(d), k }, format, epilogue, seed));
    }
}

/// Rows by all outputs, in slices and panels, of every format.
#[test]
fn long_and_wide_layers_are_those_of_rounded_rows() {
    for weight in quantised() {
        for (d, k) in [(33, 1100), (2090, 33)] {
            let shape = LayerShape { d: weight.whole(d), k };
            let mut problem =
                Problem::new(shape, LayerFormat { weight, ..LayerFormat::default() }, Epilogue::default(), 3);
            problem.segments = vec![Segment { rows: 15, adapter: 0 }, Segment { rows: 1, adapter: 2 }];
            let mut random = fastrand::Rng::with_seed(4);
            problem.x = random_values(problem.tokens() * shape.d as usize, &mut random);
            problem.residual = random_values(problem.tokens() * k as usize, &mut random);
            check(&problem);
        }
    }
}

/// A layer without adapters, and rows of it.
fn plain(weight: WeightFormat, rows: u32) -> Problem {
    let shape = LayerShape { d: weight.whole(70), k: 37 };
    let format = LayerFormat { activations: Element::F32, weight, ..LayerFormat::default() };
    let mut problem = Problem::new(shape, format, Epilogue::default(), 5);
    problem.segments = vec![Segment { rows, adapter: 0 }];
    let mut random = fastrand::Rng::with_seed(6);
    problem.x = random_values(rows as usize * shape.d as usize, &mut random);
    problem.residual = vec![0.0; rows as usize * shape.k as usize];
    problem
}

/// Rows in tiles of any number, on every instruction set, and by an instruction for bytes or without one.
#[test]
fn a_row_has_the_same_bits_alone_and_by_every_instruction_set_that_fuses() {
    for weight in quantised() {
        let problem = plain(weight, 9);
        let k = problem.shape.k as usize;
        let best = problem.run(&HostEngine::new().rounding_activations(), &STACKED).bits();
        for engine in engines() {
            let whole = problem.run(&engine, &STACKED).bits();
            for (row, right) in whole.chunks(k).enumerate() {
                let alone = problem.rows_of_one_segment(row..row + 1).run(&engine, &STACKED).bits();
                assert_eq!(alone, right, "{weight}, {}: row {row}", engine.vectors());
            }
            if engine.vectors() != "scalar" {
                assert_eq!(whole, best, "{weight}, {}", engine.vectors());
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_has_no_finite_output_and_changes_no_other() {
    for weight in quantised() {
        let problem = plain(weight, 9);
        let (d, k) = (problem.shape.d as usize, problem.shape.k as usize);
        for engine in engines() {
            let right = problem.run(&engine, &STACKED).widened();
            assert!(right.iter().all(|output| output.is_finite()));
            for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for place in [0, d / 2, d - 1] {
                    let mut damaged = problem.clone();
                    damaged.x[4 * d + place] = number;
                    let found = damaged.run(&engine, &STACKED).widened();
                    for (row, (found, right)) in found.chunks(k).zip(right.chunks(k)).enumerate() {
                        match row {
                            4 => assert!(found.iter().all(|output| !output.is_finite()), "{weight}: {number}"),
                            _ => assert_eq!(found, right, "{weight}: row {row} beside {number}"),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn blocks_of_zeros_and_of_the_least_and_largest_numbers_are_multiplied() {
    for weight in quantised() {
        let mut problem = plain(weight, 4);
        let (d, k) = (problem.shape.d as usize, problem.shape.k as usize);
        problem.x[..d].fill(0.0);
        problem.x[d..2 * d].iter_mut().for_each(|number| *number *= 1e-40);
        problem.x[2 * d..3 * d].iter_mut().for_each(|number| *number *= 1e34);
        for engine in engines() {
            let y = problem.run(&engine, &STACKED).widened();
            assert!(y[..k].iter().all(|output| *output == 0.0), "{weight}");
            assert!(y[k..2 * k].iter().all(|output| output.abs() < 1e-30), "{weight}");
            assert!(y[2 * k..3 * k].iter().all(|output| output.is_finite() && *output != 0.0), "{weight}");
        }
        check(&problem.rows_of_one_segment(2..4));
    }
}

#[test]
fn weights_in_floats_are_multiplied_as_ever() {
    for weight in [WeightFormat::default(), WeightFormat::Float(Element::Bf16)] {
        let problem = plain(weight, 5);
        let bits = problem.run(&HostEngine::new(), &STACKED).bits();
        assert_eq!(problem.run(&HostEngine::new().rounding_activations(), &STACKED).bits(), bits);
    }
    let problem = plain(WeightFormat::Q4_1, 5);
    let bits = problem.run(&HostEngine::new(), &STACKED).bits();
    assert_ne!(problem.run(&HostEngine::new().rounding_activations(), &STACKED).bits(), bits);
}

impl Problem {
    /// Some rows of a batch of one segment.
    fn rows_of_one_segment(&self, rows: Range<usize>) -> Self {
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        Self {
            segments: vec![Segment { rows: rows.len() as u32, ..self.segments[0] }],
            x: self.x[rows.start * d..rows.end * d].to_vec(),
            residual: self.residual[rows.start * k..rows.end * k].to_vec(),
            ..self.clone()
        }
    }
}
