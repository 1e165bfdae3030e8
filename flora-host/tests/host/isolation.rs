//! A row's bits depend on its own x and adapter alone, and an adapter's gradients on its own rows.

use flora_host::HostEngine;
use flora_ir::Activation;
use flora_plan::batch::{AdapterSlots, Segment};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use proptest::prelude::*;

use crate::gradients::{Found, chosen};
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
    if problem.format.weight.quantisation().is_some() {
        check_on(problem, &HostEngine::new().rounding_activations());
    }
}

/// The weight of one adapter resident.
fn check_merged(problem: &Problem) {
    for engine in HostEngine::all() {
        for own in problem.present().take(3) {
            check_plans(&problem.merged(own), &engine, [Plan::fixed(), Plan::MERGED]);
            check_others(problem, own, &engine);
        }
    }
}

/// The bits of rows of all other adapters are those that they have where nothing is merged.
fn check_others(problem: &Problem, own: usize, engine: &HostEngine) {
    let k = problem.shape.k as usize;
    for plan in Plan::unmerged() {
        let without = problem.run(engine, &plan).bits();
        let merged = problem.merged(own).run(engine, &plan.with_merged()).bits();
        let mut first = 0;
        for segment in &problem.segments {
            let rows = first..first + segment.rows as usize * k;
            first = rows.end;
            if segment.adapter as usize != own {
                assert_eq!(merged[rows.clone()], without[rows], "{plan}, {own} merged");
            }
        }
    }
}

fn check_on(problem: &Problem, engine: &HostEngine) {
    check_plans(problem, engine, Plan::unmerged().flat_map(|plan| [plan, plan.with_on_chip_from(4)]));
}

fn check_plans(problem: &Problem, engine: &HostEngine, plans: impl IntoIterator<Item = Plan>) {
    for plan in plans {
        let whole = problem.run(engine, &plan).bits();
        let mut first = 0;
        for (position, segment) in problem.segments.iter().enumerate() {
            let adapter = &problem.adapters[segment.adapter as usize];
            let rows = segment.rows as usize * problem.shape.k as usize;
            let expected = &whole[first..first + rows];
            assert_eq!(alone(problem, position).run(engine, &plan).bits(), expected, "{plan}, alone");
            // No weight is made of NaN, so that another adapter's resident one has none.
            if problem.resident(&plan).is_none_or(|own| own == segment.adapter as usize) {
                let poisoned = poisoned(problem, adapter).run(engine, &plan).bits();
                assert_eq!(&poisoned[first..first + rows], expected, "{plan}, beside NaN");
            }
            first += rows;
        }
    }
}

impl Problem {
    /// The first row of every segment.
    fn first_rows(&self) -> Vec<usize> {
        let rows = self.segments.iter().map(|segment| segment.rows as usize);
        rows.scan(0, |first, rows| Some(std::mem::replace(first, *first + rows))).collect()
    }

    /// The rows of an adapter, of values that have so many numbers a row.
    fn rows_of<T: Clone>(&self, adapter: usize, values: &[T], width: u32) -> Vec<T> {
        let segments = self.segments.iter().zip(self.first_rows());
        let own = segments.filter(|(segment, _)| segment.adapter as usize == adapter);
        let numbers = |(segment, first): (&Segment, usize)| {
            values[first * width as usize..(first + segment.rows as usize) * width as usize].to_vec()
        };
        own.flat_map(numbers).collect()
    }

    /// The segments of an adapter.
    fn of_adapter(&self, adapter: usize) -> Self {
        let own = self.segments.iter().filter(|segment| segment.adapter as usize == adapter);
        Self {
            segments: own.copied().collect(),
            x: self.rows_of(adapter, &self.x, self.shape.d),
            residual: self.rows_of(adapter, &self.residual, self.shape.k),
            ..self.clone()
        }
    }

    /// NaN in every row and every vector that isn't the adapter's.
    fn beside_nan(&self, adapter: usize) -> Self {
        let mut poisoned = poisoned(self, &self.adapters[adapter]);
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        for (segment, first) in self.segments.iter().zip(self.first_rows()) {
            if segment.adapter as usize != adapter {
                let rows = first..first + segment.rows as usize;
                poisoned.x[rows.start * d..rows.end * d].fill(f32::NAN);
                poisoned.residual[rows.start * k..rows.end * k].fill(f32::NAN);
            }
        }
        poisoned
    }
}

impl Found {
    /// The bits of an adapter's gradients.
    fn bits_of(&self, adapter: usize, problem: &Problem) -> Vec<u32> {
        let Some(own) = self.schedule.adapters().iter().find(|own| own.adapter as usize == adapter) else {
            return Vec::new();
        };
        let part = |vectors: &[f32], first: u32, count: u32, width: u32| {
            let (first, end) = (first as usize * width as usize, (first + count) as usize * width as usize);
            vectors[first..end].iter().map(|number| number.to_bits()).collect::<Vec<_>>()
        };
        let ins = part(&self.in_vectors, own.first_in, own.in_vectors(), problem.shape.d);
        let outs = part(&self.out_vectors, own.first_out, own.out_vectors(), problem.shape.k);
        [ins, outs].concat()
    }
}

