//! The gradients of an equation's operands, as nodes of one graph.

use super::graph::Graph;
use super::reverse::Reversed;
use crate::arena::Handle;
use crate::evaluate::{Bindings, EvaluateError, evaluate_graph};
use crate::layer::{Layer, Node, Operand};
use crate::text::print_values;

/// A graph, and in it the gradient of each operand that was asked for.
#[derive(Clone, Debug)]
pub(super) struct OperandGradients {
    layer: Layer,
    /// `None` for an operand that norms alone read: its gradient is 0.
    operands: Vec<(String, Option<Handle<Node>>)>,
}

impl OperandGradients {
    pub(super) fn new(graph: Graph, reversed: &Reversed, operands: impl Iterator<Item = Handle<Operand>>) -> Self {
        let layer = graph.layer;
        let of = |operand| (layer.operands[operand].name.clone(), reversed.gradients.get(&operand).copied());
        let operands = operands.map(of).collect();
        Self { layer, operands }
    }

    /// Every operand of the graph, gradients that are given among them.
    pub(super) fn graph_operands(&self) -> impl Iterator<Item = &Operand> {
        self.layer.operands.iter().map(|(_, operand)| operand)
    }

    fn nodes(&self) -> Vec<Handle<Node>> {
        self.operands.iter().filter_map(|(_, node)| *node).collect()
    }

    /// The gradients by the operands' names, from the values of all that they read.
    pub(super) fn evaluate(&self, bindings: &Bindings) -> Result<Bindings, EvaluateError> {
        let mut values = evaluate_graph(&self.layer, &self.nodes(), bindings)?.into_iter();
        let gradient = |(name, node): &(String, Option<Handle<Node>>)| {
            let unbound = || EvaluateError::Unbound { operand: name.clone() };
            let value = match node {
                Some(_) => values.next().ok_or_else(unbound)?,
                None => bindings.get(name).ok_or_else(unbound)?.zeros(),
            };
            Ok((name.clone(), value))
        };
        self.operands.iter().map(gradient).collect()
    }

    /// What the gradients share, a `let` each; and each operand's name with its gradient in the text form.
    pub(super) fn equations(&self) -> (String, Vec<(&str, String)>) {
        let (lets, texts) = print_values(&self.layer, &self.nodes());
        let mut texts = texts.into_iter();
        let mut text = |node: &Option<_>| node.and_then(|_| texts.next()).unwrap_or_else(|| "0".to_owned());
        (lets, self.operands.iter().map(|(name, node)| (name.as_str(), text(node))).collect())
    }
}
