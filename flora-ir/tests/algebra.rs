//! From equations to the adapted linear: every step equals the oracle, and what is folded computes what was written.

mod support;

use flora_ir::algebra::{
    Core, FoldError, FoldedAdapter, NormalizeError, Obstacle, RankOne, RowScales, SparseParts, VirtualRow, normalize,
    rules,
};
use flora_ir::{
    Activation, Bindings, Dimension, EvaluateError, Role, SparseMatrix, Value, VerifiedLayer, builtin, evaluate_root,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use support::equations::{OPERANDS, equation, sizes, source};
use support::{bindings, config, is_close, layer, with_offset};

/// f64 against f64: sums of a few hundred products, in another order.
const EXACT: f64 = 1e-9;

/// The folded vectors are rounded to f32, by at most 2^-24 each, and two of them meet in every product; activations stretch
/// an error by at most 1.13. So the error is below 4 * 2^-24 of the sum of the products' sizes.
const ROUNDED: f64 = 4.0 / (1 << 24) as f64;

/// The sum of the sizes of all products that make up each output.
fn sizes_of_products(folded: &FoldedAdapter, x: &Value, w0: &Value) -> Result<Value, FoldError> {
    let vector = |vector: &Vec<f32>| vector.iter().map(|element| element.abs()).collect::<Vec<f32>>();
    let mut folded = folded.clone();
    for VirtualRow { in_scale, out_scale } in &mut folded.virtual_rows {
        *in_scale = in_scale.as_ref().map(vector);
        *out_scale = out_scale.as_ref().map(vector);
    }
    for RankOne { shrink, expand } in &mut folded.low_rank {
        (*shrink, *expand) = (vector(shrink), vector(expand));
    }
    folded.sparse = folded.sparse.map(|matrix| matrix.map(|_, _, value| value.abs()));
    let matrix = |value: &Value| {
        let data = value.data().iter().map(|element| element.abs()).collect();
        Value::matrix(value.shape()[0], value.shape()[1], data).expect("the same extents")
    };
    folded.apply(&matrix(x), &matrix(w0), None, Activation::Identity)
}

/// Normalises `layer` and holds every step, and the folded adapter, against the oracle.
fn check(layer: &VerifiedLayer, sizes: [usize; 4], seed: u64) -> Result<(), TestCaseError> {
    let bindings = bindings(layer, sizes, seed);
    let expected = evaluate_root(layer, &bindings).map_err(|error| TestCaseError::fail(error.to_string()))?;
    let text = flora_ir::print(layer.layer());
    let normalized = normalize(layer).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
    for step in &normalized.derivation.steps {
        let after = evaluate_root(&step.layer, &bindings).map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert!(is_close(&expected, &after, EXACT), "{} breaks\n{}\n{}", step.rule.name, step.before, step.after);
    }
    let linear = normalized.linear;
    let name = |operand| linear.layer.layer().operands[operand].name.clone();
    let get = |operand| bindings.get(&name(operand)).expect("bound");
    let (folded, offset) =
        linear.fold_with_offset(&bindings).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
    let (x, w0, bias) = (get(linear.input), get(linear.base_weight), linear.bias.map(get));
    let bias = with_offset(bias, offset.as_deref());
    let bias = bias.as_ref();
    let residual = linear.residual.map(get);
    let applied = folded
        .apply_with_residual(x, w0, bias, linear.activation, residual)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    let sizes_of_products = sizes_of_products(&folded, x, w0).expect("apply accepted the same shapes");
    for ((expected, applied), size) in expected.data().iter().zip(applied.data()).zip(sizes_of_products.data()) {
        // What is added is rounded, too.
        let added = if offset.is_some() { 2.0 + expected.abs() } else { 0.0 };
        let is_close = (expected - applied).abs() <= ROUNDED * (size + added) + EXACT * expected.abs();
        prop_assert!(is_close, "{expected} is not {applied}: {text}\n{}", normalized.derivation);
    }
    prop_assert_eq!(folded.layout(), linear.layout(sizes[3]), "{}", text);
    Ok(())
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn every_step_of_every_builtin_equals_the_oracle(sizes in sizes(), seed in any::<u64>()) {
        for name in builtin::names() {
            check(builtin::builtin(name).expect(name), sizes, seed)?;
        }
    }

    #[test]
    fn random_equations_fold_to_what_they_compute(equation in equation(), sizes in sizes(), seed in any::<u64>()) {
        check(&layer(&source(&equation)), sizes, seed)?;
    }

    #[test]
    fn random_graphs_normalise_or_are_refused(choices in prop::collection::vec(any::<[u8; 3]>(), 1..40)) {
        if let Ok(layer) = flora_ir::verify(support::square_layer_from_choices(&choices)) {
            let sizes = [2, 3, 3, 3];
            match normalize(&layer) {
                Ok(_) => check(&layer, sizes, 1)?,
                Err(error) => prop_assert!(!error.term.is_empty()),
            }
        }
    }
}

#[test]
fn builtins_have_the_terms_of_their_names() {
    let counts = |name: &str| {
        let layout = normalize(builtin::builtin(name).expect(name)).expect(name).linear.layout(5);
        (layout.virtual_rows.len(), layout.low_rank)
    };
    let expected = [
        ("linear", (1, 0)),
        ("flora", (5, 0)),
        ("flora_mean", (5, 0)),
        ("hira", (6, 0)),
        ("lora", (1, 5)),
        ("ia3", (1, 0)),
        ("ia3_feedforward", (1, 0)),
        ("dora", (1, 5)),
    ];
    assert!(expected.iter().map(|(name, _)| *name).eq(builtin::names()));
    for (name, count) in expected {
        assert_eq!(counts(name), count, "{name}");
    }
}

#[test]
fn the_base_weight_is_read_by_norms_alone() {
    let linear = |name: &str| normalize(builtin::builtin(name).expect(name)).expect(name).linear;
    let readers: Vec<_> = builtin::names().filter(|name| linear(name).reads_base_weight()).collect();
    assert_eq!(readers, ["dora"]);
    // b and a, and DoRA's scale of both terms; LoRA's s.
    let counts = ["linear", "ia3", "flora", "lora", "dora"].map(|name| linear(name).load_time_values().len());
    assert_eq!(counts, [0, 1, 2, 3, 4]);
    // What `fold` asks for.
    for name in builtin::names() {
        let layer = builtin::builtin(name).expect(name);
        let all = bindings(layer, [2, 5, 7, 3], 1);
        let operands = layer.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters());
        let mut own: Bindings =
            operands.map(|(_, operand)| (&*operand.name, all.get(&operand.name).expect("bound").clone())).collect();
        own.insert_extent(Dimension::Symbol("K".to_owned()), 7);
        let folded = linear(name).fold(&own);
        assert_eq!(folded.is_err(), linear(name).reads_base_weight(), "{name}: {folded:?}");
    }
}

