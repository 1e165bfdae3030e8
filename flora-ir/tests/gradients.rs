//! Gradients against central differences of the oracle: those of whole equations, those by way of the folded vectors, and the
//! adjoint.

mod support;

use flora_ir::algebra::{FoldError, NormalForm, normalize};
use flora_ir::evaluate::activation_derivative;
use flora_ir::gradient::{FoldedGradient, LinearGradient, RankOneGradient, VirtualRowGradient, differentiate};
use flora_ir::{
    Activation, Bindings, Dimension, ElementType, EvaluateError, Layer, Node, Operand, Operator, Role, Scope, Shape,
    Span, TensorType, Value, VerifiedLayer, builtin, evaluate, evaluate_root, verify,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use support::equations::{equation, sizes, source};
use support::loss::{DEGREE, Loss, ROUNDING, differentiable, fail, output_gradient, with_elements};
use support::{bindings, config, layer, with_offset};

/// f64 against f64: sums of a few hundred products, in another order.
const EXACT: f64 = 1e-9;

/// Every gradient of `layer`, derived in every way.
fn check(layer: &VerifiedLayer, sizes: [usize; 4], seed: u64) -> Result<(), TestCaseError> {
    let loss = Loss::new(layer, sizes, seed);
    let linear = normalize(layer).map_err(fail)?.linear;

    // The equations, of the layer as it was written and in its normal form.
    let written = differentiate(layer).evaluate(&loss.bindings, &loss.dy).map_err(fail)?;
    let normal = differentiate(&linear.layer).evaluate(&loss.bindings, &loss.dy).map_err(fail)?;
    for operand in differentiable(layer) {
        let (one, other) = (written.get(&operand.name).expect("derived"), normal.get(&operand.name).expect("derived"));
        loss.check(&operand.name, one, 0.0)?;
        let close = DEGREE * loss.size * loss.roundings * ROUNDING;
        let is_close = one.data().iter().zip(other.data()).all(|(one, other)| (one - other).abs() <= close);
        prop_assert!(is_close, "d{} is {:?} as written, {:?} in the normal form", operand.name, one, other);
    }

    // By way of the folded vectors, whose numbers are rounded to f32: by u = 2⁻²⁴ of them. Two of them meet in every product, and
    // the slope of an activation, whose own slope is at most 1.2, moves with a sum of products of size S by 2·u·1.2·S.
    let ((folded, offset), sum) =
        (linear.fold_with_offset(&loss.bindings).map_err(fail)?, folded_sums(&linear, &loss)?);
    let (x, w0, bias) = (loss.get(linear.input), loss.get(linear.base_weight), linear.bias.map(|bias| loss.get(bias)));
    let sum_of_biases = with_offset(bias, offset.as_deref());
    let LinearGradient { input, bias: d_bias, adapter } =
        folded.gradient(x, w0, sum_of_biases.as_ref(), linear.activation, &loss.dy).map_err(fail)?;
    let unit = 2.0 / (1u64 << 24) as f64;
    let stretch = if linear.activation == Activation::Identity { 0.0 } else { 1.2 * sum.largest };
    let further = unit * DEGREE * loss.size * (1.0 + stretch);
    if linear.activation == Activation::Relu {
        prop_assert!(
            sum.smallest > unit * sum.largest,
            "rounding may move a sum over relu's kink; choose other numbers"
        );
    }
    loss.check(&loss.layer.layer().operands[linear.input].name, &input, further)?;
    if let Some(bias) = linear.bias {
        loss.check(&loss.layer.layer().operands[bias].name, &d_bias, further)?;
    }
    let d_offset = offset.map(|_| d_bias.data());
    let unfolded = linear.unfolding().unfold_with_offset(&loss.bindings, &adapter, d_offset).map_err(fail)?;
    for operand in differentiable(layer).filter(|operand| operand.role.is_adapters()) {
        loss.check(&operand.name, unfolded.get(&operand.name).expect("unfolded"), further)?;
    }

    check_adjoint(&linear, &loss, &sum.g, further)
}

/// The sums before an activation, in f64.
struct Sums {
    smallest: f64,
    /// Of the products, a bound.
    largest: f64,
    /// φ'(s) ∘ dy
    g: Value,
}

fn folded_sums(linear: &NormalForm, loss: &Loss) -> Result<Sums, TestCaseError> {
    let sums = loss.sums.iter().find(|(function, _)| *function != Activation::Identity);
    let Some((function, sum)) = sums else {
        return Ok(Sums { smallest: 0.0, largest: loss.size, g: loss.dy.clone() });
    };
    prop_assert_eq!(*function, linear.activation);
    let sum = evaluate(&loss.layer, *sum, &loss.bindings).map_err(fail)?;
    let smallest = sum.data().iter().fold(f64::INFINITY, |least, sum| least.min(sum.abs()));
    let g = with_elements(&sum, |at| activation_derivative(*function, sum.data()[at]) * loss.dy.data()[at]);
    let least = loss.dy.data().iter().fold(f64::INFINITY, |least, dy| least.min(dy.abs()));
    // The loss's products are those of the sums, times at least the least |dy|.
    Ok(Sums { smallest, largest: loss.size / least.max(1e-3), g })
}

/// The adjoint's equation gives dx, folded in either way too, and its own adjoint is the layer.
fn check_adjoint(linear: &NormalForm, loss: &Loss, g: &Value, further: f64) -> Result<(), TestCaseError> {
    let adjoint = linear.adjoint().map_err(fail)?.linear;
    let transposed = transposed(loss.get(linear.base_weight));
    let of = |linear: &NormalForm, input: &Value, weight: &Value| {
        let mut bindings = loss.bindings.clone();
        let name = |operand| linear.layer.layer().operands[operand].name.clone();
        bindings.insert(name(linear.input), input.clone()).insert(name(linear.base_weight), weight.clone());
        bindings
    };
    let all = of(&adjoint, g, &transposed);
    let dx = &loss.layer.layer().operands[linear.input].name;
    loss.check(dx, &evaluate_root(&adjoint.layer, &all).map_err(fail)?, 0.0)?;
    let (folded, _) = linear.fold_with_offset(&loss.bindings).map_err(fail)?;
    for adapter in [folded.adjoint(), adjoint.fold(&all).map_err(fail)?] {
        loss.check(dx, &adapter.apply(g, &transposed, None, Activation::Identity).map_err(fail)?, further)?;
    }
    prop_assert_eq!(folded.adjoint().layout(), folded.layout().adjoint());
    prop_assert_eq!(&folded.adjoint().adjoint(), &folded);

    // What is left of the layer when bias, activation and residual are taken away.
    let again = adjoint.adjoint().map_err(fail)?.linear;
    let (x, w0) = (loss.get(linear.input), loss.get(linear.base_weight));
    let plain = folded.apply(x, w0, None, Activation::Identity).map_err(fail)?;
    let twice = evaluate_root(&again.layer, &of(&again, x, w0)).map_err(fail)?;
    let size = plain.data().iter().chain([&1.0]).fold(0.0f64, |size, y| size.max(y.abs()));
    let close = further.max(EXACT * size);
    let differences = plain.data().iter().zip(twice.data()).map(|(plain, twice)| (plain - twice).abs());
    prop_assert!(differences.fold(0.0, f64::max) <= close, "{plain:?} is not {twice:?}");
    Ok(())
}

fn transposed(value: &Value) -> Value {
    let &[rows, columns] = value.shape() else { panic!("a matrix") };
    let element = |index: usize| value.data()[(index % rows) * columns + index / rows];
    Value::matrix(columns, rows, (0..rows * columns).map(element).collect()).expect("as many")
}

/// φ(layer + bias) + residual
fn with_epilogue(layer: &VerifiedLayer, function: Activation) -> VerifiedLayer {
    let Shape::Matrix(_, k) = layer.type_of(layer.root()).shape.clone() else { panic!("no output") };
    let mut layer = layer.layer().clone();
    let plus = |layer: &mut Layer, lhs, name: &str, role, shape| {
        let ty = TensorType { shape, rank_axis: None, element: ElementType::F32, scope: Scope::Shared };
        let operand = layer.declare(Operand { name: name.to_owned(), role, ty }, Span::default());
        let rhs = layer.push(Node::Operand(operand), Span::default());
        layer.push(Node::Elementwise { operator: Operator::Add, lhs, rhs }, Span::default())
    };
    let root = layer.root.expect("verified");
    let value = plus(&mut layer, root, "bias", Role::Bias, Shape::Vector(k.clone()));
    let activated = layer.push(Node::Activation { function, value }, Span::default());
    let residual = Shape::Matrix(Dimension::Tokens, k);
    layer.root = Some(plus(&mut layer, activated, "residual", Role::Residual, residual));
    verify(layer).expect("an epilogue")
}

/// `layer` with every choice of types for its adapters under which it can be compiled.
fn typings(layer: &VerifiedLayer) -> Vec<VerifiedLayer> {
    let dimension = |name: &str| Dimension::Symbol(name.to_owned());
    let names = ["D", "K", "R"];
    let vectors = names.iter().map(|n| Shape::Vector(dimension(n)));
    let matrices = names.iter().flat_map(|m| names.iter().map(move |n| Shape::Matrix(dimension(m), dimension(n))));
    let shapes: Vec<Shape> = std::iter::once(Shape::Scalar).chain(vectors).chain(matrices).collect();
    let mut choices = vec![Layer { operands: Default::default(), ..layer.layer().clone() }];
    for (_, operand) in layer.layer().operands.iter() {
        let shapes = if operand.role.is_adapters() { &shapes[..] } else { std::slice::from_ref(&operand.ty.shape) };
        let with = |choice: &Layer, shape: &Shape| {
            let mut choice = choice.clone();
            choice
                .operands
                .push(Operand { ty: TensorType { shape: shape.clone(), ..operand.ty.clone() }, ..operand.clone() });
            choice
        };
        choices = choices.iter().flat_map(|choice| shapes.iter().map(|shape| with(choice, shape))).collect();
    }
    choices.into_iter().filter_map(|choice| verify(choice).ok()).filter(|layer| normalize(layer).is_ok()).collect()
}

/// Equations that no builtin has: scales of both sides beside a pair with means (and a value that a norm and a product read), and
/// one whose operands go through every operation that is differentiated.
const OTHERS: [&str; 3] = [
    "layer ssf(x: input[tokens, D], w0: weight[D, K], l: adapter[D], m: adapter[K], b: adapter[D, R], a: adapter[R, K]) {
        m * ((l * x) @ (w0 + b @ a))
    }",
    "layer normed(x: input[tokens, D], w0: weight[D, K], b: adapter[R, D], a: adapter[R, K], s: adapter[], m: adapter[K]) {
        let w = w0 * (1 + matmul_mean(transpose(b), a)) / column_norm(w0);
        m * (x @ w) / (2 + column_norm(transpose(b) @ a) * (1 + s * s))
    }",
    "layer everything(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], l: adapter[K], i: adapter[D], s: adapter[]) {
        sum_rank(rows(silu(a)) * (s / (1 + s * s)) * ((columns(b) * (gelu_tanh(i) * x)) @ w0)) / (1 + l * l)
            + mean_rank(rows(a * l) * ((columns(relu(b)) * x) @ (w0 * gelu_erf(l)))) + s * (x @ w0)
            + sum_rank(rows(a) / (1 + columns(transpose(a)) * columns(transpose(a)))) * (x @ w0)
    }",
];

