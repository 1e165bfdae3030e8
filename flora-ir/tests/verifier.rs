//! The verifier, one mistake each: it is found, at its place, with a mend, and nothing else is reported.

use flora_ir::{
    Diagnostic, Dimension, ElementType, Layer, Node, Operand, Operator, Reduce, Role, Scope, Shape, Span, TensorType,
    parse, verify,
};

fn mistakes(source: &str) -> Vec<Diagnostic> {
    verify(parse(source).expect("the text form is right")).expect_err("the verifier must refuse it")
}

/// The only mistake of `source` must say `message` and point at `place`.
#[track_caller]
fn refuses(source: &str, place: &str, message: &str) {
    let mistakes = mistakes(source);
    assert_eq!(mistakes.len(), 1, "{mistakes:#?}");
    let mistake = &mistakes[0];
    assert!(mistake.message.contains(message), "{}", mistake.message);
    assert!(!mistake.help.is_empty());
    assert_eq!(&source[mistake.span.start as usize..mistake.span.end as usize], place);
    assert!(mistake.render("layer", source).contains(&mistake.message));
}

const LOW_RANK: &str = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]";

#[track_caller]
fn refuses_low_rank(equation: &str, place: &str, message: &str) {
    refuses(&format!("layer f({LOW_RANK}) {{ {equation} }}"), place, message);
}

#[test]
fn accepts_every_builtin() {
    for name in flora_ir::builtin::names() {
        assert!(flora_ir::builtin::builtin(name).is_some(), "{name}");
    }
}

#[test]
fn matmul_dimensions_that_do_not_meet() {
    refuses_low_rank("x @ (w0 * (a @ b))", "a @ b", "does not meet");
}

#[test]
fn ranks_mixed_up() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[P, K]) { x @ (w0 + b @ a) }",
        "b @ a",
        "would contract R with P",
    );
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[P, K]) {
            sum_rank(rows(a) * ((columns(b) * x) @ w0)) }",
        "rows(a) * ((columns(b) * x) @ w0)",
        "two different rank axes",
    );
}

#[test]
fn matmul_with_a_vector() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K]) { x @ w0 + x @ l }",
        "x @ l",
        "must be a matrix",
    );
}

#[test]
fn elementwise_shapes_that_do_not_broadcast() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[D]) { l * (x @ w0) }",
        "l * (x @ w0)",
        "broadcast",
    );
    refuses("layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[D]) { x @ (w0 * l) }", "w0 * l", "broadcast");
    refuses_low_rank("x @ (w0 + b) + x @ (b @ a)", "w0 + b", "broadcast");
}

#[test]
fn rank_axis_left_at_the_root() {
    refuses_low_rank(
        "rows(a) * ((columns(b) * x) @ w0)",
        "rows(a) * ((columns(b) * x) @ w0)",
        "still has the rank axis",
    );
}

#[test]
fn rank_axis_missing() {
    refuses_low_rank("sum_rank(x @ (w0 * (b @ a)))", "sum_rank(x @ (w0 * (b @ a)))", "no rank axis");
}

#[test]
fn columns_and_rows_of_what_is_no_adapter_matrix() {
    let vector = "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K]) ";
    refuses(&format!("{vector}{{ sum_rank(rows(l) * (x @ w0)) }}"), "rows(l)", "needs a matrix");
    refuses(&format!("{vector}{{ sum_rank(columns(l) * (x @ w0)) }}"), "columns(l)", "needs a matrix");
    refuses_low_rank("x @ (w0 * (b @ a)) + mean_rank(columns(x))", "columns(x)", "tokens");
}

#[test]
fn norms() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K]) { x @ w0 / column_norm(l) }",
        "column_norm(l)",
        "needs a matrix",
    );
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K]) { x @ w0 / column_norm(x @ w0) }",
        "column_norm(x @ w0)",
        "mix the rows",
    );
}

#[test]
fn transposes() {
    let layer = |rest: &str| format!("layer f(x: input[tokens, D], w0: weight[D, K], {rest}");
    let transposed = layer("a: adapter[K, R], b: adapter[D, R]) { x @ (w0 * (b @ transpose(a))) }");
    assert!(verify(parse(&transposed).unwrap()).is_ok());
    refuses(&layer("l: adapter[K]) { transpose(l) * (x @ w0) }"), "transpose(l)", "needs a matrix");
    refuses(&layer("l: adapter[K]) { l * transpose(x @ w0) }"), "transpose(x @ w0)", "columns of the tokens");
}

