//! The oracle against numbers worked out by hand, and its refusals.

mod support;

use flora_ir::{
    Activation, Bindings, Dimension, EvaluateError, Value, builtin, evaluate, evaluate::apply_activation, evaluate_root,
};
use support::layer;

fn matrix(rows: usize, columns: usize, data: &[f64]) -> Value {
    Value::matrix(rows, columns, data.to_vec()).unwrap()
}

/// x = [1 2], w0 = [1 2 3; 4 5 6], b = [1 2; 3 4], a = [1 0 -1; 2 1 0].
fn small() -> Bindings {
    Bindings::from_iter([
        ("x", matrix(1, 2, &[1.0, 2.0])),
        ("w0", matrix(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("b", matrix(2, 2, &[1.0, 2.0, 3.0, 4.0])),
        ("a", matrix(2, 3, &[1.0, 0.0, -1.0, 2.0, 1.0, 0.0])),
        ("s", Value::scalar(0.5)),
        ("m", Value::vector(vec![2.0, 1.0, 1.0])),
    ])
}

#[track_caller]
fn gives(name: &str, bindings: &Bindings, expected: &[f64]) {
    let value = evaluate_root(builtin::builtin(name).unwrap(), bindings).unwrap();
    assert_eq!(value.extents(), [1, expected.len()]);
    for (value, expected) in value.data().iter().zip(expected) {
        assert!((value - expected).abs() < 1e-12, "{name}: {value} is not {expected}");
    }
}

#[test]
fn the_adapters_on_paper() {
    // b @ a = [5 2 -1; 11 4 -3]
    gives("linear", &small(), &[9.0, 12.0, 15.0]);
    gives("flora", &small(), &[1.0 * 5.0 + 8.0 * 11.0, 2.0 * 2.0 + 10.0 * 4.0, -3.0 - 12.0 * 3.0]);
    gives("flora_mean", &small(), &[93.0 / 2.0, 44.0 / 2.0, -39.0 / 2.0]);
    gives("hira", &small(), &[9.0 + 93.0, 12.0 + 44.0, 15.0 - 39.0]);
    gives("lora", &small(), &[9.0 + 0.5 * 27.0, 12.0 + 0.5 * 10.0, 15.0 - 0.5 * 7.0]);
    let mut ia3 = small();
    ia3.insert("l", Value::vector(vec![2.0, 0.0, -1.0]));
    gives("ia3", &ia3, &[18.0, 0.0, -15.0]);
    ia3.insert("l", Value::vector(vec![3.0, -1.0]));
    gives("ia3_feedforward", &ia3, &[3.0 - 8.0, 6.0 - 10.0, 9.0 - 12.0]);
    // w0 + b @ a / 2 = [3.5 3 2.5; 9.5 7 4.5]
    let norm = |upper: f64, lower: f64| (upper * upper + lower * lower).sqrt();
    gives("dora", &small(), &[2.0 * 22.5 / norm(3.5, 9.5), 17.0 / norm(3.0, 7.0), 11.5 / norm(2.5, 4.5)]);
}

#[test]
fn a_residual_is_added_after_the_activation() {
    let layer = layer(
        "layer f(x: input[tokens, D], w0: weight[D, K], l: bias[K], e: residual[tokens, K]) { relu(x @ w0 + l) + e }",
    );
    let mut bindings = small();
    bindings.insert("x", matrix(2, 2, &[1.0, 2.0, 0.0, 1.0])).insert("l", Value::vector(vec![0.0, -20.0, 1.0]));
    bindings.insert("e", matrix(2, 3, &[-1.0, 2.0, 3.0, 4.0, 5.0, -6.0]));
    // x @ w0 + l = [9 -8 16; 4 -15 7]
    assert_eq!(evaluate_root(&layer, &bindings).unwrap().data(), [8.0, 2.0, 19.0, 8.0, 5.0, 1.0]);

    bindings.insert("e", matrix(1, 3, &[0.0; 3]));
    let error = evaluate_root(&layer, &bindings).unwrap_err();
    assert!(
        matches!(&error, EvaluateError::ExtentMismatch { dimension: Dimension::Tokens, source_name, .. } if source_name == "`e`"),
        "{error}"
    );
}

#[test]
fn the_rank_axis_is_a_stack() {
    let layer = layer(
        "layer f(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]) {
            sum_rank(rows(a) * ((columns(b) * x) @ w0)) }",
    );
    let columns = layer.layer().nodes.iter().find(|(_, node)| matches!(node, flora_ir::Node::Columns(_))).unwrap().0;
    let value = evaluate(&layer, columns, &small()).unwrap();
    assert_eq!((value.rank_extent(), value.shape(), value.data()), (Some(2), &[2][..], &[1.0, 3.0, 2.0, 4.0][..]));
    assert_eq!(evaluate_root(&layer, &small()).unwrap().data(), [93.0, 44.0, -39.0]);
}

#[test]
fn activations_at_known_points() {
    let points = [
        (Activation::Identity, -1.5, -1.5),
        (Activation::Relu, -1.5, 0.0),
        (Activation::Relu, 1.5, 1.5),
        // x Φ(x) with Φ(1) = 0.841344746068543, from tables of the normal distribution
        (Activation::GeluErf, 1.0, 0.841344746068543),
        (Activation::GeluErf, -1.0, -0.158655253931457),
        (Activation::GeluTanh, 0.0, 0.0),
        // 1 / (1 + e^-1)
        (Activation::Silu, 1.0, 0.731058578630005),
    ];
    for (function, x, expected) in points {
        assert!((apply_activation(function, x) - expected).abs() < 1e-14, "{function:?}({x})");
    }
    let worst = (-400..400).map(|x| f64::from(x) / 100.0).fold(0.0f64, |worst, x| {
        worst.max((apply_activation(Activation::GeluTanh, x) - apply_activation(Activation::GeluErf, x)).abs())
    });
    assert!(worst < 1e-3, "the tanh form approximates the other, at worst by {worst}");
    assert!(Activation::ALL.iter().all(|function| apply_activation(*function, f64::NAN).is_nan()));
}

#[test]
fn derivatives_of_activations() {
    use flora_ir::evaluate::activation_derivative;
    let points = [
        (Activation::Identity, -3.0, 1.0),
        (Activation::Relu, -1.5, 0.0),
        (Activation::Relu, 0.0, 0.0),
        (Activation::Relu, 1.5, 1.0),
        // Φ(1) + φ(1), from tables of the normal distribution
        (Activation::GeluErf, 1.0, 0.841344746068543 + 0.241970724519143),
        (Activation::GeluErf, -1.0, 0.158655253931457 - 0.241970724519143),
        (Activation::GeluTanh, 0.0, 0.5),
        (Activation::Silu, 0.0, 0.5),
    ];
    for (function, x, expected) in points {
        assert!((activation_derivative(function, x) - expected).abs() < 1e-14, "{function:?}'({x})");
    }
    for function in Activation::ALL {
        assert!(function == Activation::Identity || activation_derivative(function, f64::NAN).is_nan());
        for far in [f64::INFINITY, f64::MAX, 1e200, 1e3] {
            let left = if function == Activation::Identity { 1.0 } else { 0.0 };
            let found = (activation_derivative(function, far), activation_derivative(function, -far));
            assert_eq!(found, (1.0, left), "{function:?}' at {far}");
        }
        // A central difference is off by h²/6 of the third derivative, which is below 2, and by 8 roundings of at most 8 over h.
        let h = 1.0 / 4096.0;
        for x in (-800..=800).map(|x| f64::from(x) / 100.0 + 0.001) {
            let apply = |x| apply_activation(function, x);
            let difference = (apply(x + h) - apply(x - h)) / (2.0 * h);
            let found = activation_derivative(function, x);
            let bound = h * h / 3.0 + 64.0 * f64::EPSILON / h;
            assert!((found - difference).abs() < bound, "{function:?}'({x}) is {found}, the difference {difference}");
        }
    }
}

#[test]
fn bindings_that_do_not_fit() {
    let flora = builtin::builtin("flora").unwrap();
    let with = |name: &str, value: Value| {
        let mut bindings = small();
        bindings.insert(name, value);
        evaluate_root(flora, &bindings).unwrap_err()
    };
    let mismatch = with("a", matrix(3, 3, &[0.0; 9]));
    assert!(
        matches!(&mismatch, EvaluateError::ExtentMismatch { dimension, .. } if dimension.to_string() == "R"),
        "{mismatch}"
    );
    assert!(matches!(with("a", Value::vector(vec![0.0; 3])), EvaluateError::WrongShape { .. }));
    let unbound = evaluate_root(flora, &Bindings::new()).unwrap_err();
    assert!(matches!(unbound, EvaluateError::Unbound { .. }));
    assert!(matches!(Value::matrix(2, 2, vec![0.0; 3]), Err(EvaluateError::WrongLength { elements: 3, .. })));
    assert!(matches!(Value::matrix(usize::MAX, 2, vec![]), Err(EvaluateError::TooLarge { .. })));

    let mut contradicted = small();
    contradicted.insert_extent(Dimension::Symbol("D".to_owned()), 3);
    assert!(matches!(evaluate_root(flora, &contradicted), Err(EvaluateError::ExtentMismatch { .. })));

    let fixed = layer("layer f(x: input[tokens, 2], w0: weight[2, 4]) { x @ w0 }");
    let error = evaluate_root(&fixed, &small()).unwrap_err();
    assert_eq!(error.to_string(), "dimension 4 is 3 in `w0` but 4 in the declaration");
}

#[test]
fn values_that_would_not_fit_in_memory_are_refused() {
    let outer = layer("layer f(x: input[tokens, D], w0: weight[D, K]) { x @ w0 }");
    let bindings =
        Bindings::from_iter([("x", matrix(1 << 16, 1, &[0.0; 1 << 16])), ("w0", matrix(1, 1 << 16, &[0.0; 1 << 16]))]);
    assert!(matches!(evaluate_root(&outer, &bindings), Err(EvaluateError::TooLarge { .. })));
}

#[test]
fn no_tokens_and_no_rank() {
    let mut bindings = small();
    bindings.insert("x", matrix(0, 2, &[]));
    assert_eq!(evaluate_root(builtin::builtin("flora").unwrap(), &bindings).unwrap().extents(), [0, 3]);
    let mut bindings = small();
    bindings.insert("b", matrix(2, 0, &[])).insert("a", matrix(0, 3, &[]));
    gives("flora", &bindings, &[0.0, 0.0, 0.0]);
    assert_eq!(evaluate_root(builtin::builtin("flora_mean").unwrap(), &bindings), Err(EvaluateError::EmptyMean));
}

#[test]
fn nan_is_not_hidden() {
    let mut bindings = small();
    bindings.insert("x", matrix(1, 2, &[f64::NAN, 0.0]));
    let value = evaluate_root(builtin::builtin("linear").unwrap(), &bindings).unwrap();
    assert!(value.data().iter().all(|element| element.is_nan()));
}