#[test]
fn every_rule_has_a_use() {
    let operands = format!("{OPERANDS}, f: adapter[R, R], g: adapter[K, R], h: adapter[R, D]");
    let transformed = normalize(&sparse_layer("x @ (w0 @ o)")).unwrap().derivation;
    // Each line is there for the rules that only it needs.
    let terms = [
        "x @ (w0 + b @ a)",
        "identity(x @ w0) + (x @ w0) / k + x @ (w0 / k) + x @ (w0 * (b @ a / s))",
        "x @ (w0 * (b @ a + d @ c)) + x @ (w0 * (1 + b @ a)) + x @ (w0 * (s * (b @ a)))",
        "(x + j * x) @ w0 + matmul_mean(x @ b + x @ d, a) + l * (k * (x @ w0 + x @ (w0 * matmul_mean(b, a))))",
        "sum_rank(rows(a) * ((columns(b) * (x + i * x)) @ w0)) + mean_rank(rows(a) * ((columns(b) * (x + i * x)) @ w0))",
        "sum_rank((columns(b) * x) @ (rows(a) * w0)) + (s * x) @ w0 + matmul_mean(s * (x @ b), a)",
        "(e * (x @ b)) @ a + matmul_mean(e * (x @ b), a) + x @ matmul_mean(b, a) + ((x @ b) @ f) @ a",
        "sum_rank(s * rows(a) * ((columns(b) * x) @ w0)) + mean_rank(l * (rows(a) * ((columns(b) * x) @ w0)))",
        "sum_rank(rows(a) * (x @ w0)) + mean_rank(rows(a) * (x @ w0))",
        "sum_rank((columns(b) * x) @ w0) + mean_rank((columns(b) * x) @ w0)",
        "sum_rank(rows(a) * (l * (rows(c) * ((columns(b) * (columns(d) * x)) @ w0))))",
        "x @ ((b @ a) * (d @ c)) + x @ (((b @ a) * (s * (b @ c))) * (d @ c))",
        "x @ (w0 * (((b @ a) * (d @ a)) * (d @ c))) + x @ (w0 * ((b @ a) * (d @ c)))",
        "x @ (w0 @ (g @ a)) + ((x @ w0) @ g) @ c + (x @ w0) @ (g @ (f @ c)) + (x @ (d @ h)) @ w0",
    ];
    let operands = format!("{operands}, residual: residual[tokens, K]");
    let layer = layer(&format!("layer f({operands}) {{ {} + residual + bias }}", terms.join(" + ")));
    check(&layer, [2, 5, 7, 3], 3).unwrap();
    let derivation = normalize(&layer).unwrap().derivation;
    let unused: Vec<_> = rules()
        .iter()
        .map(|rule| rule.name)
        .filter(|name| derivation.steps.iter().chain(&transformed.steps).all(|step| step.rule.name != *name))
        .collect();
    assert!(unused.is_empty(), "no step uses {unused:?}");
}

#[test]
fn a_base_row_has_no_scales() {
    for source in [
        "layer f(x: input[tokens, D], w0: weight[D, K]) { x @ w0 }",
        "layer f(x: input[tokens, D], w0: weight[D, K]) { 0.25 * (x @ w0) + (x * 3) @ w0 / 4 }",
    ] {
        let linear = normalize(&layer(source)).unwrap().linear;
        let folded = linear.fold(&Bindings::new()).unwrap();
        assert_eq!(folded.virtual_rows, [Default::default()], "{source}");
    }
}

