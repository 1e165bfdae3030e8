//! Reverse mode: from the gradients of some values to those of the operands that they depend on.

use std::collections::BTreeMap;

use super::graph::Graph;
use super::rules::GradientRule;
use crate::arena::Handle;
use crate::layer::{Backward, Layer, Node, Operand, Operator};

/// What reverse mode found.
pub(super) struct Reversed {
    /// The gradient of each wanted operand that a seed depends on through differentiable operations.
    pub(super) gradients: BTreeMap<Handle<Operand>, Handle<Node>>,
    /// The rules that were used, in the order of their use.
    pub(super) rules: Vec<&'static GradientRule>,
}

/// Adds to `graph` the gradients of the operands that `is_wanted` names. A seed is a value and its gradient, which may have more
/// rows, elements or ranks than the value: those are summed.
pub(super) fn reverse(
    graph: &mut Graph,
    seeds: &[(Handle<Node>, Handle<Node>)],
    is_wanted: impl Fn(&Operand) -> bool,
) -> Reversed {
    let forward = graph.layer.clone();
    let needed = needed(&forward, is_wanted);
    let mut gradients: Vec<Option<Handle<Node>>> = vec![None; forward.nodes.len()];
    for (value, gradient) in seeds {
        let gradient = graph.push(Node::Backward(Backward::SumLike { value: *gradient, like: *value }));
        add(graph, &mut gradients, *value, gradient);
    }
    let mut reversed = Reversed { gradients: BTreeMap::new(), rules: Vec::new() };
    for (value, node) in forward.nodes.iter().rev().filter(|(value, _)| needed[value.index()]) {
        let Some(gradient) = gradients[value.index()] else { continue };
        if let Node::Operand(operand) = node {
            let sum = match reversed.gradients.get(operand) {
                Some(known) => graph.binary(Operator::Add, *known, gradient),
                None => gradient,
            };
            reversed.gradients.insert(*operand, sum);
        }
        let Some(rule) = GradientRule::of(node) else { continue };
        for (operand, part) in node.operands().zip(&rule.parts).filter(|(operand, _)| needed[operand.index()]) {
            let part = write(graph, part, |letter| match letter {
                "g" => Some(gradient),
                "y" => Some(value),
                "m" => node.operands().next(),
                "n" => node.operands().nth(1),
                _ => None,
            });
            if let Some(part) = part {
                add(graph, &mut gradients, operand, part);
            }
            if !reversed.rules.iter().any(|known| known.operation == rule.operation) {
                reversed.rules.push(rule);
            }
        }
    }
    reversed
}

/// Whether a node depends on a wanted operand through operations that have gradients, for each node.
fn needed(layer: &Layer, is_wanted: impl Fn(&Operand) -> bool) -> Vec<bool> {
    let mut needed: Vec<bool> = Vec::with_capacity(layer.nodes.len());
    for (_, node) in layer.nodes.iter() {
        let is_needed = match node {
            Node::Operand(operand) => layer.operands.get(*operand).is_some_and(&is_wanted),
            node => {
                let passes = GradientRule::of(node).is_some_and(|rule| !rule.parts.is_empty());
                passes && node.operands().any(|operand| needed.get(operand.index()) == Some(&true))
            }
        };
        needed.push(is_needed);
    }
    needed
}

/// Adds `gradient` to what `value` has.
fn add(graph: &mut Graph, gradients: &mut [Option<Handle<Node>>], value: Handle<Node>, gradient: Handle<Node>) {
    let sum = match gradients[value.index()] {
        Some(known) => graph.binary(Operator::Add, known, gradient),
        None => gradient,
    };
    gradients[value.index()] = Some(sum);
}

/// A rule's equation on the values that its letters stand for; `None` for a letter without meaning, which a test of the table finds.
fn write(graph: &mut Graph, part: &Layer, letter: impl Fn(&str) -> Option<Handle<Node>>) -> Option<Handle<Node>> {
    let mut written: Vec<Handle<Node>> = Vec::with_capacity(part.nodes.len());
    for (_, node) in part.nodes.iter() {
        written.push(match node {
            Node::Operand(operand) => letter(&part.operands.get(*operand)?.name)?,
            other => {
                let node = other.map_operands(|operand| written[operand.index()]);
                match node {
                    // What is transposed twice is what it was.
                    Node::Transpose(value) => match graph.layer.nodes.get(value) {
                        Some(Node::Transpose(original)) => *original,
                        _ => graph.push(node),
                    },
                    node => graph.push(node),
                }
            }
        });
    }
    written.get(part.root?.index()).copied()
}
