//! Gradients of random batches against those of the oracle, on sizes that are multiples of nothing.

use flora_host::{GradientsMut, HostEngine, Operands, Weight};
use flora_ir::Activation;
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_ir::gradient::FoldedGradient;
use flora_oracle::backward::{BatchGradient, BatchRows, backward};
use flora_plan::batch::{AdapterSlots, Segment};
use flora_plan::gradient::GradientLowering;
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::{BackwardSchedule, backward_schedule};
use proptest::prelude::*;

use crate::problem::{Numbers, Problem, config, elements, random_values};

/// What the engine makes of a batch.
pub(crate) struct Found {
    pub(crate) schedule: BackwardSchedule,
    pub(crate) dx: Numbers,
    pub(crate) in_vectors: Vec<f32>,
    pub(crate) out_vectors: Vec<f32>,
}

impl Problem {
    /// A gradient of the outputs, `[tokens, k]`.
    pub(crate) fn g(&self) -> &[f32] {
        &self.residual
    }

    pub(crate) fn gradients(&self, engine: &HostEngine, plan: &Plan) -> Found {
        let format = self.format;
        let schedule = backward_schedule(plan, self.shape, &self.segments, &self.adapters).unwrap();
        let numbers = |values: &[f32], element| Numbers::new(element, values);
        let (x, g) = (numbers(&self.x, format.activations), numbers(self.g(), format.activations));
        let (in_pool, out_pool) = (numbers(&self.in_pool, format.adapters), numbers(&self.out_pool, format.adapters));
        let weight = Weight::new(&self.weight);
        let operands = Operands {
            weight: &weight,
            bias: Some(&self.bias),
            in_pool: in_pool.values(),
            out_pool: out_pool.values(),
            epilogue: self.epilogue,
            merged: None,
        };
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        // What was there before must not matter.
        let mut dx = numbers(&vec![f32::NAN; self.tokens() * d], format.activations);
        let mut in_vectors = vec![f32::NAN; schedule.in_vectors() as usize * d];
        let mut out_vectors = vec![f32::NAN; schedule.out_vectors() as usize * k];
        let gradients =
            GradientsMut { input: Some(dx.values_mut()), vectors: Some([&mut in_vectors, &mut out_vectors]) };
        engine.backward(&operands, &schedule, x.values(), g.values(), gradients).unwrap();
        Found { schedule, dx, in_vectors, out_vectors }
    }

    /// The oracle's gradients of what `number` makes of every number of the batch.
    fn exact(&self, number: fn(f32) -> f32) -> BatchGradient {
        let of = |values: &[f32], element| -> Vec<f32> {
            Numbers::new(element, values).widened().into_iter().map(number).collect()
        };
        let (activations, adapters) = (self.format.activations, self.format.adapters);
        let (in_pool, out_pool) = (of(&self.in_pool, adapters), of(&self.out_pool, adapters));
        let weight: Vec<f32> = self.weight.to_f32().into_iter().map(number).collect();
        let folded: Vec<_> = self.adapters.iter().map(|slots| self.folded(slots, &in_pool, &out_pool)).collect();
        let batch = BatchRows {
            shape: self.shape,
            base_weight: &weight,
            bias: None,
            activation: Activation::Identity,
            x: &of(&self.x, activations),
            output_gradient: &of(self.g(), activations),
        };
        backward(&batch, &folded, &self.segments).unwrap()
    }

    fn folded(&self, slots: &AdapterSlots, in_pool: &[f32], out_pool: &[f32]) -> FoldedAdapter {
        let vector =
            |pool: &[f32], width: u32, slot: u32| pool[slot as usize * width as usize..][..width as usize].to_vec();
        let LayerShape { d, k } = self.shape;
        let rows = slots.virtual_rows.iter().map(|row| VirtualRow {
            in_scale: row.in_scale.map(|slot| vector(in_pool, d, slot)),
            out_scale: row.out_scale.map(|slot| vector(out_pool, k, slot)),
        });
        let pairs = (0..slots.low_rank.rank).map(|rank| RankOne {
            shrink: vector(in_pool, d, slots.low_rank.shrink + rank),
            expand: vector(out_pool, k, slots.low_rank.expand + rank),
        });
        FoldedAdapter { virtual_rows: rows.collect(), low_rank: pairs.collect(), ..FoldedAdapter::default() }
    }