fn refusal(equation: &str) -> NormalizeError {
    normalize(&layer(&format!("layer f({equation}"))).expect_err("it has no normal form")
}

#[track_caller]
fn refuses(equation: &str, obstacle: Obstacle, term: &str) {
    let source = format!("x: input[tokens, D], w0: weight[D, K], {equation}");
    let error = refusal(&source);
    assert_eq!((error.obstacle, error.term.as_str()), (obstacle, term));
    assert!(error.diagnostic().render("layer", &format!("layer f({source}")).contains(term));
    assert!(error.span.end > error.span.start);
}

#[test]
fn the_term_in_the_way_is_named() {
    refuses("b: bias[K]) { (x @ w0) * (x @ w0) + b }", Obstacle::ProductOfInputs, "(x @ w0) * (x @ w0)");
    refuses("l: adapter[K]) { l * relu(x @ w0) }", Obstacle::InnerActivation, "relu(x @ w0)");
    refuses("l: adapter[K]) { relu(silu(x @ w0) * l) }", Obstacle::InnerActivation, "silu(x @ w0)");
    refuses("l: adapter[K]) { l / (x @ w0) }", Obstacle::DivisionByInput, "l / (x @ w0)");
    refuses("c: adapter[K]) { c * (x @ w0) + 2 / 3 }", Obstacle::AddedConstant, "2.0 / 3.0");
    refuses("c: bias[K]) { x @ w0 + 2 * c }", Obstacle::AddedConstant, "2.0 * c");
    refuses("c: adapter[K]) { c * (x @ w0 + c) }", Obstacle::InnerAddition, "x @ w0 + c");
    refuses("c: bias[K], d: bias[K]) { x @ w0 + c + d }", Obstacle::SecondBias, "d");
    refuses("l: adapter[K], c: bias[K]) { l * (x @ w0 + c) }", Obstacle::InnerAddition, "x @ w0 + c");
    refuses("l: adapter[D]) { (x + l) @ w0 }", Obstacle::InnerAddition, "x + l");
    refuses("c: adapter[D, K]) { x @ (w0 + c) }", Obstacle::DenseWeight, "c");
    refuses("c: adapter[D, K]) { x @ (w0 * c) }", Obstacle::DenseFactor, "w0 * c");
    refuses("c: adapter[K, K]) { x @ w0 @ c }", Obstacle::MatMulChain, "(x @ w0) @ c");
    refuses("l: adapter[K]) { l * matmul_mean(x, w0) }", Obstacle::MeanOverInput, "matmul_mean(x, w0)");
    let unprojected = refusal("x: input[tokens, D], w0: weight[D, D]) { x @ w0 + x }");
    assert_eq!((unprojected.obstacle, unprojected.term.as_str()), (Obstacle::Unprojected, "x"));
    let transposed = refusal(
        "x: input[tokens, D], w0: weight[D, K], c: adapter[R, D], a: adapter[R, K]) { sum_rank(rows(a) * ((rows(c) * x) @ w0)) }",
    );
    assert_eq!(transposed.obstacle, Obstacle::RankReduction);
}

#[test]
fn a_residual_is_added_to_the_finished_output_or_refused() {
    let residual = |rest: &str, obstacle, term: &str| refuses(&format!("e: residual[tokens, K]{rest}"), obstacle, term);
    let inner = Obstacle::InnerResidual;
    residual(") { relu(x @ w0 + e) }", inner, "x @ w0 + e");
    residual(") { x @ w0 + relu(e) }", inner, "relu(e)");
    residual(") { x @ w0 + 2 * e }", inner, "2.0 * e");
    residual(") { x @ w0 + -1 * (e / 2) }", inner, "e / 2.0");
    residual(") { e * (x @ w0) }", inner, "e * (x @ w0)");
    residual(") { x @ w0 / e }", inner, "(x @ w0) / e");
    residual(", l: adapter[K]) { l * (x @ w0 + e) }", inner, "x @ w0 + e");
    residual(", c: bias[K]) { x @ w0 + (c + e) * 2 }", inner, "c + e");
    residual(", a: adapter[K, K]) { x @ w0 + e @ a }", inner, "e @ a");
    let ranked = "(columns(b) * x) @ w0 + e";
    residual(&format!(", b: adapter[D, R]) {{ x @ w0 + sum_rank({ranked}) }}"), inner, ranked);
    // As a part of the output and once more inside of it.
    residual(", l: adapter[K]) { let y = x @ w0 + e; y + l * y }", inner, "x @ w0 + e");
    residual(") { relu(x @ w0 + e) + e }", inner, "x @ w0 + e");
    residual(") { x @ w0 + e + e }", Obstacle::SecondResidual, "e");
    residual(") { let twice = e + e; twice + x @ w0 }", Obstacle::SecondResidual, "e");
    let square = refusal("x: input[tokens, D], w0: weight[D, D], e: residual[tokens, D]) { (x + e) @ w0 }");
    assert_eq!((square.obstacle, square.term.as_str()), (inner, "x + e"));
    // With the residual in its place, the other obstacles are still found.
    residual(", l: adapter[K]) { l * relu(x @ w0) + e }", Obstacle::InnerActivation, "relu(x @ w0)");
    residual(") { relu(x @ w0) + silu(x @ w0) + e }", Obstacle::InnerActivation, "relu(x @ w0)");
    residual(") { relu(x @ w0 + 2) + e }", Obstacle::AddedConstant, "2.0");
    residual(", c: bias[K]) { relu(x @ w0) + c + e }", Obstacle::InnerActivation, "relu(x @ w0)");

    let doubling: String = (1..40).map(|i| format!("let e{i} = e{} + e{};", i - 1, i - 1)).collect();
    let operands = "x: input[tokens, D], w0: weight[D, K], e0: residual[tokens, K]";
    assert_eq!(refusal(&format!("{operands}) {{ {doubling} x @ w0 + e39 }}")).obstacle, Obstacle::TooLong);
}

