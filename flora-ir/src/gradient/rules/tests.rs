//! Every row against central differences of its operation, for every way of giving its letters types under which it type-checks,
//! on random values and odd sizes.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

use super::super::graph::Graph;
use super::super::reverse::reverse;
use super::*;
use crate::evaluate::{Bindings, Value, evaluate_graph};
use crate::layer::{Activation, Pairs, Reduce};
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};
use crate::verify::infer_types;

fn symbol(name: &str) -> Dimension {
    Dimension::Symbol(name.to_owned())
}

/// Every shape, with and without a rank axis.
fn types() -> Vec<TensorType> {
    let widths = || ["D", "K", "R"].map(symbol).into_iter();
    let vectors = widths().map(Shape::Vector);
    let matrices = widths().flat_map(|m| widths().map(move |n| Shape::Matrix(m.clone(), n)));
    let shapes = std::iter::once(Shape::Scalar).chain(vectors).chain(matrices);
    let with_rank = |shape: Shape| {
        [None, Some(symbol("R"))].map(|rank_axis| TensorType {
            shape: shape.clone(),
            rank_axis,
            element: ElementType::F32,
            scope: Scope::PerSegment,
        })
    };
    shapes.flat_map(with_rank).collect()
}

/// The operation of `rule` on operands of every types that it takes, with the gradient of its value as an operand `dy`.
fn instances(rule: &GradientRule) -> Vec<Graph> {
    let types = types();
    let mut choices = vec![Vec::new()];
    for _ in rule.pattern.operands.iter() {
        choices = choices
            .iter()
            .flat_map(|choice| types.iter().map(move |ty| [&choice[..], std::slice::from_ref(ty)].concat()))
            .collect();
    }
    let typed = |choice: Vec<TensorType>| {
        let mut layer = Layer { operands: Default::default(), ..rule.pattern.clone() };
        for ((_, operand), ty) in rule.pattern.operands.iter().zip(choice) {
            let mut operand = operand.clone();
            operand.ty = ty;
            layer.operands.push(operand);
        }
        let types: Option<Vec<TensorType>> = infer_types(&layer, &[], &mut Vec::new()).into_iter().collect();
        Some(Graph::typed(layer, types?))
    };
    choices.into_iter().filter_map(typed).collect()
}

#[test]
fn the_table_is_well_formed() {
    assert_eq!(rules().len(), TABLE.len(), "a row does not parse");
    for (index, rule) in rules().iter().enumerate() {
        assert!(rules()[..index].iter().all(|other| other.operation != rule.operation), "{} twice", rule.operation);
        let names = |layer: &Layer| layer.operands.iter().map(|(_, letter)| letter.name.clone()).collect::<Vec<_>>();
        let letters = names(&rule.pattern);
        assert!(letters == ["m"] || letters == ["m", "n"], "{}", rule.operation);
        assert!(rule.parts.is_empty() || rule.parts.len() == letters.len(), "{}", rule.operation);
        for letter in rule.parts.iter().flat_map(names) {
            assert!(letters.contains(&letter) || letter == "g" || letter == "y", "{letter} in {}", rule.operation);
        }
        assert!(!instances(rule).is_empty(), "{} can never apply", rule.operation);
    }
}

#[test]
fn every_operation_of_a_layer_has_a_row() {
    let mut layer = Layer::new("all");
    let value = layer.push(Node::Constant(1.0), Default::default());
    let reductions = [Reduce::Sum, Reduce::Mean];
    let operators = [crate::Operator::Add, crate::Operator::Multiply, crate::Operator::Divide];
    let mut nodes = vec![Node::Columns(value), Node::Rows(value), Node::ColumnNorm(value), Node::Transpose(value)];
    nodes.extend(reductions.map(|reduce| Node::MatMul { lhs: value, rhs: value, reduce }));
    nodes.extend(reductions.map(|reduce| Node::ReduceRank { reduce, value }));
    nodes.extend(operators.map(|operator| Node::Elementwise { operator, lhs: value, rhs: value }));
    nodes.extend([Pairs::Columns, Pairs::Rows].map(|pairs| Node::PairProduct { pairs, lhs: value, rhs: value }));
    nodes.extend(Activation::ALL.map(|function| Node::Activation { function, value }));
    let missing: Vec<_> = nodes.iter().filter(|node| GradientRule::of(node).is_none()).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert_eq!(nodes.len(), rules().len());
}

/// What a row gives for one choice of types.
struct Instance {
    rule: &'static GradientRule,
    forward: Layer,
    graph: Graph,
    gradients: Vec<(Handle<crate::Operand>, Handle<Node>)>,
}