#[test]
fn the_number_of_inputs_and_base_weights() {
    refuses("layer f(w0: weight[D, K], w1: adapter[T, D]) { w1 @ w0 }", "", "no input");
    refuses("layer f(x: input[tokens, D], w0: adapter[D, K]) { x @ w0 }", "", "no base weight");
    refuses("layer f(x: input[tokens, D], y: input[tokens, D], w0: weight[D, K]) { (x + y) @ w0 }", "y", "one input");
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], w1: weight[D, K]) { x @ (w0 + w1) }",
        "w1",
        "one base weight",
    );
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], e: residual[tokens, K], f: residual[tokens, K]) { x @ w0 + e + f }",
        "f",
        "one residual",
    );
}

#[test]
fn residuals() {
    let residual = |shape: &str, equation: &str, place: &str, message: &str| {
        let operands = format!("x: input[tokens, D], w0: weight[D, K], e: residual[{shape}]");
        refuses(&format!("layer f({operands}) {{ {equation} }}"), place, message);
    };
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], e: residual[tokens, K]) { relu(x @ w0) + e }";
    let layer = verify(parse(source).unwrap()).unwrap();
    assert_eq!(layer.residual(), layer.operand_named("e"));
    let without = verify(parse("layer f(x: input[tokens, D], w0: weight[D, K]) { x @ w0 }").unwrap()).unwrap();
    assert_eq!(without.residual(), None);
    for shape in ["", "K", "D, K", "K, tokens", "tokens, tokens"] {
        residual(shape, "x @ w0 + e", "e", "must be [tokens, k]");
    }
    residual("tokens, D", "x @ w0 + e", "x @ w0 + e", "don't broadcast");
    residual("tokens, R", "x @ w0 + e", "x @ w0 + e", "don't broadcast");
    residual("tokens, K", "x @ w0", "e", "does not depend on operand `e`");
    residual("tokens, D", "(x + e) @ w0 + column_norm(e) * (x @ w0)", "column_norm(e)", "mix the rows");
    residual("tokens, D", "e @ w0", "x", "does not depend on operand `x`");
}

#[test]
fn declarations() {
    refuses(
        "layer f(x: input[D, tokens], w0: weight[D, K], l: adapter[K]) { l * (x @ w0) }",
        "x",
        "must be [tokens, d]",
    );
    refuses("layer f(x: input[tokens, D], w0: weight[D, K], c: bias[]) { x @ w0 + c }", "c", "bias must be a vector");
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], c: adapter[tokens, K]) { x @ w0 + c }",
        "c",
        "only the input and the residual",
    );
}

#[test]
fn an_operand_that_is_not_used() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K], l: adapter[K]) { x @ w0 }",
        "l",
        "does not depend on operand `l`",
    );
}

#[test]
fn an_output_that_is_no_row_per_token() {
    refuses(
        "layer f(x: input[tokens, D], w0: weight[D, K]) { let y = x @ w0; w0 }",
        "w0",
        "output must be [tokens, k]",
    );
}

#[test]
fn all_mistakes_are_reported_without_cascades() {
    let source =
        format!("layer f({LOW_RANK}, l: adapter[K], m: adapter[K]) {{ relu(l * (x @ (w0 * (a @ b)))) + columns(l) }}");
    let found: Vec<String> = mistakes(&source).into_iter().map(|mistake| mistake.message).collect();
    assert_eq!(found.len(), 3, "{found:#?}");
}

fn operand(name: &str, role: Role, shape: Shape) -> Operand {
    let scope = if role == Role::Adapter { Scope::PerSegment } else { Scope::Shared };
    let ty = TensorType { shape, rank_axis: None, element: ElementType::F32, scope };
    Operand { name: name.to_owned(), role, ty }
}

fn symbol(name: &str) -> Dimension {
    Dimension::Symbol(name.to_owned())
}

/// x @ w0, to be broken.
fn linear(x: &str, w0: &str) -> Layer {
    let mut layer = Layer::new("f");
    let x = layer.declare(operand(x, Role::Input, Shape::Matrix(Dimension::Tokens, symbol("D"))), Span::default());
    let w0 = layer.declare(operand(w0, Role::BaseWeight, Shape::Matrix(symbol("D"), symbol("K"))), Span::default());
    let lhs = layer.push(Node::Operand(x), Span::default());
    let rhs = layer.push(Node::Operand(w0), Span::default());
    layer.root = Some(layer.push(Node::MatMul { lhs, rhs, reduce: Reduce::Sum }, Span::default()));
    layer
}

#[track_caller]
fn refuses_graph(layer: Layer, message: &str) {
    let mistakes = verify(layer).expect_err("the verifier must refuse it");
    assert_eq!(mistakes.len(), 1, "{mistakes:#?}");
    assert!(mistakes[0].message.contains(message), "{}", mistakes[0].message);
}