    /// Asserts that gradients are the oracle's but for rounding.
    fn assert_gradients(&self, found: &Found, what: &str) {
        let (exact, magnitudes) = (self.exact(|number| number), self.exact(f32::abs));
        let LayerShape { d, k } = self.shape;
        let (d, k) = (d as usize, k as usize);
        let owners = self.segments.iter().flat_map(|segment| (0..segment.rows).map(|_| segment.adapter as usize));
        let dx = found.dx.widened();
        assert_eq!(dx.len(), exact.input.len());
        for (row, owner) in owners.enumerate() {
            let adapter = &self.adapters[owner];
            let sums = k + adapter.virtual_rows.len() + adapter.low_rank.rank as usize;
            let what = format!("{what}: dx of row {row} of adapter {owner}");
            let row = row * d..(row + 1) * d;
            let bound = Bound { sums, stored: self.format.activations };
            bound.assert(&what, &dx[row.clone()], &exact.input[row.clone()], &magnitudes.input[row]);
        }
        for (position, (exact, magnitudes)) in exact.adapters.iter().zip(&magnitudes.adapters).enumerate() {
            let own = self.segments.iter().filter(|segment| segment.adapter as usize == position);
            let rows = own.map(|segment| segment.rows as usize).sum::<usize>();
            let (in_exact, out_exact) = vectors(exact);
            let Some(gradient) = found.schedule.adapters().iter().find(|own| own.adapter as usize == position) else {
                assert!(rows == 0 || in_exact.is_empty() && out_exact.is_empty(), "{what}: no gradients of {position}");
                continue;
            };
            let (in_magnitudes, out_magnitudes) = vectors(magnitudes);
            let sides = [
                ("in", in_exact, in_magnitudes, &found.in_vectors, gradient.first_in as usize, d, k),
                ("out", out_exact, out_magnitudes, &found.out_vectors, gradient.first_out as usize, k, d),
            ];
            for (side, exact, magnitudes, found, first, width, summed) in sides {
                for (at, (exact, magnitudes)) in exact.iter().zip(magnitudes).enumerate() {
                    let what = format!("{what}: {side}-vector {at} of adapter {position}, by {}", gradient.lowering);
                    let bound = Bound { sums: rows + summed + TASKS, stored: Element::F32 };
                    bound.assert(&what, &found[(first + at) * width..][..width], exact, magnitudes);
                }
            }
        }
    }
}

/// The most sums of tasks that are added up.
pub(crate) const TASKS: usize = 32;

/// How far a gradient may be off. It is a sum of products p, each of which is rounded n times on its way: once for each of the sums
/// that it goes through, one extent after the other, and up to eight times for scales and weights. n roundings are a random walk, so
/// that the gradient is off by u·√n·Σ|p| at one standard deviation, of which four are allowed, as in the forward pass. Σ|p| is the
/// oracle's gradient of the numbers' magnitudes. What is stored in another type than f32 is rounded once more.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub(crate) sums: usize,
    pub(crate) stored: Element,
}

impl Bound {
    pub(crate) fn assert(self, what: &str, found: &[f32], exact: &[f64], magnitudes: &[f64]) {
        assert!(found.len() == exact.len() && found.len() == magnitudes.len(), "{what}: {} numbers", found.len());
        let unit = f64::from(f32::EPSILON) / 2.0 * ((self.sums + 8) as f64).sqrt();
        // f16 has a least number too.
        let (stored, least) =
            if self.stored == Element::F32 { (0.0, 0.0) } else { (1.001 * self.stored.rounding(), 3e-8) };
        for (at, ((found, exact), magnitude)) in found.iter().zip(exact).zip(magnitudes).enumerate() {
            let error = (f64::from(*found) - exact).abs();
            let allowed = 4.0 * unit * magnitude + stored * exact.abs() + least;
            assert!(error <= allowed, "{what}, number {at}: {found} not {exact}, {error} > {allowed} of {magnitude}");
        }
    }
}