#[test]
fn the_epilogue_is_that_of_the_equation() {
    use flora_ir::algebra::Epilogue;
    let operands = "x: input[tokens, D], w0: weight[D, K]";
    let epilogue = |rest: &str| normalize(&layer(&format!("layer f({operands}{rest}"))).unwrap().linear.epilogue();
    let (bias, residual) = (", c: bias[K]", ", e: residual[tokens, K]");
    let (identity, silu) = (Activation::Identity, Activation::Silu);
    assert!(epilogue(") { x @ w0 }").is_identity());
    for (rest, bias, activation, residual) in [
        (format!("{bias}) {{ x @ w0 + c }}"), true, identity, false),
        (") { silu(identity(x @ w0)) }".to_owned(), false, silu, false),
        (format!("{residual}) {{ e + silu(x @ w0) }}"), false, silu, true),
        (format!("{bias}{residual}) {{ silu(x @ w0 + c) + e }}"), true, silu, true),
        (format!("{bias}{residual}) {{ c + identity(x @ w0 + e) }}"), true, identity, true),
    ] {
        assert_eq!(epilogue(&rest), Epilogue { bias, activation, residual }, "{rest}");
        assert!(!epilogue(&rest).is_identity());
    }
}

#[test]
fn sums_that_multiply_out_without_bound_are_refused() {
    let doubling: String = (1..40).map(|i| format!("let y{i} = y{} + y{};", i - 1, i - 1)).collect();
    let error = refusal(&format!("x: input[tokens, D], w0: weight[D, K]) {{ let y0 = x @ w0; {doubling} y39 }}"));
    assert_eq!(error.obstacle, Obstacle::TooLong);
    let factor = "(w0 + b @ a + c @ a)";
    let product = [factor; 12].join(" * ");
    let operands = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], c: adapter[D, R], a: adapter[R, K]";
    assert!(matches!(
        refusal(&format!("{operands}) {{ x @ ({product}) }}")).obstacle,
        Obstacle::TooLong | Obstacle::DenseFactor
    ));
}

#[test]
fn a_long_sum_is_no_trouble() {
    let sum = ["x @ (w0 + s * (b @ a))"; 60].join(" + ");
    let operands = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], s: adapter[]";
    for (operands, sum) in
        [(operands.to_owned(), sum.clone()), (format!("{operands}, e: residual[tokens, K]"), format!("e + {sum}"))]
    {
        let linear = normalize(&layer(&format!("layer f({operands}) {{ {sum} }}"))).unwrap().linear;
        let layout = linear.layout(2);
        assert_eq!((layout.virtual_rows.len(), layout.low_rank), (1, 120));
    }
}

#[test]
fn the_layout_of_an_adapter_follows_from_its_equation() {
    let operands = "x: input[tokens, D], w0: weight[D, K], i: adapter[D], s: adapter[], l: adapter[K]";
    let row = |in_scale, out_scale| RowScales { in_scale, out_scale };
    for (equation, rows) in [
        ("l * ((s * i * x) @ w0)", vec![row(true, true)]),
        // The scalar goes into the vector of the input.
        ("s * ((i * x) @ w0) + l * (x @ w0)", vec![row(false, true), row(true, false)]),
        // A scale that happens to be 1 is a scale all the same.
        ("s * (x @ w0) + l * ((i * x) @ w0)", vec![row(false, true), row(true, true)]),
    ] {
        let layer = layer(&format!("layer f({operands}) {{ {equation} }}"));
        let linear = normalize(&layer).expect(equation).linear;
        let ones = |extent| Value::vector(vec![1.0; extent]);
        let mut adapter = Bindings::from_iter([("i", ones(3)), ("s", Value::scalar(1.0)), ("l", ones(4))]);
        adapter.insert_extent(Dimension::Symbol("K".to_owned()), 4);
        assert_eq!(linear.layout(0).virtual_rows, rows, "{equation}");
        assert_eq!(linear.fold(&adapter).expect(equation).layout(), linear.layout(0), "{equation}");
    }
    let fixed = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, 2], a: adapter[2, K]";
    let linear = normalize(&layer(&format!("layer f({fixed}) {{ x @ (w0 + b @ a) }}"))).unwrap().linear;
    assert_eq!(linear.layout(7).low_rank, 2);
}

