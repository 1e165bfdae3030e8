//! The layer that gives an input's gradient, by the host's kernels: one batch of every kind of adapter and base rows, over w0ᵀ and
//! with the folded vectors of the forward pass exchanged, against its equation in f64.

use flora_ir::algebra::FoldedAdapter;
use flora_ir::{Activation, Bindings, Dimension, Shape, Value, builtin};
use flora_oracle::{Sample, check};
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::pipeline::{CompiledLayer, compile_verified};
use flora_plan::plan::Plan;
use flora_runtime::{Batch, Projection};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

/// An adapter of a built-in layer.
struct Adapter {
    name: String,
    adjoint: CompiledLayer,
    operands: Bindings,
    /// As the forward pass has it.
    folded: FoldedAdapter,
    rows: u32,
}

impl Adapter {
    fn new(kind: &str, rank: usize, [d, k]: [usize; 2], w0: &[f32], random: &mut fastrand::Rng) -> Self {
        let layer = compile_verified(builtin::builtin(kind).expect(kind).clone()).expect(kind);
        let mut operands = Bindings::new();
        for (_, operand) in layer.written.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters()) {
            let extent = |dimension: &Dimension| match dimension.to_string().as_str() {
                "D" => d,
                "K" => k,
                _ => rank,
            };
            let mut numbers = |count| (0..count).map(|_| random.f64() * 2.0 - 1.0).collect::<Vec<_>>();
            let value = match &operand.ty.shape {
                Shape::Scalar => Value::scalar(0.5),
                Shape::Vector(n) => Value::vector(numbers(extent(n))),
                Shape::Matrix(m, n) => {
                    Value::matrix(extent(m), extent(n), numbers(extent(m) * extent(n))).expect("as many")
                }
            };
            operands.insert(operand.name.clone(), value);
        }
        let mut bindings = operands.clone();
        let w0 = w0.iter().map(|weight| f64::from(*weight)).collect();
        bindings.insert("w0", Value::matrix(d, k, w0).expect("as many"));
        let folded = layer.linear.fold(&bindings).expect(kind);
        let adjoint = layer.gradient().expect(kind).adjoint;
        Self { name: format!("{kind} {rank}"), adjoint, operands, folded, rows: random.u32(1..9) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 12,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_gradient_of_the_input_is_a_layer_like_any_other(d in 1usize..70, k in 1usize..70, seed in any::<u64>()) {
        let mut random = fastrand::Rng::with_seed(seed);
        let w0: Vec<f32> = (0..d * k).map(|_| random.f32() * 2.0 - 1.0).collect();
        let transposed: Vec<f32> = (0..d * k).map(|index| w0[index % d * k + index / d]).collect();
        // `linear` has base rows.
        let adapters: Vec<Adapter> =
            builtin::names().map(|kind| Adapter::new(kind, random.usize(1..9), [d, k], &w0, &mut random)).collect();
        let exchanged: Vec<_> = adapters.iter().map(|adapter| adapter.folded.adjoint()).collect();
        let shape = LayerShape { d: k as u32, k: d as u32 };
        let device = flora_host::device();
        let mut projection = Projection::new(&device, shape, &transposed, None, Activation::Identity).unwrap();
        projection.load(adapters.iter().zip(&exchanged).map(|(adapter, vectors)| (&*adapter.name, Some(vectors)))).unwrap();
        let batch = Batch::new(adapters.iter().map(|adapter| (Some(&*adapter.name), adapter.rows)));
        let rows = adapters.iter().map(|adapter| adapter.rows as usize).sum::<usize>();
        let g: Vec<f32> = (0..rows * k).map(|_| random.f32() * 2.0 - 1.0).collect();
        let columns: Vec<usize> = (0..d).collect();
        for plan in Plan::unmerged() {
            let dx = projection.forward(&batch, &plan, &g).unwrap();
            let mut row = 0;
            for (adapter, folded) in adapters.iter().zip(&exchanged) {
                for _ in 0..adapter.rows {
                    let sample = Sample {
                        shape,
                        format: LayerFormat::default(),
                        base_weight: &transposed,
                        bias: None,
                        activation: Activation::Identity,
                        residual: None,
                        x: &g[row * k..][..k],
                        y: &dx[row * d..][..d],
                        columns: &columns,
                    };
                    let deviation = check(&adapter.adjoint.written, &adapter.operands, folded, &sample).unwrap();
                    prop_assert!(deviation.is_rounding(), "{} by {}: {:?}", adapter.name, plan, deviation);
                    row += 1;
                }
            }
        }
    }
}
