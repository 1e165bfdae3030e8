//! Layers under Burn's autodiff: gradients are those of the equations in f64, for every kind of adapter and a layer that no builtin
//! has, over frozen weights of several formats; a few steps lower a loss; blocks that are computed again give the same bits.

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData};
use flora_burn::{AdaptedLinear, AdapterParameters, BurnDevice, Host, LinearError, Planning, StepBatch, recomputed};
use flora_ir::gradient::differentiate;
use flora_ir::{Activation, Bindings, Dimension, Role, Shape, Value, VerifiedLayer, builtin, parse, verify};
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::pipeline::{CompiledLayer, compile_verified};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::ProjectionOptions;

type Trained = Autodiff<Host>;

const D: usize = 37;
const K: usize = 29;
const ROWS: usize = 11;

fn numbers(count: usize, random: &mut fastrand::Rng) -> Vec<f64> {
    (0..count).map(|_| f64::from(random.f32() * 2.0 - 1.0)).collect()
}

fn matrix(rows: usize, columns: usize, numbers: &[f32]) -> Value {
    Value::matrix(rows, columns, numbers.iter().map(|number| f64::from(*number)).collect()).unwrap()
}

/// An adapter's operands, and the base weight.
fn operands(layer: &VerifiedLayer, rank: usize, w0: &Value, random: &mut fastrand::Rng) -> Bindings {
    let mut bindings = Bindings::new();
    for (_, operand) in layer.layer().operands.iter() {
        let extent = |dimension: &Dimension| match dimension.to_string().as_str() {
            "D" => D,
            "K" => K,
            _ => rank,
        };
        let value = match (operand.role, &operand.ty.shape) {
            (Role::BaseWeight, _) => w0.clone(),
            (Role::Adapter, Shape::Scalar) => Value::scalar(0.5),
            (Role::Adapter, Shape::Vector(n)) => Value::vector(numbers(extent(n), random)),
            (Role::Adapter, Shape::Matrix(m, n)) => {
                Value::matrix(extent(m), extent(n), numbers(extent(m) * extent(n), random)).unwrap()
            }
            _ => continue,
        };
        bindings.insert(operand.name.clone(), value);
    }
    bindings
}

/// Every built-in adapter, and one that none is.
fn layers() -> Vec<CompiledLayer> {
    let own = "layer own(x: input[tokens, D], w0: weight[D, K], s: adapter[D], a: adapter[R, K], b: adapter[D, R], c: adapter[K]) {
        ((x * s) @ (w0 * (b @ a))) * c + x @ w0
    }";
    let names = builtin::names().filter(|name| *name != "linear");
    let built_in = names.map(|name| compile_verified(builtin::builtin(name).unwrap().clone()).unwrap());
    built_in.chain([compile_verified(verify(parse(own).unwrap()).unwrap()).unwrap()]).collect()
}

fn layer(weight: &PackedWeight, activation: Activation) -> AdaptedLinear<Trained> {
    let device = BurnDevice::<Host>::open(&Default::default()).unwrap();
    let options = ProjectionOptions { activation, ..ProjectionOptions::default() };
    let projection = flora_runtime::Projection::from_packed(&device.flora, weight, options).unwrap();
    AdaptedLinear::from_projection(projection, Planning::Fixed(Plan::default()))
}

fn weight(format: WeightFormat, random: &mut fastrand::Rng) -> PackedWeight {
    let shape = LayerShape { d: D as u32, k: K as u32 };
    let numbers: Vec<f32> = (0..D * K).map(|_| random.f32() * 2.0 - 1.0).collect();
    PackedWeight::from_f32(format, shape, &numbers).unwrap()
}

fn tensor<const N: usize>(numbers: &[f32], shape: [usize; N]) -> Tensor<Trained, N> {
    Tensor::from_data(TensorData::new(numbers.to_vec(), shape), &Default::default())
}

fn random_values(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    (0..count).map(|_| random.f32() * 2.0 - 1.0).collect()
}

/// f32 sums of at most so many products on their way: four standard deviations, of the sum of magnitudes where one is known, and else
/// of the largest number.
fn close(what: &str, found: &[f32], exact: &[f64]) {
    assert_eq!(found.len(), exact.len(), "{what}");
    let largest = exact.iter().fold(0.0f64, |most, number| most.max(number.abs()));
    let steps = (4 * (D + K + ROWS)) as f64;
    for (found, exact) in found.iter().zip(exact) {
        let error = (f64::from(*found) - exact).abs();
        let allowed = 4.0 * f64::from(f32::EPSILON) / 2.0 * steps.sqrt() * 4.0 * largest;
        assert!(error <= allowed, "{what}: {found} is not {exact}, {error} > {allowed}");
    }
}

