//! Adapters of sparse matrices, before the base weight, behind it and beside it, in batches with all others: against the oracle,
//! with every epilogue; and rows that keep their bits in any company.

use flora_ir::algebra::FoldedAdapter;
use flora_ir::{Activation, Bindings, Dimension, Role, Shape, SparseMatrix, Value, parse, verify};
use flora_oracle::{Sample, check};
use flora_plan::layer::{Element, LayerShape, WeightFormat};
use flora_plan::pipeline::{CompiledLayer, compile_verified};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Batch, PlannedProjection, Planning, Projection, ProjectionError, ProjectionOptions, StepBatch, Wanted,
};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn random_values(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    (0..count).map(|_| random.f32() - 0.5).collect()
}

/// What adapters compute; the base first.
const EQUATIONS: [&str; 10] = [
    "x @ w0",
    "x @ (w0 + s)",
    "x @ (t @ w0)",
    "x @ (w0 @ o)",
    "m * ((l * x) @ (t @ w0))",
    "x @ (w0 + c * (p @ q))",
    "m * (((l * x) @ w0) @ o) + x @ s + (x @ p) @ q",
    "x @ (w0 + b @ a)",
    "m * (x @ w0)",
    "x @ (w0 * (b @ a)) + x @ (s + s * s)",
];

fn layer(equation: &str) -> CompiledLayer {
    let operands = [
        "x: input[tokens, D]",
        "w0: weight[D, K]",
        "s: sparse[D, K]",
        "t: sparse[D, D]",
        "o: sparse[K, K]",
        "p: sparse[D, R]",
        "q: sparse[R, K]",
        "b: adapter[D, R]",
        "a: adapter[R, K]",
        "l: adapter[D]",
        "m: adapter[K]",
        "c: adapter[]",
    ];
    let words: Vec<&str> = equation.split(|letter: char| !letter.is_alphanumeric()).collect();
    let used = operands.into_iter().filter(|operand| words.contains(&operand.split(':').next().unwrap_or_default()));
    let source = format!("layer f({}) {{ {equation} }}", used.collect::<Vec<_>>().join(", "));
    compile_verified(verify(parse(&source).unwrap()).unwrap()).unwrap()
}

/// One adapter with its equation and its tensors.
struct Own {
    layer: CompiledLayer,
    operands: Bindings,
    folded: FoldedAdapter,
}

fn own(equation: &str, (d, k): (usize, usize), rank: usize, random: &mut fastrand::Rng) -> Own {
    let layer = layer(equation);
    let extent = |dimension: &Dimension| match dimension.to_string().as_str() {
        "D" => d,
        "K" => k,
        _ => rank,
    };
    let mut operands = Bindings::new();
    for (_, operand) in layer.written.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters()) {
        let is_sparse = operand.role == Role::Sparse;
        let mut numbers = |count| {
            let mut number = || if is_sparse && random.u8(0..4) > 0 { 0.0 } else { random.f64() - 0.5 };
            (0..count).map(|_| number()).collect::<Vec<_>>()
        };
        match &operand.ty.shape {
            Shape::Scalar => operands.insert(operand.name.clone(), Value::scalar(0.7)),
            Shape::Vector(n) => operands.insert(operand.name.clone(), Value::vector(numbers(extent(n)))),
            Shape::Matrix(m, n) => {
                let (m, n) = (extent(m), extent(n));
                let dense = Value::matrix(m, n, numbers(m * n)).unwrap();
                match is_sparse {
                    true => operands.insert_sparse(operand.name.clone(), SparseMatrix::of_dense(m, n, dense.data())),
                    false => operands.insert(operand.name.clone(), dense),
                }
            }
        };
    }
    let mut bound = operands.clone();
    bound.insert_extent(Dimension::Symbol("K".to_owned()), k);
    let folded = layer.linear.fold(&bound).unwrap();
    // The oracle looks operands up by name.
    let dense = |(name, value): (&str, &SparseMatrix<f64>)| {
        let [rows, columns] = value.shape();
        (name.to_owned(), Value::matrix(rows, columns, value.to_dense()).unwrap())
    };
    let sparse: Vec<_> = ["s", "t", "o", "p", "q"]
        .into_iter()
        .filter_map(|name| operands.get_sparse(name).map(|matrix| dense((name, matrix))))
        .collect();
    sparse.into_iter().for_each(|(name, value)| {
        operands.insert(name, value);
    });
    Own { layer, operands, folded }
}