#[test]
fn operands_keep_their_roles() {
    let source = format!(
        "layer f({OPERANDS}) {{ let w = w0 + s * (b @ a) * (1 + l); relu(i * j * x @ (w * k) + x @ ((d * e) @ c) + bias) }}"
    );
    let linear = normalize(&layer(&source)).unwrap().linear;
    let name = |operand| linear.layer.layer().operands[operand].name.as_str();
    assert_eq!((name(linear.input), name(linear.base_weight), linear.bias.map(name)), ("x", "w0", Some("bias")));
    assert_eq!(linear.activation, flora_ir::Activation::Relu);
    assert!(matches!(linear.terms[..], [ref base, ref scaled, ref plain]
        if base.core == Core::Base && base.inner.is_some() && scaled.outer.is_some() && plain.outer.is_none()));
}

#[test]
fn folding_reports_what_is_missing_or_does_not_fit() {
    let fold =
        |name: &str, bindings: &Bindings| normalize(builtin::builtin(name).unwrap()).unwrap().linear.fold(bindings);
    let matrix = |rows: usize, columns: usize, element: f64| {
        Value::matrix(rows, columns, vec![element; rows * columns]).unwrap()
    };

    let unbound = Bindings::from_iter([("b", matrix(5, 2, 1.0))]);
    assert!(
        matches!(fold("flora", &unbound), Err(FoldError::Evaluate(EvaluateError::Unbound { operand })) if operand == "a")
    );

    let mixed = Bindings::from_iter([("b", matrix(5, 2, 1.0)), ("a", matrix(3, 7, 1.0))]);
    assert!(matches!(fold("flora", &mixed), Err(FoldError::Evaluate(EvaluateError::ExtentMismatch { .. }))));

    let vector = Bindings::from_iter([("b", Value::vector(vec![1.0])), ("a", matrix(3, 7, 1.0))]);
    assert!(matches!(fold("flora", &vector), Err(FoldError::Evaluate(EvaluateError::WrongShape { .. }))));

    let empty = Bindings::from_iter([("b", matrix(5, 0, 1.0)), ("a", matrix(0, 7, 1.0))]);
    assert!(fold("flora", &empty).unwrap().virtual_rows.is_empty());
    assert!(matches!(fold("flora_mean", &empty), Err(FoldError::Evaluate(EvaluateError::EmptyMean))));

    let doubled = layer("layer f(x: input[tokens, D], w0: weight[D, K]) { 2 * (x @ w0) }");
    let doubled = normalize(&doubled).unwrap().linear;
    let mut bindings = Bindings::new();
    assert!(
        matches!(doubled.fold(&bindings), Err(FoldError::UnknownExtent { dimension }) if dimension.to_string() == "K")
    );
    bindings.insert_extent(Dimension::Symbol("K".to_owned()), 3);
    assert_eq!(doubled.fold(&bindings).unwrap().virtual_rows[0].out_scale, Some(vec![2.0; 3]));

    let mut dora = Bindings::from_iter([("b", matrix(5, 2, 0.0)), ("a", matrix(2, 7, 0.0)), ("w0", matrix(5, 7, 0.0))]);
    dora.insert("s", Value::scalar(1.0)).insert("m", Value::vector(vec![1.0; 7]));
    assert!(matches!(fold("dora", &dora), Err(FoldError::NotFinite { .. })), "the norm of a zero column is 0");

    let poisoned = Bindings::from_iter([("l", Value::vector(vec![f64::NAN, 1.0]))]);
    let row = &fold("ia3", &poisoned).unwrap().virtual_rows[0];
    assert!(row.out_scale.as_ref().is_some_and(|scale| scale[0].is_nan() && scale[1] == 1.0));
}

#[test]
fn applying_checks_every_shape() {
    let folded = normalize(builtin::builtin("lora").unwrap()).unwrap().linear;
    let bindings = bindings(builtin::builtin("lora").unwrap(), [2, 5, 7, 3], 1);
    let folded = folded.fold(&bindings).unwrap();
    let (x, w0) = (bindings.get("x").unwrap(), bindings.get("w0").unwrap());
    let apply = |x: &Value, w0: &Value, bias: Option<&Value>| folded.apply(x, w0, bias, Default::default());
    assert!(apply(x, w0, None).is_ok());
    assert!(matches!(apply(w0, x, None), Err(FoldError::WrongShape { what: "w0", .. })));
    assert!(matches!(apply(&Value::scalar(1.0), w0, None), Err(FoldError::WrongShape { what: "x", .. })));
    assert!(matches!(
        apply(x, w0, Some(&Value::vector(vec![1.0]))),
        Err(FoldError::WrongShape { what: "the bias", .. })
    ));
    let narrow = Value::matrix(5, 6, vec![1.0; 30]).unwrap();
    assert!(matches!(apply(x, &narrow, None), Err(FoldError::WrongShape { what: "an expand vector", .. })));
    let add = |residual: Option<&Value>| folded.apply_with_residual(x, w0, None, Default::default(), residual);
    let y = apply(x, w0, None).unwrap();
    assert_eq!(add(None).as_ref(), Ok(&y));
    let twice: Vec<f64> = y.data().iter().map(|y| y + y).collect();
    assert_eq!(add(Some(&y)).unwrap().data(), twice);
    for residual in [&Value::vector(vec![1.0; 7]), &Value::scalar(1.0), x] {
        assert!(matches!(add(Some(residual)), Err(FoldError::WrongShape { what: "the residual", .. })));
    }
}