fn values<const N: usize>(tensor: Tensor<Host, N>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

#[test]
fn gradients_are_those_of_the_equations() {
    for (at, compiled) in layers().iter().enumerate() {
        for format in [WeightFormat::default(), WeightFormat::Int8] {
            let mut random = fastrand::Rng::with_seed(at as u64);
            let weight = weight(format, &mut random);
            let w0 = matrix(D, K, &weight.to_f32());
            let bindings = operands(&compiled.written, 3, &w0, &mut random);
            let layer = layer(&weight, Activation::Identity);
            let parameters = AdapterParameters::<Trained>::new(compiled, &bindings, &Default::default()).unwrap();
            let (x, c) = (random_values(ROWS * D, &mut random), random_values(ROWS * K, &mut random));

            // Rows of the base around the adapter's two segments.
            let batch = StepBatch::new([(0, 2), (1, 3), (0, 1), (1, 5)]);
            let input = tensor(&x, [ROWS, D]).require_grad();
            let y = layer.forward_trained(input.clone(), &batch, &[(1, &parameters)]).unwrap();
            let gradients = (y * tensor(&c, [ROWS, K])).sum().backward();

            let name = &compiled.written.layer().name;
            let own = [2..5, 6..11].map(|rows| rows.collect::<Vec<_>>()).concat();
            let rows_of = |all: &[f32], width: usize| {
                own.iter().flat_map(|row| all[row * width..][..width].to_vec()).collect::<Vec<_>>()
            };
            // A parameter is f32.
            let mut exact = parameters.bindings().unwrap();
            let written = compiled.written.layer();
            for (_, operand) in written.operands.iter() {
                match operand.role {
                    Role::Input => exact.insert(operand.name.clone(), matrix(own.len(), D, &rows_of(&x, D))),
                    Role::BaseWeight => exact.insert(operand.name.clone(), w0.clone()),
                    _ => &mut exact,
                };
            }
            let exact =
                differentiate(&compiled.written).evaluate(&exact, &matrix(own.len(), K, &rows_of(&c, K))).unwrap();
            for ((operand, _), parameter) in parameters.names().zip(&parameters.operands) {
                let found = values(parameter.val().grad(&gradients).expect("it requires one"));
                close(&format!("{name} {operand} over {format}"), &found, exact.get(operand).unwrap().data());
            }
            let dx = values(input.grad(&gradients).expect("it requires one"));
            let input = written.operands.iter().find(|(_, operand)| operand.role == Role::Input).unwrap().1;
            close(&format!("{name} x over {format}"), &rows_of(&dx, D), exact.get(&input.name).unwrap().data());
        }
    }
}

#[test]
fn what_the_layer_holds_later_changes_no_gradient() {
    let mut random = fastrand::Rng::with_seed(5);
    let weight = weight(WeightFormat::default(), &mut random);
    let (w0, layer) = (matrix(D, K, &weight.to_f32()), layer(&weight, Activation::Identity));
    let layers = layers();
    let parameters = |at: usize, random: &mut fastrand::Rng| {
        let bindings = operands(&layers[at].written, 2, &w0, random);
        AdapterParameters::<Trained>::new(&layers[at], &bindings, &Default::default()).unwrap()
    };
    let (one, other) = (parameters(0, &mut random), parameters(1, &mut random));
    let x = tensor(&random_values(ROWS * D, &mut random), [ROWS, D]);
    let batch = StepBatch::new([(1, ROWS as u32)]);
    let gradient = |disturb: bool| {
        let y = layer.forward_trained(x.clone(), &batch, &[(1, &one)]).unwrap();
        if disturb {
            let _ = layer.forward_trained(x.clone(), &batch, &[(1, &other)]).unwrap();
            layer.change(|projection| projection.remove(1));
        }
        let gradients = y.powi_scalar(2).sum().backward();
        one.operands.iter().map(|own| values(own.val().grad(&gradients).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(gradient(false), gradient(true));
}

/// Adapters of two kinds learn what two others do, in one batch, by plain descent.
#[test]
fn steps_lower_the_loss() {
    let mut random = fastrand::Rng::with_seed(9);
    let weight = weight(WeightFormat::Int8, &mut random);
    let w0 = matrix(D, K, &weight.to_f32());
    let layer = layer(&weight, Activation::Identity);
    let layers = layers();
    let kinds: Vec<_> =
        layers.iter().filter(|layer| ["flora", "lora"].contains(&&*layer.written.layer().name)).collect();
    let parameters = |random: &mut fastrand::Rng| -> Vec<AdapterParameters<Trained>> {
        let made = kinds.iter().map(|layer| {
            let bindings = operands(&layer.written, 2, &w0, random);
            AdapterParameters::new(layer, &bindings, &Default::default()).unwrap()
        });
        made.collect()
    };
    let (target, mut own) = (parameters(&mut random), parameters(&mut random));
    let batch = StepBatch::new([(1, 6), (2, 5)]);
    let x = tensor(&random_values(ROWS * D, &mut random), [ROWS, D]);
    let forward = |own: &[AdapterParameters<Trained>]| {
        layer.forward_trained(x.clone(), &batch, &[(1, &own[0]), (2, &own[1])]).unwrap()
    };
    let wanted = forward(&target).detach();
    let mut losses = Vec::new();
    for _ in 0..60 {
        let loss = (forward(&own) - wanted.clone()).powi_scalar(2).mean();
        let gradients = loss.backward();
        losses.push(values(loss.inner())[0]);
        for parameter in own.iter_mut().flat_map(|own| &mut own.operands) {
            let gradient = parameter.val().grad(&gradients).unwrap();
            *parameter = parameter
                .clone()
                .map(|value| Tensor::from_inner(value.inner() - gradient.clone().mul_scalar(0.3)).require_grad());
        }
    }
    assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn blocks_that_are_computed_again_give_the_same_bits() {
    let mut random = fastrand::Rng::with_seed(3);
    let shape = LayerShape { d: D as u32, k: D as u32 };
    let layers = layers();
    let mut block = || {
        let weight =
            PackedWeight::from_f32(WeightFormat::default(), shape, &random_values(D * D, &mut random)).unwrap();
        let kind = layers.iter().find(|layer| layer.written.layer().name == "flora").unwrap();
        let mut bindings = Bindings::new();
        for (_, operand) in kind.written.layer().operands.iter().filter(|(_, operand)| operand.role == Role::Adapter) {
            let Shape::Matrix(m, n) = &operand.ty.shape else { continue };
            let [m, n] = [m, n].map(|extent| if extent.to_string() == "R" { 2 } else { D });
            bindings.insert(operand.name.clone(), Value::matrix(m, n, numbers(m * n, &mut random)).unwrap());
        }
        let own = AdapterParameters::<Trained>::new(kind, &bindings, &Default::default()).unwrap();
        (layer(&weight, Activation::Identity), own)
    };
    let blocks = [block(), block(), block()];
    let batch = StepBatch::new([(1, ROWS as u32)]);
    let run = |at: usize, x: Tensor<Trained, 2>| {
        let (layer, own) = &blocks[at];
        burn::tensor::activation::silu(layer.forward_trained(x, &batch, &[(1, own)]).unwrap())
    };
    let x = tensor(&random_values(ROWS * D, &mut random), [ROWS, D]);
    let loss = |y: Tensor<Trained, 2>| y.powi_scalar(2).mean();

    let at_once = loss(run(2, run(1, run(0, x.clone()))));
    let gradients = at_once.backward();
    let [first, second, third] = [0, 1, 2].map(|at| move |x: Tensor<Trained, 2>| (at, x));
    let again = recomputed(
        x.inner(),
        &[
            &|x| {
                let (at, x) = first(x);
                run(at, x)
            },
            &|x| {
                let (at, x) = second(x);
                run(at, x)
            },
            &|x| {
                let (at, x) = third(x);
                run(at, x)
            },
        ],
        loss,
    );
    assert_eq!(values(again.loss), values(at_once.inner()));
    assert_eq!(again.gradients.len(), 4);
    for (at, (_, own)) in blocks.iter().enumerate() {
        for operand in &own.operands {
            let (one, other) = (operand.val().grad(&gradients), operand.val().grad(&again.gradients[at]));
            assert_eq!(values(one.unwrap()), values(other.unwrap()), "block {at}");
        }
    }
}

#[test]
fn what_has_no_gradient_is_refused() {
    let mut random = fastrand::Rng::with_seed(1);
    let weight = weight(WeightFormat::default(), &mut random);
    let x = || tensor(&[0.0; ROWS * D], [ROWS, D]);
    let batch = StepBatch::new([(0, ROWS as u32)]);
    let refused = layer(&weight, Activation::Silu).forward_trained(x(), &batch, &[]).unwrap_err();
    assert!(matches!(refused, LinearError::Finishes), "{refused:?}");
    let short = layer(&weight, Activation::Identity).forward_trained(x(), &StepBatch::new([(0, 2)]), &[]).unwrap_err();
    assert!(matches!(short, LinearError::Input { .. }), "{short:?}");
    let missing = AdapterParameters::<Trained>::new(&layers()[0], &Bindings::new(), &Default::default()).unwrap_err();
    assert!(missing.to_string().contains("has no value"), "{missing}");
    // Nothing is trained: no gradient, and no error.
    let y = layer(&weight, Activation::Identity).forward_trained(x(), &batch, &[]).unwrap();
    assert_eq!(y.dims(), [ROWS, K]);
}
