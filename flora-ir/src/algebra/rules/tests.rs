//! Every rule against the oracle: both sides are evaluated for every way of giving its letters types under which it
//! type-checks, on random values and odd sizes.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

use super::super::pattern::Letter;
use super::*;
use crate::evaluate::{Bindings, Value, evaluate_graph};
use crate::layer::Layer;
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};
use crate::verify::infer_types;

fn symbol(name: &str) -> Dimension {
    Dimension::Symbol(name.to_owned())
}

/// A shape and a rank axis.
type LetterType = (Shape, Option<Dimension>);

/// A rule's sides, with types.
type Instance = (Layer, Layer);

/// The types that a letter may have.
fn types_of(letter: Letter) -> Vec<LetterType> {
    let widths = || ["D", "K", "R", "P"].map(symbol).into_iter();
    let over_rank = || [None, Some(symbol("R"))].into_iter();
    match letter {
        Letter::Unprojected | Letter::Stream => widths()
            .flat_map(|width| over_rank().map(move |rank| (Shape::Matrix(Dimension::Tokens, width.clone()), rank)))
            .collect(),
        Letter::BaseWeight | Letter::WeightShaped => vec![(Shape::Matrix(symbol("D"), symbol("K")), None)],
        Letter::Transform => widths().map(|width| (Shape::Matrix(width.clone(), width), None)).collect(),
        Letter::Matrix | Letter::Factor | Letter::NarrowMatrix | Letter::OtherMatrix => widths()
            .flat_map(|rows| widths().map(move |columns| (Shape::Matrix(rows.clone(), columns), None)))
            .collect(),
        Letter::Scalar => vec![(Shape::Scalar, None)],
        Letter::Scale => {
            std::iter::once((Shape::Scalar, None)).chain(widths().map(|n| (Shape::Vector(n), None))).collect()
        }
        Letter::Residual => widths().map(|width| (Shape::Matrix(Dimension::Tokens, width), None)).collect(),
        Letter::Other => [Letter::Stream, Letter::Scale, Letter::RankScale].into_iter().flat_map(types_of).collect(),
        Letter::RankScale => std::iter::once((Shape::Scalar, Some(symbol("R"))))
            .chain(widths().map(|n| (Shape::Vector(n), Some(symbol("R")))))
            .collect(),
    }
}

/// `layer` with its operands' types replaced by those of the letters of the same name.
fn typed(layer: &Layer, types: &[(String, LetterType)]) -> Layer {
    let mut typed = Layer { operands: Default::default(), ..layer.clone() };
    for (_, operand) in layer.operands.iter() {
        let mut operand = operand.clone();
        if let Some((_, (shape, rank_axis))) = types.iter().find(|(name, _)| *name == operand.name) {
            let (element, scope) = (ElementType::F32, Scope::PerSegment);
            operand.ty = TensorType { shape: shape.clone(), rank_axis: rank_axis.clone(), element, scope };
        }
        typed.operands.push(operand);
    }
    typed
}

/// The type of the whole equation, where it has one.
fn root_type(layer: &Layer) -> Option<TensorType> {
    infer_types(layer, &[], &mut Vec::new()).pop().flatten()
}

/// Every pair of typed sides that the rewriting would accept.
fn instances(rule: &Rule) -> Vec<Instance> {
    let letters: Vec<(String, Vec<LetterType>)> = rule
        .from
        .layer()
        .operands
        .iter()
        .map(|(_, operand)| (operand.name.clone(), types_of(Letter::named(&operand.name).unwrap())))
        .collect();
    // Each number below the product of their counts is a choice of a type for every letter.
    let count: usize = letters.iter().map(|(_, types)| types.len()).product();
    let choices = (0..count).map(|mut number| {
        let mut choice = Vec::with_capacity(letters.len());
        for (name, types) in &letters {
            choice.push((name.clone(), types[number % types.len()].clone()));
            number /= types.len();
        }
        choice
    });
    let sides = choices.filter_map(|choice| {
        let from = typed(rule.from.layer(), &choice);
        let before = root_type(&from)?;
        let to = typed(rule.to.layer(), &choice);
        let after = root_type(&to)?;
        (before.shape == after.shape && before.rank_axis == after.rank_axis).then_some((from, to))
    });
    sides.collect()
}

#[test]
fn the_table_is_well_formed() {
    assert_eq!(rules().len(), TABLE.len(), "a rule does not parse, or uses a letter without meaning");
    for (index, (rule, instances)) in INSTANCES.iter().enumerate() {
        assert!(rules()[..index].iter().all(|other| other.name != rule.name), "two rules are called {}", rule.name);
        assert!(!instances.is_empty(), "{} can never apply", rule.name);
        let declares = |side: &Layer, name: &str| side.operands.iter().any(|(_, operand)| operand.name == name);
        for (_, operand) in rule.from.layer().operands.iter() {
            assert!(declares(rule.to.layer(), &operand.name), "{} loses {}", rule.name, operand.name);
        }
    }
}

static INSTANCES: LazyLock<Vec<(&Rule, Vec<Instance>)>> =
    LazyLock::new(|| rules().iter().map(|rule| (rule, instances(rule))).collect());

/// Numbers away from zero, so that divisions stay well-conditioned.
fn number() -> impl Strategy<Value = f64> {
    (0.5f64..2.0, any::<bool>()).prop_map(|(size, negative)| if negative { -size } else { size })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0xF10A),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_rule_equals_the_oracle(
        sizes in [1usize..6, 1usize..8, 1usize..8, 1usize..4, 1usize..4],
        numbers in prop::collection::vec(number(), 97),
    ) {
        let extent = |dimension: &Dimension| match dimension {
            Dimension::Tokens => sizes[0],
            Dimension::Symbol(name) => sizes[1 + "DKRP".find(name.as_str()).unwrap()],
            Dimension::Fixed(extent) => *extent as usize,
            Dimension::Product(..) => unreachable!("no letter stands for pairs"),
        };
        for (rule, sides) in INSTANCES.iter() {
            for (from, to) in sides {
                let mut bindings = Bindings::new();
                for (index, (_, operand)) in from.operands.iter().enumerate() {
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
                let value = |side: &Layer| evaluate_graph(side, &[side.root.unwrap()], &bindings).unwrap().remove(0);
                let before = value(from);
                let after = value(to);
                prop_assert_eq!(before.extents(), after.extents());
                for (before, after) in before.data().iter().zip(after.data()) {
                    // Both sides are f64 sums of at most a few hundred products below 2^7.
                    let is_close = (before - after).abs() <= 1e-10 * (1.0 + before.abs());
                    prop_assert!(is_close, "{}: {} is not {}", rule.name, before, after);
                }
            }
        }
    }
}