/// What an adapter adds to its rows is folded into one vector, and no fold drops it.
#[test]
fn a_bias_of_an_adapter_is_an_offset() {
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K], s: adapter[], c: bias[K]) { relu(c + x @ w0 + (l * l + s)) }";
    let linear = normalize(&layer(source)).unwrap().linear;
    let bindings = Bindings::from_iter([("l", Value::vector(vec![1.0, 2.0, 3.0])), ("s", Value::scalar(0.5))]);
    let (folded, offset) = linear.fold_with_offset(&bindings).unwrap();
    assert_eq!((folded.virtual_rows, offset), (vec![VirtualRow::default()], Some(vec![1.5, 4.5, 9.5])));
    assert!(linear.bias.is_some() && linear.activation == Activation::Relu);
    assert!(matches!(linear.fold(&bindings), Err(FoldError::Offset { layer }) if layer == "f"));
    let large = Bindings::from_iter([("l", Value::vector(vec![1e30; 3])), ("s", Value::scalar(0.5))]);
    assert!(matches!(linear.fold_with_offset(&large), Err(FoldError::NotFinite { .. })));
    let plain = normalize(builtin::builtin("linear").unwrap()).unwrap().linear;
    assert_eq!(plain.fold_with_offset(&Bindings::new()).unwrap().1, None);
}

/// The rank of an elementwise product is the product of the ranks, whatever stands where.
#[test]
fn hadamard_products_of_low_rank_weights_have_the_product_of_their_ranks() {
    let operands = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], d: adapter[D, 2], \
        c: adapter[2, K], s: adapter[]";
    let (p, q) = ("(b @ a)", "(d @ c)");
    for (weight, counts) in [
        (format!("w0 + s * ({p} * {q})"), (1, 6)),
        (format!("w0 + {p} * {q} * {p}"), (1, 18)),
        (format!("w0 + {p} * ({q} * ({p} * (s * {q})))"), (1, 36)),
        (format!("w0 + ({p} * {q}) * ({p} * {q})"), (1, 36)),
        (format!("w0 + (({p} * {q}) * ({p} * {q})) * ({p} * {q})"), (1, 216)),
        (format!("w0 * ({p} * {q})"), (6, 0)),
        (format!("{p} * (w0 * {q})"), (6, 0)),
        (format!("w0 + w0 * (1 + {p} * {q}) * {p}"), (22, 0)),
        (format!("w0 * ({p} * {q} * {q} * {p})"), (36, 0)),
        (format!("({p} * {q}) * ({q} * w0) / s"), (12, 0)),
    ] {
        let source = format!("layer f({operands}) {{ x @ ({weight}) + s * (x @ (b @ a + d @ c)) }}");
        let layer = layer(&source);
        check(&layer, [2, 5, 7, 3], 1).unwrap();
        let layout = normalize(&layer).expect(&source).linear.layout(3);
        assert_eq!((layout.virtual_rows.len(), layout.low_rank - 5), counts, "{weight}");
    }
}

/// (I + u v) w0 (I + p q), its factors written on either side of w0 or around what it gives.
#[test]
fn square_low_rank_updates_of_the_identity_are_low_rank() {
    let operands =
        "x: input[tokens, D], w0: weight[D, K], u: adapter[D, R], v: adapter[R, D], p: adapter[K, R], q: adapter[R, K]";
    for (equation, rank) in [
        ("x @ (w0 + (u @ v) @ w0) + (x @ w0) @ (p @ q)", 2),
        ("x @ (w0 + u @ (v @ w0)) + ((x @ w0) @ p) @ q", 2),
        ("(x + (x @ u) @ v) @ (w0 + w0 @ (p @ q))", 2),
        ("let y = (x + (x @ u) @ v) @ w0; y + (y @ p) @ q", 3),
        ("let w = w0 + (u @ v) @ w0; x @ (w + w0 @ (p @ q))", 2),
    ] {
        let layer = layer(&format!("layer f({operands}) {{ {equation} }}"));
        check(&layer, [2, 5, 7, 3], 1).unwrap();
        let linear = normalize(&layer).expect(equation).linear;
        assert_eq!((linear.layout(1).virtual_rows.len(), linear.layout(1).low_rank), (1, rank), "{equation}");
        assert!(linear.reads_base_weight(), "{equation}");
    }
}

