//! A graph of values that gradients are added to. Equal operations are one node, so that what several gradients need is computed
//! once.

use crate::arena::Handle;
use crate::infer::infer;
use crate::layer::{Backward, Layer, Node, Operand, Operator, Role, Span};
use crate::types::{ElementType, Scope, TensorType};
use crate::verify::{VerifiedLayer, is_identifier};

/// An equation and what is derived from it. It contracts over tokens, so it is no layer that the verifier accepts.
#[derive(Clone, Debug)]
pub(super) struct Graph {
    pub(super) layer: Layer,
    /// The type of each node, where the typing rules give one.
    types: Vec<Option<TensorType>>,
}

impl Graph {
    pub(super) fn of(layer: &VerifiedLayer) -> Self {
        let types = layer.layer().nodes.iter().map(|(node, _)| layer.type_of(node).clone()).collect();
        Self::typed(layer.layer().clone(), types)
    }

    /// A graph whose nodes have the types `types`.
    pub(super) fn typed(layer: Layer, types: Vec<TensorType>) -> Self {
        Self { layer, types: types.into_iter().map(Some).collect() }
    }

    /// `node`, as it is known already or anew.
    pub(super) fn push(&mut self, node: Node) -> Handle<Node> {
        if let Some((known, _)) = self.layer.nodes.iter().find(|(_, known)| **known == node) {
            return known;
        }
        // A sum over nothing is what it sums.
        if let Node::Backward(Backward::SumLike { value, like }) = node
            && let (Some(from), Some(to)) = (self.type_of(value), self.type_of(like))
            && (&from.shape, &from.rank_axis) == (&to.shape, &to.rank_axis)
        {
            return value;
        }
        let known = node.operands().all(|operand| self.type_of(operand).is_some());
        let ty = if known { infer(&self.layer, &node, |operand| self.known_type(operand)).ok() } else { None };
        self.types.push(ty);
        self.layer.push(node, Span::default())
    }

    pub(super) fn type_of(&self, node: Handle<Node>) -> Option<&TensorType> {
        self.types.get(node.index())?.as_ref()
    }

    /// The type of a node that is known to have one.
    fn known_type(&self, node: Handle<Node>) -> &TensorType {
        self.type_of(node).expect("the caller has looked")
    }

    pub(super) fn binary(&mut self, operator: Operator, lhs: Handle<Node>, rhs: Handle<Node>) -> Handle<Node> {
        self.push(Node::Elementwise { operator, lhs, rhs })
    }

    /// The value of a new operand: a gradient that is given. It is called `name`, or otherwise where that is taken.
    pub(super) fn declare(&mut self, name: &str, ty: TensorType) -> (String, Handle<Node>) {
        let name = fresh_name(&self.layer, name);
        let ty = TensorType { element: ElementType::F32, scope: Scope::PerSegment, ..ty };
        let operand = Operand { name: name.clone(), role: Role::Adapter, ty };
        let operand = self.layer.declare(operand, Span::default());
        (name, self.push(Node::Operand(operand)))
    }
}

/// `wanted`, or with a number behind it where an operand of `layer` has that name or it is no name.
pub(super) fn fresh_name(layer: &Layer, wanted: &str) -> String {
    let is_taken = |name: &str| layer.operands.iter().any(|(_, operand)| operand.name == name);
    if is_identifier(wanted) && !is_taken(wanted) {
        return wanted.to_owned();
    }
    let short = if is_identifier(wanted) && wanted.len() < 48 { wanted } else { "value" };
    let numbered = (1..).map(|number| format!("{short}{number}")).find(|name| !is_taken(name));
    numbered.unwrap_or_else(|| wanted.to_owned())
}