static INSTANCES: LazyLock<Vec<Instance>> = LazyLock::new(|| {
    let differentiated = |rule: &'static GradientRule, mut graph: Graph| {
        let forward = graph.layer.clone();
        let root = forward.root.expect("a row has an operation");
        let (_, dy) = graph.declare("dy", graph.type_of(root).expect("typed").clone());
        let gradients = reverse(&mut graph, &[(root, dy)], |operand| operand.name != "dy").gradients;
        Instance { rule, forward, graph, gradients: gradients.into_iter().collect() }
    };
    rules().iter().flat_map(|rule| instances(rule).into_iter().map(move |graph| differentiated(rule, graph))).collect()
});

/// Numbers away from zero, where a quotient and relu have no derivative.
fn number() -> impl Strategy<Value = f64> {
    (0.5f64..2.0, any::<bool>()).prop_map(|(size, negative)| if negative { -size } else { size })
}

fn extent(dimension: &Dimension, sizes: &[usize; 3]) -> usize {
    match dimension {
        Dimension::Symbol(name) => sizes["DKR".find(name.as_str()).unwrap()],
        Dimension::Fixed(extent) => *extent as usize,
        Dimension::Tokens => 1,
        Dimension::Product(first, second) => extent(first, sizes) * extent(second, sizes),
    }
}

/// Of two powers of two, so that a moved number is exact but for a rounding.
const STEP: f64 = 1.0 / (1 << 13) as f64;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 8,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_row_equals_differences(
        sizes in [1usize..6, 1usize..6, 1usize..4],
        numbers in prop::collection::vec(number(), 97),
    ) {
        let extent = |dimension: &Dimension| extent(dimension, &sizes);
        for Instance { rule, forward, graph, gradients } in INSTANCES.iter() {
            let mut bindings = Bindings::new();
            for (index, (_, operand)) in graph.layer.operands.iter().enumerate() {
                let shape: Vec<usize> = match &operand.ty.shape {
                    Shape::Scalar => vec![],
                    Shape::Vector(n) => vec![extent(n)],
                    Shape::Matrix(m, n) => vec![extent(m), extent(n)],
                };
                let rank = operand.ty.rank_axis.as_ref().map(extent);
                let count = rank.unwrap_or(1) * shape.iter().product::<usize>();
                let data = numbers.iter().cycle().skip(index * 31).take(count).copied().collect();
                bindings.insert(operand.name.clone(), Value::new(rank, shape, data).unwrap());
            }
            prop_assert_eq!(gradients.is_empty(), rule.gradients.is_empty(), "{}", rule.operation);
            let loss = |bindings: &Bindings| -> (f64, f64) {
                let y = evaluate_graph(forward, &[forward.root.unwrap()], bindings).unwrap().remove(0);
                let products = y.data().iter().zip(bindings.get("dy").unwrap().data()).map(|(y, dy)| y * dy);
                products.fold((0.0, 0.0), |(sum, size), product: f64| (sum + product, size + product.abs()))
            };
            for (operand, node) in gradients {
                let name = &graph.layer.operands[*operand].name;
                let value = bindings.get(name).unwrap().clone();
                let gradient = evaluate_graph(&graph.layer, &[*node], &bindings).unwrap().remove(0);
                prop_assert_eq!(gradient.extents(), value.extents(), "{} in {}", name, rule.operation);
                for (index, found) in gradient.data().iter().enumerate() {
                    let difference = |step: f64| {
                        let at = |step: f64| {
                            let mut data = value.data().to_vec();
                            data[index] += step;
                            let mut moved = bindings.clone();
                            moved.insert(name.clone(), Value::new(value.rank_extent(), value.shape().to_vec(), data).unwrap());
                            loss(&moved)
                        };
                        let ((above, size), (below, _)) = (at(step), at(-step));
                        ((above - below) / (2.0 * step), size)
                    };
                    // A difference D(h) is off by a third of D(2h) - D(h), by a term of h^4 (7e-18 times a fifth derivative, of
                    // 1/n at 0.5 below 1e4), and by the roundings of at most 6^3 sums over 6 products, each of the size of the
                    // loss's summands, a product's factors among them at most 4 times as large: 2e3 u F / h.
                    let ((near, size), (far, _)) = (difference(STEP), difference(2.0 * STEP));
                    let bound = (far - near).abs() / 3.0 + 2e3 * f64::EPSILON * (1.0 + size) / STEP;
                    prop_assert!(
                        (found - near).abs() <= bound,
                        "{}: d{}[{}] is {}, the difference {}", rule.operation, name, index, found, near
                    );
                }
            }
        }
    }
}