/// A layer of some of these operands, those that its equation names.
fn sparse_layer(equation: &str) -> VerifiedLayer {
    let operands = [
        "x: input[tokens, D]",
        "w0: weight[D, K]",
        "i: sparse[D, D]",
        "o: sparse[K, K]",
        "p: sparse[D, K]",
        "q: sparse[D, R]",
        "r: sparse[R, K]",
        "b: adapter[D, R]",
        "a: adapter[R, K]",
        "l: adapter[D]",
        "m: adapter[K]",
        "n: adapter[R]",
        "s: adapter[]",
    ];
    let words: Vec<&str> = equation.split(|letter: char| !letter.is_alphanumeric()).collect();
    let used = operands.into_iter().filter(|operand| words.contains(&operand.split(':').next().unwrap_or_default()));
    layer(&format!("layer f({}) {{ {equation} }}", used.collect::<Vec<_>>().join(", ")))
}

/// Sparse matrices before the base weight, behind it and beside it, with scales on every side, are what the equation says.
#[test]
fn sparse_matrices_are_transforms_and_sums() {
    // Whether it transforms inputs, transforms outputs, and how many products it adds.
    for (equation, parts) in [
        ("x @ (w0 + p)", (false, false, 1)),
        ("x @ (w0 + s * (m * p) / 2) + x @ (p * p)", (false, false, 2)),
        ("m * ((l * x) @ (w0 + p))", (false, false, 1)),
        ("x @ (w0 + s * (q @ r)) + m * ((n * ((l * x) @ q)) @ r)", (false, false, 2)),
        ("x @ (w0 + w0 * p)", (false, false, 1)),
        ("x @ (w0 + p + p)", (false, false, 2)),
        ("x @ (w0 + column_norm(w0) * (p @ o))", (false, false, 1)),
        ("x @ (i @ w0)", (true, false, 0)),
        ("s * (x @ (i / s @ w0)) * m", (true, false, 0)),
        ("m * ((s * (l * x)) @ ((i + i) @ w0)) + x @ p", (true, false, 1)),
        ("(x @ w0) @ o", (false, true, 0)),
        ("m * (x @ (w0 @ transpose(o)))", (false, true, 0)),
        ("m * (((s * (l * x)) @ w0) @ (m * o)) + (x @ q) @ (s * r)", (false, true, 1)),
    ] {
        let layer = sparse_layer(equation);
        check(&layer, [3, 5, 7, 2], 1).unwrap_or_else(|error| panic!("{equation}: {error}"));
        let linear = normalize(&layer).expect(equation).linear;
        let folded = linear.fold(&bindings(&layer, [3, 5, 7, 2], 1)).expect(equation);
        let SparseParts { inputs, outputs, added } = &folded.sparse;
        assert_eq!((inputs.is_some(), outputs.is_some(), added.len()), parts, "{equation}");
        assert!(linear.is_sparse() && !folded.sparse.is_empty());
        assert_eq!(linear.layout(2), folded.layout(), "{equation}");
        // The same from entries.
        let dense = bindings(&layer, [3, 5, 7, 2], 1);
        let mut entries = dense.clone();
        for (_, operand) in layer.layer().operands.iter().filter(|(_, operand)| operand.role == Role::Sparse) {
            let value = dense.get(&operand.name).expect("bound");
            let matrix = SparseMatrix::of_dense(value.shape()[0], value.shape()[1], value.data());
            entries.insert_sparse(&*operand.name, matrix);
        }
        assert_eq!(linear.fold(&entries).as_ref(), Ok(&folded), "{equation}");
        assert_eq!(evaluate_root(&layer, &entries), evaluate_root(&layer, &dense), "{equation}");
    }
}

/// What takes another form than a transform of all rows, or a sum, is refused with its term; where a dense form is right, it is taken.
#[test]
fn sparse_matrices_elsewhere_are_refused_or_dense() {
    for (equation, obstacle) in [
        ("x @ (w0 + i @ w0)", Obstacle::TransformBesideOthers),
        ("(x @ w0) @ o + (x @ b) @ a", Obstacle::TransformBesideOthers),
        ("((x @ w0) @ o) @ o", Obstacle::MatMulChain),
        ("(m * (x @ w0)) @ o", Obstacle::MatMulChain),
    ] {
        match normalize(&sparse_layer(equation)) {
            Err(error) => assert_eq!(error.obstacle, obstacle, "{equation}: {error}"),
            Ok(normalized) => panic!("{equation} is {}", normalized.derivation),
        }
    }
    for equation in [
        "((x @ i) @ w0) @ o",
        "x @ (w0 + q @ a)",
        "x @ (w0 + b @ r)",
        "x @ (w0 + matmul_mean(q, r))",
        "x @ (w0 + i @ (b @ a))",
    ] {
        // As many inputs as ranks: some are pairs of as many components as there are inputs.
        let layer = sparse_layer(equation);
        check(&layer, [3, 5, 7, 5], 1).unwrap_or_else(|error| panic!("{equation}: {error}"));
        assert!(!normalize(&layer).expect(equation).linear.is_sparse(), "{equation}");
    }
}