fn planned(packed: &PackedWeight, owns: &[Own], options: ProjectionOptions<'_>, plan: Plan) -> PlannedProjection {
    let planned = PlannedProjection::new(&flora_host::device(), packed, options, Planning::Fixed(plan)).unwrap();
    planned.change(|projection| {
        projection.reserve(256, 256).unwrap();
        for (at, own) in owns.iter().enumerate().skip(1) {
            projection.place(at as u32, &own.folded).unwrap();
        }
    });
    planned
}

fn run(planned: &PlannedProjection, segments: &[(u32, u32)], x: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
    let upload = |values: &[f32]| planned.device().upload_as(values, planned.activations()).unwrap();
    let residual = residual.map(upload);
    let y = planned.forward(&upload(x), &StepBatch::new(segments.iter().copied()), residual.as_ref()).unwrap();
    planned.device().read(&y).unwrap()
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn rows_are_the_oracles_and_keep_their_bits(
        d in 1u32..70,
        k in 1u32..70,
        element in prop::sample::select(Element::ALL.to_vec()),
        (has_bias, has_residual) in (any::<bool>(), any::<bool>()),
        activation in prop::sample::select(vec![Activation::Identity, Activation::Identity, Activation::Relu, Activation::Silu]),
        plan in prop::sample::select(Plan::unmerged().collect::<Vec<_>>()),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let shape = LayerShape { d, k };
        let (d, k) = (d as usize, k as usize);
        let packed = PackedWeight::from_f32(WeightFormat::Float(element), shape, &random_values(d * k, &mut random)).unwrap();
        let base_weight = packed.to_f32();
        let bias = has_bias.then(|| random_values(k, &mut random));
        let owns = EQUATIONS.map(|equation| own(equation, (d, k), 3, &mut random));
        let options = ProjectionOptions {
            bias: bias.as_deref(),
            activation,
            residual: has_residual,
            activations: element,
            adapters: element,
            ..ProjectionOptions::default()
        };
        let planned = planned(&packed, &owns, options, plan);
        let count = owns.len() as u32;
        let mut segments: Vec<(u32, u32)> = (0..count).chain(0..count).map(|at| (at, random.u32(0..7))).collect();
        random.shuffle(&mut segments);
        let rows: usize = segments.iter().map(|(_, rows)| *rows as usize).sum();
        let mut rounded = |count| random_values(count, &mut random).into_iter().map(|number| element.round(number)).collect::<Vec<_>>();
        let x = rounded(rows * d);
        let residual = has_residual.then(|| rounded(rows * k));
        let y = run(&planned, &segments, &x, residual.as_deref());
        prop_assert_eq!(y.len(), rows * k);
        let columns: Vec<usize> = (0..k).collect();
        let mut row = 0;
        for (at, count) in &segments {
            let (own, first) = (&owns[*at as usize], row);
            for row in row..row + *count as usize {
                let sample = Sample {
                    shape,
                    format: planned.change(|projection| projection.format()),
                    base_weight: &base_weight,
                    bias: bias.as_deref(),
                    activation,
                    residual: residual.as_ref().map(|residual| &residual[row * k..][..k]),
                    x: &x[row * d..][..d],
                    y: &y[row * k..][..k],
                    columns: &columns,
                };
                let deviation = check(&own.layer.written, &own.operands, &own.folded, &sample).unwrap();
                prop_assert!(deviation.is_rounding(), "{}: {deviation:?}", EQUATIONS[*at as usize]);
            }
            row += *count as usize;
            // Half types are written once more where others' low-rank sums are added behind the launch.
            if element == Element::F32 {
                let residual = residual.as_ref().map(|residual| &residual[first * k..row * k]);
                let alone = run(&planned, &[(*at, *count)], &x[first * d..row * d], residual);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(&alone), bits(&y[first * k..row * k]), "{}", EQUATIONS[*at as usize]);
            }
        }
    }
}