/// The gradients of in-vectors and of out-vectors, in the order of an adapter's vectors.
pub(crate) fn vectors(gradient: &FoldedGradient) -> (Vec<&Vec<f64>>, Vec<&Vec<f64>>) {
    let in_scales = gradient.virtual_rows.iter().filter_map(|row| row.in_scale.as_ref());
    let out_scales = gradient.virtual_rows.iter().filter_map(|row| row.out_scale.as_ref());
    (
        in_scales.chain(gradient.low_rank.iter().map(|pair| &pair.shrink)).collect(),
        out_scales.chain(gradient.low_rank.iter().map(|pair| &pair.expand)).collect(),
    )
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn gradients_are_the_oracles(
        d in 1u32..400,
        k in 1u32..90,
        activations in elements(),
        adapters in elements(),
        (_, weight) in prop::sample::select(WeightFormat::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let shape = LayerShape { d: weight.whole(d), k };
        let format = LayerFormat { activations, adapters, weight, ..LayerFormat::default() };
        let problem = Problem::new(shape, format, Epilogue::default(), seed);
        for engine in HostEngine::all() {
            for plan in [Plan::default(), chosen()] {
                problem.assert_gradients(&problem.gradients(&engine, &plan), &format!("{format}, {plan}, {}", engine.vectors()));
            }
        }
    }
}

/// As projections choose.
pub(crate) fn chosen() -> Plan {
    use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
    Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(4)
}

#[test]
fn every_format_has_gradients() {
    for (at, (name, weight)) in WeightFormat::ALL.into_iter().enumerate() {
        let shape = LayerShape { d: weight.whole(300), k: 70 };
        let problem =
            Problem::new(shape, LayerFormat { weight, ..LayerFormat::default() }, Epilogue::default(), at as u64);
        for plan in Plan::unmerged() {
            problem.assert_gradients(&problem.gradients(&HostEngine::new(), &plan), &format!("{name}, {plan}"));
        }
    }
}

#[test]
fn gradients_of_long_batches_wide_panels_and_several_slices() {
    let engine = HostEngine::new();
    let cases = [
        (65, 777, 530, 1),
        (300, 290, 2, 2),
        (13, 1030, 14, 3),
        (257, 33, 2300, 4),
        (2100, 40, 33, 5),
        (40, 2100, 33, 6),
    ];
    for (d, k, rows, seed) in cases {
        let mut problem = Problem::new(LayerShape { d, k }, LayerFormat::default(), Epilogue::default(), seed);
        let segments = (0..16).map(|at| Segment { rows: rows / 16 + u32::from(at < rows % 16), adapter: at % 8 });
        problem.segments = segments.collect();
        let mut random = fastrand::Rng::with_seed(seed);
        problem.x = random_values(problem.tokens() * d as usize, &mut random);
        problem.residual = random_values(problem.tokens() * k as usize, &mut random);
        problem.assert_gradients(&problem.gradients(&engine, &chosen()), &format!("[{d}, {k}], {rows} rows"));
    }
}

#[test]
fn both_lowerings_are_taken() {
    let mut taken = Vec::new();
    for seed in 0..8 {
        let problem = Problem::new(LayerShape { d: 9, k: 11 }, LayerFormat::default(), Epilogue::default(), seed);
        let schedule = backward_schedule(&chosen(), problem.shape, &problem.segments, &problem.adapters).unwrap();
        taken
            .extend(schedule.adapters().iter().filter(|adapter| !adapter.in_scales.is_empty()).map(|own| own.lowering));
    }
    assert!(taken.contains(&GradientLowering::Reduced) && taken.contains(&GradientLowering::Outer), "{taken:?}");
}

#[test]
fn an_empty_batch_has_no_gradients() {
    let mut problem = Problem::new(LayerShape { d: 5, k: 7 }, LayerFormat::default(), Epilogue::default(), 1);
    problem.segments = vec![Segment { rows: 0, adapter: 3 }];
    (problem.x, problem.residual) = (Vec::new(), Vec::new());
    let found = problem.gradients(&HostEngine::new(), &chosen());
    assert!(found.dx.widened().is_empty() && found.in_vectors.is_empty() && found.out_vectors.is_empty());
}