#[test]
fn sparse_matrices_that_do_not_fit_are_errors() {
    let layer = sparse_layer("x @ (i @ w0) + (x @ q) @ r");
    let bindings = bindings(&layer, [3, 5, 7, 2], 1);
    let linear = normalize(&layer).unwrap().linear;
    let folded = linear.fold(&bindings).unwrap();
    assert!(folded.check(5, 7).is_ok());
    for (d, k) in [(4, 7), (5, 6)] {
        assert!(matches!(folded.check(d, k), Err(FoldError::WrongShape { .. })), "{d} {k}");
    }
    let mut large = bindings.clone();
    large.insert("i", Value::matrix(5, 5, vec![1e39; 25]).unwrap());
    assert!(matches!(linear.fold(&large), Err(FoldError::NotFinite { .. })));
    let (x, w0) = (bindings.get("x").unwrap(), bindings.get("w0").unwrap());
    let y = folded.apply(x, w0, None, Activation::Identity).unwrap();
    let gradient = folded.gradient(x, w0, None, Activation::Identity, &y);
    assert!(matches!(gradient, Err(FoldError::SparseGradient { .. })));
    let unfolded = linear.unfolding().unfold(&bindings, &Default::default());
    assert!(matches!(unfolded, Err(FoldError::SparseGradient { layer }) if layer == "f"));
}

/// Each part's own weighted fold, put together, computes y₀ + Σᵢ wᵢ (yᵢ − y₀) of the equations as they are written.
#[test]
fn composed_adapters_add_up_what_each_changes() {
    let names = ["lora", "dora", "ia3", "ia3_feedforward", "hira", "flora"];
    let layers = names.map(|name| normalize(builtin::builtin(name).expect(name)).expect("a linear layer"));
    let sizes = [3, 5, 4, 2];
    let bound: Vec<_> =
        layers.iter().zip(1..).map(|(layer, seed)| bindings(&layer.linear.layer, sizes, seed)).collect();
    let first = &layers[0].linear;
    let operand = |handle| &first.layer.layer().operands[handle].name;
    let (x, w0) =
        (bound[0].get(operand(first.input)).expect("x"), bound[0].get(operand(first.base_weight)).expect("w0"));
    let sums: [&[(usize, f64)]; 6] = [
        &[(0, 0.7), (0, 0.3)],
        &[(0, 0.5), (1, -1.25), (2, 0.5)],
        &[(2, 0.5)],
        &[(3, -0.5), (4, 1.0)],
        &[(5, 1.0)],
        &[(1, 0.25), (3, 0.25), (5, 0.25), (2, 0.25)],
    ];
    let base = FoldedAdapter { virtual_rows: vec![VirtualRow::default()], ..FoldedAdapter::default() };
    let apply = |folded: &FoldedAdapter| folded.apply(x, w0, None, Activation::Identity).expect("vectors that fit");
    for parts in sums {
        let folded = |index: usize, weight| {
            let linear = &layers[index].linear;
            let mut own = bound[index].clone();
            own.insert(linear.layer.layer().operands[linear.base_weight].name.clone(), w0.clone());
            linear.fold_weighted(&own, weight).expect("tensors that fold").0
        };
        let weighted: Vec<_> = parts.iter().map(|(index, weight)| (*weight, folded(*index, *weight))).collect();
        let composed = FoldedAdapter::compose(weighted.iter().map(|(weight, part)| (*weight, part))).expect("a sum");
        let y0 = apply(&base);
        let mut expected = y0.data().to_vec();
        for (index, weight) in parts {
            let own = apply(&folded(*index, 1.0));
            for ((sum, own), base) in expected.iter_mut().zip(own.data()).zip(y0.data()) {
                *sum += weight * (own - base);
            }
        }
        let bound = sizes_of_products(&composed, x, w0).expect("vectors that fit");
        for ((found, expected), size) in apply(&composed).data().iter().zip(&expected).zip(bound.data()) {
            // Each part's own vectors are rounded once here and once in the sum.
            let limit = 2.0 * ROUNDED * (size + expected.abs() + 1.0);
            assert!((found - expected).abs() <= limit, "{parts:?}: {found} for {expected}");
        }
    }
    // One part with the weight 1 is that adapter, with no row of the base left; additive parts leave the base row as it is.
    let rows = |parts: &[(f64, FoldedAdapter)]| {
        FoldedAdapter::compose(parts.iter().map(|(weight, part)| (*weight, part))).expect("a sum").virtual_rows.len()
    };
    let own =
        |index: usize, weight| (weight, layers[index].linear.fold_weighted(&bound[index], weight).expect("it folds").0);
    assert_eq!([rows(&[own(2, 1.0)]), rows(&[own(2, 0.5)]), rows(&[own(0, 0.5), own(0, 9.0)])], [1, 2, 1]);
    let mut sparse = own(0, 1.0);
    sparse.1.sparse.inputs = Some(SparseMatrix::default());
    let refused = FoldedAdapter::compose([(1.0, &sparse.1)]);
    assert_eq!(refused, Err(flora_ir::algebra::ComposeError::Sparse));
}