/// Elementwise products of low-rank weights beside the base weight and as its factor, updates of the identity on either side of it,
/// and biases of the adapter's own.
const FACTORS_AND_BIASES: [&str; 3] = [
    "layer loha(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], d: adapter[D, R], c: adapter[R, K], s: adapter[]) {
        x @ (w0 * (1 + (b @ a) * (d @ c)) + s * ((b @ c) * (d @ a)))
    }",
    "layer around(x: input[tokens, D], w0: weight[D, K], u: adapter[D, R], v: adapter[R, D], p: adapter[K, 2], q: adapter[2, K]) {
        let y = (x + (x @ u) @ v) @ w0;
        y + (y @ p) @ q
    }",
    "layer shifted(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], l: adapter[K], s: adapter[]) {
        x @ (w0 + b @ a) + l * (1 + s) + sum_rank(rows(a)) + s
    }",
];

proptest! {
    #![proptest_config(config(6))]

    #[test]
    fn gradients_of_every_builtin_under_every_typing(sizes in sizes(), seed in any::<u64>()) {
        for name in builtin::names() {
            let layer = builtin::builtin(name).expect(name);
            let typings = typings(layer);
            prop_assert!(typings.contains(layer), "{}", name);
            for (index, layer) in typings.iter().enumerate() {
                check(layer, sizes, seed)?;
                let function = Activation::ALL[(index + seed as usize % 5) % 5];
                check(&with_epilogue(layer, function), sizes, seed)?;
            }
        }
    }

    #[test]
    fn gradients_of_layers_that_no_builtin_has(sizes in sizes(), seed in any::<u64>()) {
        for source in OTHERS {
            let layer = layer(source);
            check(&layer, sizes, seed)?;
            for function in Activation::ALL {
                check(&with_epilogue(&layer, function), sizes, seed)?;
            }
        }
    }

    /// Of activations, those without a kink: sums of so many products come near to it.
    #[test]
    fn gradients_of_factors_and_biases(sizes in sizes(), seed in any::<u64>()) {
        for source in FACTORS_AND_BIASES {
            let layer = layer(source);
            check(&layer, sizes, seed)?;
            for function in Activation::ALL.into_iter().filter(|function| *function != Activation::Relu) {
                check(&with_epilogue(&layer, function), sizes, seed)?;
            }
        }
    }
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn gradients_of_random_equations(equation in equation(), sizes in sizes(), seed in any::<u64>()) {
        check(&layer(&source(&equation)), sizes, seed)?;
    }
}