#[test]
fn graphs_that_no_text_can_write() {
    assert!(verify(linear("x", "w0")).is_ok());
    refuses_graph(linear("x", "x"), "two operands are called `x`");
    refuses_graph(linear("x", "let"), "can't be the name");
    refuses_graph(linear("x", "w 0"), "can't be the name");

    let mut scaled = linear("x", "w0");
    let constant = scaled.push(Node::Constant(f64::NAN), Span::default());
    let product = Node::Elementwise { operator: Operator::Multiply, lhs: scaled.root.unwrap(), rhs: constant };
    scaled.root = Some(scaled.push(product, Span::default()));
    refuses_graph(scaled, "not a finite number");

    let mut empty = linear("x", "w0");
    empty.root = None;
    refuses_graph(empty, "no output");

    let mut ranked = linear("x", "w0");
    let mut extra = operand("c", Role::Adapter, Shape::Scalar);
    extra.ty.rank_axis = Some(symbol("R"));
    let c = ranked.declare(extra, Span::default());
    let value = ranked.push(Node::Operand(c), Span::default());
    let value = ranked.push(Node::ReduceRank { reduce: Reduce::Sum, value }, Span::default());
    let product = Node::Elementwise { operator: Operator::Multiply, lhs: ranked.root.unwrap(), rhs: value };
    ranked.root = Some(ranked.push(product, Span::default()));
    refuses_graph(ranked, "can't have a rank axis");

    let mut shared = linear("x", "w0");
    let mut extra = operand("c", Role::Adapter, Shape::Scalar);
    extra.ty.scope = Scope::Shared;
    let c = shared.declare(extra, Span::default());
    let rhs = shared.push(Node::Operand(c), Span::default());
    let product = Node::Elementwise { operator: Operator::Multiply, lhs: shared.root.unwrap(), rhs };
    shared.root = Some(shared.push(product, Span::default()));
    refuses_graph(shared, "role and its scope");

    let mut segmented = linear("x", "w0");
    let mut extra = operand("e", Role::Residual, Shape::Matrix(Dimension::Tokens, symbol("K")));
    extra.ty.scope = Scope::PerSegment;
    let e = segmented.declare(extra, Span::default());
    let rhs = segmented.push(Node::Operand(e), Span::default());
    let sum = Node::Elementwise { operator: Operator::Add, lhs: segmented.root.unwrap(), rhs };
    segmented.root = Some(segmented.push(sum, Span::default()));
    refuses_graph(segmented, "role and its scope");
}

#[test]
fn what_belongs_to_gradients() {
    use flora_ir::{Axis, Backward};
    let value = linear("x", "w0").root.unwrap();
    for backward in [
        Backward::Extent { axis: Axis::Columns, value },
        Backward::SumLike { value, like: value },
        Backward::BroadcastLike { value, like: value },
        Backward::Derivative { function: flora_ir::Activation::Silu, value },
    ] {
        let mut layer = linear("x", "w0");
        let rhs = layer.push(Node::Backward(backward), Span::default());
        layer.root =
            Some(layer.push(Node::Elementwise { operator: Operator::Multiply, lhs: value, rhs }, Span::default()));
        refuses_graph(layer, "operation of the backward pass");
    }
}

#[test]
fn handles_of_other_layers() {
    let mut other = linear("x", "w0");
    let far = other.push(Node::Constant(1.0), Span::default());
    let stranger = other.declare(operand("c", Role::Adapter, Shape::Scalar), Span::default());

    let mut forward = linear("x", "w0");
    let root = forward.root.unwrap();
    // `far` is the handle that this very node gets.
    forward.root =
        Some(forward.push(Node::Elementwise { operator: Operator::Add, lhs: root, rhs: far }, Span::default()));
    refuses_graph(forward, "which is not before it");

    let mut rootless = linear("x", "w0");
    rootless.root = Some(far);
    let mistakes = verify(rootless).unwrap_err();
    assert!(mistakes.iter().any(|mistake| mistake.message.contains("does not exist")), "{mistakes:#?}");

    let mut unknown = linear("x", "w0");
    let lhs = unknown.root.unwrap();
    let rhs = unknown.push(Node::Operand(stranger), Span::default());
    unknown.root = Some(unknown.push(Node::Elementwise { operator: Operator::Multiply, lhs, rhs }, Span::default()));
    refuses_graph(unknown, "does not exist");
}

#[test]
fn an_empty_graph_lists_what_is_missing() {
    let found: Vec<String> = verify(Layer::new("f")).unwrap_err().into_iter().map(|mistake| mistake.message).collect();
    assert_eq!(found, ["the layer has no input", "the layer has no base weight", "the layer has no output"]);
}

#[test]
fn a_graph_that_is_too_large() {
    let mut layer = linear("x", "w0");
    for _ in 0..flora_ir::verify::MAX_NODES {
        let value = layer.root.unwrap();
        layer.root =
            Some(layer.push(Node::Activation { function: flora_ir::Activation::Relu, value }, Span::default()));
    }
    refuses_graph(layer, "too large");
}