/// Every adapter's gradients and rows of dx: in the batch, alone, beside NaN, and on other numbers of threads.
fn check_gradients(problem: &Problem, engine: &HostEngine) {
    let whole = problem.gradients(engine, &chosen());
    let dx = whole.dx.bits();
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let other = pool.install(|| problem.gradients(engine, &chosen()));
        assert_eq!(other.dx.bits(), dx, "{threads} threads");
        for adapter in 0..problem.adapters.len() {
            assert_eq!(other.bits_of(adapter, problem), whole.bits_of(adapter, problem), "{threads} threads");
        }
    }
    for adapter in 0..problem.adapters.len() {
        let (expected, expected_dx) = (whole.bits_of(adapter, problem), problem.rows_of(adapter, &dx, problem.shape.d));
        let alone = problem.of_adapter(adapter).gradients(engine, &chosen());
        assert_eq!(alone.bits_of(adapter, problem), expected, "adapter {adapter}, alone");
        assert_eq!(alone.dx.bits(), expected_dx, "adapter {adapter}, alone");
        let poisoned = problem.beside_nan(adapter).gradients(engine, &chosen());
        assert_eq!(poisoned.bits_of(adapter, problem), expected, "adapter {adapter}, beside NaN");
        let beside = problem.rows_of(adapter, &poisoned.dx.bits(), problem.shape.d);
        assert_eq!(beside, expected_dx, "adapter {adapter}, beside NaN");
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn other_rows_and_adapters_change_no_bit_of_a_gradient(
        d in 1u32..400,
        k in 1u32..200,
        activations in elements(),
        (_, weight) in prop::sample::select(WeightFormat::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let format = LayerFormat { activations, weight, ..LayerFormat::default() };
        let problem = Problem::new(LayerShape { d: weight.whole(d), k }, format, Epilogue::default(), seed);
        for engine in HostEngine::all() {
            check_gradients(&problem, &engine);
        }
    }
}

/// Segments that are cut, several of an adapter, of both lowerings; partial sums of several groups.
#[test]
fn gradients_of_long_batches_are_their_own() {
    for (shape, rows) in [(LayerShape { d: 150, k: 33 }, 700), (LayerShape { d: 1030, k: 2100 }, 60)] {
        let mut problem = Problem::new(shape, LayerFormat::default(), Epilogue::default(), 9);
        let mut random = fastrand::Rng::with_seed(9);
        problem.segments = (0..24).map(|at| Segment { rows: random.u32(0..rows / 6), adapter: at % 8 }).collect();
        problem.x = random_values(problem.tokens() * shape.d as usize, &mut random);
        problem.residual = random_values(problem.tokens() * shape.k as usize, &mut random);
        check_gradients(&problem, &HostEngine::new());
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn a_resident_weight_changes_no_bit_of_other_rows(
        d in 1u32..600,
        k in 1u32..70,
        activations in elements(),
        epilogue in epilogues(),
        (_, weight) in prop::sample::select(WeightFormat::ALL.to_vec()),
        seed in any::<u64>(),
    ) {
        let format = LayerFormat { activations, weight, ..LayerFormat::default() };
        check_merged(&Problem::new(LayerShape { d: weight.whole(d), k }, format, epilogue, seed));
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
    // Slices of bytes are longer, and so are those of pairs.
    for weight in [WeightFormat::Int8, WeightFormat::Q4_1, WeightFormat::Q6_K] {
        let format = LayerFormat { weight, ..LayerFormat::default() };
        check(&Problem::new(LayerShape { d: weight.whole(2100), k: 70 }, format, Epilogue::default(), 5));
    }
    for (d, k) in [(330, 600), (2112, 70)] {
        check(&Problem::new(LayerShape { d, k }, PAIRS, Epilogue::default(), 5));
    }
}

/// x and weight in pairs.
const PAIRS: LayerFormat = LayerFormat {
    activations: Element::Bf16,
    adapters: Element::F32,
    weight: WeightFormat::Float(Element::Bf16),
    fragments: true,
};

#[test]
fn blocks_of_rows_change_no_bit() {
    let finished = Epilogue { bias: true, activation: Activation::Silu, residual: true };
    // A depth of whole steps of the matrix unit, too: base rows are then read where they lie, in some of these batches.
    for (d, format, epilogue) in [
        (150, LayerFormat::default(), Epilogue::default()),
        (150, PAIRS, Epilogue::default()),
        (160, PAIRS, Epilogue::default()),
        (160, PAIRS, finished),
    ] {
        let shape = LayerShape { d, k: 33 };
        let mut problem = Problem::new(shape, format, epilogue, 9);
        // Blocks end within segments, far from their ends and near them.
        let rows = [3, 250, 20, 130, 170, 40, 300, 1, 47];
        let segment = |(at, rows)| Segment { rows, adapter: at as u32 % 8 };
        problem.segments = rows.into_iter().enumerate().map(segment).collect();
        let mut random = fastrand::Rng::with_seed(9);
        problem.x = random_values(problem.tokens() * shape.d as usize, &mut random);
        problem.residual = random_values(problem.tokens() * shape.k as usize, &mut random);
        check(&problem);
    }
}