fn matrix(rows: usize, columns: usize, data: &[f64]) -> Value {
    Value::matrix(rows, columns, data.to_vec()).unwrap()
}

#[test]
fn the_gradients_of_flora_on_paper() {
    let bindings = Bindings::from_iter([
        ("x", matrix(1, 2, &[1.0, 2.0])),
        ("w0", matrix(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        ("b", matrix(2, 2, &[1.0, 2.0, 3.0, 4.0])),
        ("a", matrix(2, 3, &[1.0, 0.0, -1.0, 2.0, 1.0, 0.0])),
    ]);
    // G ∘ w0 = [1 0 -3; 8 0 -12], w0 ∘ (b @ a) = [5 4 -3; 44 20 -18]
    let dy = matrix(1, 3, &[1.0, 0.0, -1.0]);
    let gradients = differentiate(builtin::builtin("flora").unwrap()).evaluate(&bindings, &dy).unwrap();
    assert_eq!(gradients.get("b").unwrap().data(), [4.0, 2.0, 20.0, 16.0]);
    assert_eq!(gradients.get("a").unwrap().data(), [25.0, 0.0, -39.0, 34.0, 0.0, -54.0]);
    assert_eq!(gradients.get("x").unwrap().data(), [8.0, 62.0]);
    assert!(gradients.get("w0").is_none(), "the base weight is frozen");
}

#[test]
fn an_operand_of_norms_alone_is_a_constant() {
    let layer = layer(
        "layer f(x: input[tokens, D], w0: weight[D, K], c: adapter[D, K], m: adapter[K]) { m * (x @ w0) / column_norm(w0 + c) }",
    );
    let bindings = bindings(&layer, [2, 5, 7, 3], 1);
    let dy = output_gradient(&layer, [2, 5, 7, 3], 1);
    let linear = normalize(&layer).unwrap().linear;
    let get = |operand| bindings.get(&linear.layer.layer().operands[operand].name).unwrap();
    let folded = linear.fold(&bindings).unwrap();
    let found = folded.gradient(get(linear.input), get(linear.base_weight), None, Activation::Identity, &dy).unwrap();
    let unfolded = linear.unfolding().unfold(&bindings, &found.adapter).unwrap();
    for gradients in [differentiate(&layer).evaluate(&bindings, &dy).unwrap(), unfolded] {
        assert_eq!(gradients.get("c").unwrap(), &matrix(5, 7, &[0.0; 35]));
        assert!(gradients.get("m").unwrap().data().iter().all(|element| *element != 0.0));
    }
}

#[test]
fn names_that_gradients_use_may_be_taken() {
    let long = "l".repeat(64);
    let source = format!(
        "layer {long}(g: input[tokens, D], w0: weight[D, K], w0_transposed: adapter[D, R], dy: adapter[R, K], d_in: adapter[D], \
         d_out: adapter[K], d_shrink: adapter[], d_in1: adapter[]) {{
            d_out * ((d_in * g) @ (w0 * (1 + w0_transposed @ dy) + d_shrink * (w0_transposed @ dy))) + d_in1 * (g @ w0)
        }}"
    );
    let taken = layer(&source);
    check(&taken, [3, 5, 7, 2], 5).unwrap();
    let adjoint = normalize(&taken).unwrap().linear.adjoint().unwrap().linear.layer;
    let again = support::layer(&flora_ir::print(adjoint.layer()));
    assert!(support::same_graph(again.layer(), adjoint.layer()), "the adjoint is a layer that can be written");
}

