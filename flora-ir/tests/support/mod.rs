//! What several test files need: seeded configurations, random graphs, random values.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::HashMap;

use flora_ir::{
    Activation, Dimension, ElementType, Handle, Layer, Node, Operand, Operator, Reduce, Role, Scope, Shape, TensorType,
};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

/// `cases` cases from a fixed seed, so that every run tests the same ones.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Any graph whatever, well-typed or not: each choice is an operation and what it reads.
pub(crate) fn layer_from_choices(choices: &[[u8; 3]]) -> Layer {
    let mut layer = Layer::new("random");
    let mut operands = Vec::new();
    for (index, role) in [Role::Input, Role::BaseWeight, Role::Bias, Role::Adapter].into_iter().enumerate() {
        let n = Dimension::Symbol("N".to_owned());
        let shape = [Shape::Scalar, Shape::Vector(n.clone()), Shape::Matrix(n, Dimension::Tokens)][index % 3].clone();
        let element = [ElementType::F32, ElementType::F16, ElementType::BF16][index % 3];
        let scope = if role == Role::Adapter { Scope::PerSegment } else { Scope::Shared };
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
            match operation % 12 {
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

type Pairs = HashMap<Handle<Node>, Handle<Node>>;

fn same_node(
    one: &Layer,
    a: Handle<Node>,
    other: &Layer,
    b: Handle<Node>,
    forth: &mut Pairs,
    back: &mut Pairs,
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
