//! What several test files need: seeded configurations, random graphs, random values.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod equations;
pub(crate) mod loss;

use std::collections::HashMap;

use flora_ir::{
    Activation, Bindings, Dimension, ElementType, Handle, Layer, Node, Operand, Operator, Pairs, Reduce, Role, Shape,
    TensorType, Value, VerifiedLayer, parse, verify,
};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

/// `cases` cases from a fixed seed, so that every run tests the same ones; more where PROPTEST_CASES asks for more.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(0);
    ProptestConfig {
        cases: cases.max(asked),
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Cases of a fuzz test: 20 for each of `FLORA_FUZZ_CASES`, because a text takes a twentieth of a file's time; or 256.
pub(crate) fn fuzz_cases() -> u32 {
    let asked = std::env::var("FLORA_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok());
    asked.map_or(256, |cases: u32| cases.saturating_mul(20))
}

/// A graph over square matrices, so that it often type-checks, to whose output what `choices` build is added. The first
/// choice says whether it has a residual, and whether that is kept out of the other operations.
pub(crate) fn square_layer_from_choices(choices: &[[u8; 3]]) -> Layer {
    let mut layer = Layer::new("square");
    let d = || Dimension::Symbol("D".to_owned());
    let matrix = Shape::Matrix(d(), d());
    let shapes = [
        ("x", Role::Input, Shape::Matrix(Dimension::Tokens, d())),
        ("w0", Role::BaseWeight, matrix.clone()),
        ("b", Role::Adapter, matrix.clone()),
        ("a", Role::Adapter, matrix),
        ("l", Role::Adapter, Shape::Vector(d())),
    ];
    let residual = ("e", Role::Residual, Shape::Matrix(Dimension::Tokens, d()));
    let [has_residual, is_last] =
        choices.first().map_or([false; 2], |[_, first, second]| [first, second].map(|bits| bits & 8 != 0));
    let mut nodes = Vec::new();
    for (name, role, shape) in shapes.into_iter().chain(has_residual.then_some(residual)) {
        let scope = role.scope();
        let ty = TensorType { shape, rank_axis: None, element: ElementType::F32, scope };
        let operand = layer.declare(Operand { name: name.to_owned(), role, ty }, Default::default());
        nodes.push(layer.push(Node::Operand(operand), Default::default()));
    }
    // A summand that reads everything.
    let [x, w0, b, a, l, ref residual @ ..] = nodes[..] else { return layer };
    let residual = residual.first().copied();
    let product = layer.push(Node::MatMul { lhs: b, rhs: a, reduce: Reduce::Sum }, Default::default());
    let product = layer.push(multiply(product, w0), Default::default());
    let product = layer.push(Node::MatMul { lhs: x, rhs: product, reduce: Reduce::Sum }, Default::default());
    let scaled = layer.push(multiply(product, l), Default::default());
    layer.root = residual.map(|rhs| layer.push(add(scaled, rhs), Default::default())).or(Some(scaled));
    nodes.retain(|node| !is_last || Some(*node) != residual);
    nodes.push(scaled);
    for [operation, first, second] in choices {
        // Later nodes are likelier, so that the graph grows deep.
        let pick = |choice: u8| nodes[nodes.len() - 1 - usize::from(choice).min(nodes.len() - 1)];
        let (lhs, rhs) = (pick(first % 8), pick(second % 8));
        let node = match operation % 9 {
            0 | 1 => Node::MatMul { lhs, rhs, reduce: Reduce::Sum },
            2 => Node::MatMul { lhs, rhs, reduce: Reduce::Mean },
            3 | 4 => multiply(lhs, rhs),
            5 => Node::Elementwise { operator: Operator::Divide, lhs, rhs },
            6 => Node::Transpose(lhs),
            7 => Node::PairProduct { pairs: [Pairs::Columns, Pairs::Rows][usize::from(*second) % 2], lhs, rhs },
            _ => add(lhs, rhs),
        };
        // What doesn't type-check is left out; what can't be a summand of the output is a part of later nodes.
        let mut attempt = layer.clone();
        let node = attempt.push(node, Default::default());
        if verify(attempt.clone()).is_err() {
            continue;
        }
        nodes.push(node);
        layer = attempt.clone();
        attempt.root = Some(attempt.push(add(layer.root.unwrap_or(node), node), Default::default()));
        if verify(attempt.clone()).is_ok() {
            layer = attempt;
        }
    }
    layer
}

fn multiply(lhs: Handle<Node>, rhs: Handle<Node>) -> Node {
    Node::Elementwise { operator: Operator::Multiply, lhs, rhs }
}

fn add(lhs: Handle<Node>, rhs: Handle<Node>) -> Node {
    Node::Elementwise { operator: Operator::Add, lhs, rhs }
}

/// Any graph whatever, well-typed or not: each choice is an operation and what it reads.
pub(crate) fn layer_from_choices(choices: &[[u8; 3]]) -> Layer {
    let mut layer = Layer::new("random");
    let mut operands = Vec::new();
    let roles = [Role::Input, Role::BaseWeight, Role::Bias, Role::Adapter, Role::Residual];
    for (index, role) in roles.into_iter().enumerate() {
        let n = Dimension::Symbol("N".to_owned());
        let shape = [Shape::Scalar, Shape::Vector(n.clone()), Shape::Matrix(n, Dimension::Tokens)][index % 3].clone();
        let element = [ElementType::F32, ElementType::F16, ElementType::BF16][index % 3];
        let scope = role.scope();
        let ty = TensorType { shape, rank_axis: None, element, scope };
        operands.push(layer.declare(Operand { name: format!("t{index}"), role, ty }, Default::default()));
    }
    let mut nodes: Vec<Handle<Node>> = Vec::new();
    for [operation, first, second] in choices {
        let leaf = Node::Operand(operands[usize::from(*first) % operands.len()]);
        let node = if nodes.is_empty() {
            leaf
        } else {
            let lhs = nodes[usize::from(*first) % nodes.len()];
            let rhs = nodes[usize::from(*second) % nodes.len()];
            match operation % 14 {
                0 => leaf,
                1 => Node::Constant((f64::from(*first) - 100.0) * 0.37),
                2 => Node::MatMul { lhs, rhs, reduce: Reduce::Sum },
                3 => Node::MatMul { lhs, rhs, reduce: Reduce::Mean },
                4 => Node::Elementwise { operator: Operator::Add, lhs, rhs },
                5 => Node::Elementwise { operator: Operator::Multiply, lhs, rhs },
                6 => Node::Elementwise { operator: Operator::Divide, lhs, rhs },
                7 => Node::Columns(lhs),
                8 => Node::Rows(lhs),
                9 => Node::ReduceRank { reduce: [Reduce::Sum, Reduce::Mean][usize::from(*second) % 2], value: lhs },
                10 => Node::ColumnNorm(lhs),
                11 => Node::Transpose(lhs),
                12 => Node::PairProduct { pairs: [Pairs::Columns, Pairs::Rows][usize::from(*second) % 2], lhs, rhs },
                _ => Node::Activation { function: Activation::ALL[usize::from(*second) % 5], value: lhs },
            }
        };
        nodes.push(layer.push(node, Default::default()));
    }
    layer.root = nodes.last().copied();
    layer
}

/// Whether two layers are the same graph: the same operands, and roots that agree node by node, with the same inner nodes
/// shared. How often an operand or a constant is mentioned makes no difference, nor does the order of the arena.
pub(crate) fn same_graph(one: &Layer, other: &Layer) -> bool {
    let (Some(one_root), Some(other_root)) = (one.root, other.root) else {
        return one.root.is_none() && other.root.is_none();
    };
    let (mut forth, mut back) = (HashMap::new(), HashMap::new());
    one.name == other.name
        && one.operands == other.operands
        && same_node(one, one_root, other, other_root, &mut forth, &mut back)
}

type Partners = HashMap<Handle<Node>, Handle<Node>>;

fn same_node(
    one: &Layer,
    a: Handle<Node>,
    other: &Layer,
    b: Handle<Node>,
    forth: &mut Partners,
    back: &mut Partners,
) -> bool {
    match (&one.nodes[a], &other.nodes[b]) {
        (Node::Operand(a), Node::Operand(b)) => return a == b,
        (Node::Constant(a), Node::Constant(b)) => return a.to_bits() == b.to_bits(),
        _ => {}
    }
    match (forth.get(&a), back.get(&b)) {
        (Some(known), Some(_)) => return *known == b,
        (None, None) => {}
        _ => return false,
    }
    forth.insert(a, b);
    back.insert(b, a);
    let (one_node, other_node) = (&one.nodes[a], &other.nodes[b]);
    let shape = |node: &Node| node.map_operands(|_| a);
    shape(one_node) == shape(other_node)
        && one_node.operands().zip(other_node.operands()).all(|(a, b)| same_node(one, a, other, b, forth, back))
}

/// The extent of a dimension, for the extents `[tokens, D, K, R]`.
pub(crate) fn extent(dimension: &Dimension, sizes: [usize; 4]) -> usize {
    match dimension {
        Dimension::Tokens => sizes[0],
        Dimension::Symbol(name) => sizes[1 + "DKR".find(name.as_str()).expect("D, K or R")],
        Dimension::Fixed(extent) => *extent as usize,
        Dimension::Product(first, second) => extent(first, sizes) * extent(second, sizes),
    }
}

/// Values for every operand of `layer`, with the extents `[tokens, D, K, R]`, drawn from `seed`.
pub(crate) fn bindings(layer: &VerifiedLayer, sizes: [usize; 4], seed: u64) -> Bindings {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut number = || {
        // A linear congruential generator: the test's own, so that a seed gives the same values for ever.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let unit = (state >> 11) as f64 / (1u64 << 53) as f64;
        if state & (1 << 60) == 0 { 0.5 + unit } else { -0.5 - unit }
    };
    let operands = layer.layer().operands.iter().map(|(_, operand)| {
        let is_sparse = operand.role == Role::Sparse;
        let number_at = |at: usize, number: f64| if is_sparse && at % 3 == 1 { 0.0 } else { number };
        let mut numbers = |count| (0..count).map(|at| number_at(at, number())).collect::<Vec<f64>>();
        let value = match &operand.ty.shape {
            Shape::Scalar => Value::scalar(numbers(1)[0]),
            Shape::Vector(n) => Value::vector(numbers(extent(n, sizes))),
            Shape::Matrix(m, n) => {
                let (m, n) = (extent(m, sizes), extent(n, sizes));
                Value::matrix(m, n, numbers(m * n)).expect("m * n numbers")
            }
        };
        (operand.name.clone(), value)
    });
    operands.collect()
}

/// A shared bias, and what an adapter adds.
pub(crate) fn with_offset(bias: Option<&Value>, offset: Option<&[f32]>) -> Option<Value> {
    let Some(offset) = offset else { return bias.cloned() };
    let bias = bias.map_or_else(|| vec![0.0; offset.len()], |bias| bias.data().to_vec());
    Some(Value::vector(bias.iter().zip(offset).map(|(bias, offset)| bias + f64::from(*offset)).collect()))
}

/// Whether two values agree to `tolerance`, relative to the largest element.
pub(crate) fn is_close(one: &Value, other: &Value, tolerance: f64) -> bool {
    let largest = one.data().iter().fold(1.0f64, |largest, element| largest.max(element.abs()));
    one.extents() == other.extents()
        && one.data().iter().zip(other.data()).all(|(one, other)| (one - other).abs() <= tolerance * largest)
}

/// A verified layer from its text.
pub(crate) fn layer(source: &str) -> VerifiedLayer {
    let layer = parse(source).unwrap_or_else(|error| panic!("{}", error.diagnostic.render("layer", source)));
    verify(layer).unwrap_or_else(|mistakes| {
        panic!("{}", mistakes.iter().map(|mistake| mistake.render("layer", source)).collect::<String>())
    })
}