#[test]
fn nothing_to_sum_gives_zeros() {
    let layer = builtin::builtin("lora").unwrap();
    let linear = normalize(layer).unwrap().linear;
    for sizes in [[0, 5, 7, 3], [2, 5, 7, 0]] {
        let bindings = bindings(layer, sizes, 1);
        let (x, w0) = (bindings.get("x").unwrap(), bindings.get("w0").unwrap());
        let dy = output_gradient(layer, sizes, 1);
        let written = differentiate(layer).evaluate(&bindings, &dy).unwrap();
        let folded = linear.fold(&bindings).unwrap();
        let found = folded.gradient(x, w0, None, Activation::Identity, &dy).unwrap();
        let unfolded = linear.unfolding().unfold(&bindings, &found.adapter).unwrap();
        for name in ["b", "a", "s"] {
            let (one, other) = (written.get(name).unwrap(), unfolded.get(name).unwrap());
            assert_eq!(one.extents(), bindings.get(name).unwrap().extents(), "{name}");
            assert!(one == other && one.data().iter().all(|element| *element == 0.0), "{name}: {one:?}, {other:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let layer = builtin::builtin("hira").unwrap();
    let bindings = bindings(layer, [2, 5, 7, 3], 1);
    let dy = output_gradient(layer, [2, 5, 7, 3], 1);
    let linear = normalize(layer).unwrap().linear;
    let folded = linear.fold(&bindings).unwrap();
    let (x, w0) = (bindings.get("x").unwrap(), bindings.get("w0").unwrap());
    let gradient = |dy: &Value| folded.gradient(x, w0, None, Activation::Silu, dy);
    for wrong in [x, &Value::scalar(1.0), &Value::vector(vec![1.0; 7])] {
        assert!(matches!(gradient(wrong), Err(FoldError::WrongShape { what: "the output's gradient", .. })));
    }
    assert!(matches!(folded.gradient(w0, w0, None, Activation::Silu, &dy), Err(FoldError::WrongShape { .. })));

    let (right, unfolding) = (gradient(&dy).unwrap().adapter, linear.unfolding());
    assert!(unfolding.unfold(&bindings, &right).is_ok());
    let refuses = |change: &dyn Fn(&mut FoldedGradient)| {
        let mut wrong = right.clone();
        change(&mut wrong);
        let found = unfolding.unfold(&bindings, &wrong);
        assert!(matches!(found, Err(FoldError::WrongShape { .. })), "{found:?}");
    };
    refuses(&|wrong| wrong.virtual_rows.clear());
    refuses(&|wrong| wrong.virtual_rows.truncate(3));
    refuses(&|wrong| wrong.virtual_rows.push(Default::default()));
    refuses(&|wrong| wrong.low_rank.push(RankOneGradient::default()));
    refuses(&|wrong| wrong.virtual_rows[2].in_scale = None);
    refuses(&|wrong| wrong.virtual_rows[0].out_scale = Some(vec![1.0; 7]));
    refuses(&|wrong| wrong.virtual_rows[1].out_scale = Some(vec![1.0; 5]));
    // That of a product needs its factors.
    let scaled =
        self::layer("layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K], s: adapter[]) { l * s * (x @ w0) }");
    let pair = FoldedGradient {
        virtual_rows: vec![VirtualRowGradient { out_scale: Some(vec![1.0; 7]), ..Default::default() }],
        ..Default::default()
    };
    let unbound = Bindings::from_iter([("l", Value::vector(vec![1.0; 7]))]);
    let found = normalize(&scaled).unwrap().linear.unfolding().unfold(&unbound, &pair);
    assert!(
        matches!(&found, Err(FoldError::Evaluate(EvaluateError::Unbound { operand })) if operand == "s"),
        "{found:?}"
    );
    let found = differentiate(layer).evaluate(&bindings, x);
    assert!(matches!(found, Err(EvaluateError::ExtentMismatch { .. })), "{found:?}");
}