/// Whoever runs a batch does what its adapters do, or refuses it.
#[test]
fn nobody_leaves_sparse_matrices_out() {
    let mut random = fastrand::Rng::with_seed(5);
    let (shape, d, k) = (LayerShape { d: 7, k: 5 }, 7, 5);
    let packed = PackedWeight::from_f32(WeightFormat::default(), shape, &random_values(d * k, &mut random)).unwrap();
    let owns = EQUATIONS.map(|equation| own(equation, (d, k), 2, &mut random));
    let planned = planned(&packed, &owns, ProjectionOptions::default(), Plan::default());
    let x = random_values(3 * d, &mut random);
    let expected = run(&planned, &[(0, 1), (6, 2)], &x, None);

    let mut projection = Projection::from_packed(&flora_host::device(), &packed, ProjectionOptions::default()).unwrap();
    projection.load([("own", Some(&owns[6].folded))]).unwrap();
    let batch = Batch::new([(None, 1), (Some("own"), 2)]);
    assert_eq!(projection.forward(&batch, &Plan::default(), &x).unwrap(), expected);
    assert!(matches!(projection.schedule(&batch, &Plan::default()), Err(ProjectionError::SparseSchedule)));
    assert!(projection.schedule(&Batch::new([(None, 3)]), &Plan::default()).is_ok());
    assert!(projection.sparse_bytes() as usize == owns[6].folded.sparse.bytes() && projection.sparse_bytes() > 0);

    let upload = |values: &[f32]| planned.device().upload(values).unwrap();
    let backward = |position| {
        planned.backward(
            &StepBatch::new([(position, 3)]),
            &upload(&x),
            &upload(&random_values(3 * k, &mut random.clone())),
            Wanted::All,
        )
    };
    assert!(matches!(backward(6), Err(ProjectionError::SparseBackward)));
    assert!(backward(7).is_ok());

    // One of another size is refused, and one that is gone leaves nothing.
    let wide = own(EQUATIONS[1], (d, k + 1), 2, &mut random);
    let refused = planned.change(|projection| projection.place(40, &wide.folded));
    assert!(matches!(refused, Err(ProjectionError::Sparse(_))), "{refused:?}");
    planned.change(|projection| projection.remove(6));
    assert_eq!(run(&planned, &[(6, 3)], &x, None), run(&planned, &[(0, 3)], &x, None));
    let short = planned.forward(&upload(&x[..d]), &StepBatch::new([(2, 3)]), None);
    assert!(matches!(short, Err(ProjectionError::Batch(_))));
}

/// An adapter whose entries are all NaN reaches its own rows alone, by way of every epilogue.
#[test]
fn nan_stays_with_its_adapter() {
    let mut random = fastrand::Rng::with_seed(6);
    let (shape, d, k) = (LayerShape { d: 19, k: 23 }, 19, 23);
    let packed = PackedWeight::from_f32(WeightFormat::default(), shape, &random_values(d * k, &mut random)).unwrap();
    let mut owns = EQUATIONS.map(|equation| own(equation, (d, k), 2, &mut random));
    let segments: Vec<(u32, u32)> = (0..10).chain(0..10).map(|at| (at, 3)).collect();
    let (x, residual) = (random_values(60 * d, &mut random), random_values(60 * k, &mut random));
    for (activation, residual) in
        [(Activation::Identity, None), (Activation::Identity, Some(&residual[..])), (Activation::Silu, None)]
    {
        let options = || ProjectionOptions { activation, residual: residual.is_some(), ..ProjectionOptions::default() };
        let clean = run(&planned(&packed, &owns, options(), Plan::default()), &segments, &x, residual);
        for poisoned in [1, 2, 3, 6] {
            let kept = owns[poisoned].folded.clone();
            let sparse = &mut owns[poisoned].folded.sparse;
            *sparse = sparse.map(|matrix| matrix.map(|_, _, _| f32::NAN));
            let found = run(&planned(&packed, &owns, options(), Plan::default()), &segments, &x, residual);
            owns[poisoned].folded = kept;
            for ((at, _), (clean, found)) in segments.iter().zip(clean.chunks(3 * k).zip(found.chunks(3 * k))) {
                match *at as usize == poisoned {
                    true => assert!(found.iter().any(|value| value.is_nan())),
                    false => assert_eq!(clean, found, "{at} beside {poisoned}"),
                }
            }
        }
    }
}
