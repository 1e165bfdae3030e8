//! The gradient of the input is an adapted linear too: over w0ᵀ, with the scales of input and output exchanged and every pair
//! transposed. So it is a layer like any other, and whatever computes layers computes it.

use super::graph::fresh_name;
use crate::algebra::{Core, NormalForm, NormalizeError, Normalized, Obstacle, Term, normalize};
use crate::arena::Handle;
use crate::layer::{Layer, Node, Operand, Operator, Reduce, Role, Span};
use crate::types::{Dimension, Shape, TensorType};
use crate::verify::{VerifiedLayer, verify};

impl NormalForm {
    /// The layer that gives dx: a sum of terms `inner ∘ coreᵀ(outer ∘ g)` over w0ᵀ, `[k, d]`. Its input is g, `[tokens, k]`, the
    /// gradient of the sum before bias, activation and residual, which it has none of, nor an offset. Its adapter's operands are
    /// those of this layer's that the terms read.
    ///
    /// # Errors
    /// [`Obstacle::TooLong`] when the layer is beyond the verifier's limits.
    pub fn adjoint(&self) -> Result<Normalized, NormalizeError> {
        let too_long = || NormalizeError::at(&self.layer, self.layer.root(), Obstacle::TooLong);
        let adjoint = Adjoint::new(self).ok_or_else(too_long)?.layer(&self.terms).ok_or_else(too_long)?;
        normalize(&adjoint)
    }
}

/// One run of [`NormalForm::adjoint`].
struct Adjoint<'l> {
    forward: &'l VerifiedLayer,
    layer: Layer,
    /// This layer's operand for each of the forward's that its terms read.
    operands: Vec<Option<Handle<Operand>>>,
    copied: Vec<Option<Handle<Node>>>,
    g: Handle<Node>,
    base_weight: Handle<Operand>,
}

impl<'l> Adjoint<'l> {
    /// Declares the operands; `None` where the forward's have other shapes than the verifier allows.
    fn new(linear: &'l NormalForm) -> Option<Self> {
        let forward = linear.layer.layer();
        let (input, base_weight) = (forward.operands.get(linear.input)?, forward.operands.get(linear.base_weight)?);
        let Shape::Matrix(d, k) = base_weight.ty.shape.clone() else { return None };
        let mut layer = Layer::new(fresh_name(&Layer::new(""), &format!("{}_adjoint", forward.name)));
        let g = fresh_name(forward, "g");
        let transposed = fresh_name(forward, &format!("{}_transposed", base_weight.name));
        let (mut g_operand, mut transposed_operand) = (None, None);
        let is_read = |operand| linear.values_of_terms().any(|value| forward.depends_on(value, operand));
        let mut operands = vec![None; forward.operands.len()];
        for (handle, operand) in forward.operands.iter() {
            let span = forward.operand_span(handle);
            match operand.role {
                Role::Input => {
                    let shape = Shape::Matrix(Dimension::Tokens, k.clone());
                    let ty = TensorType { shape, ..input.ty.clone() };
                    g_operand = Some(layer.declare(Operand { name: g.clone(), role: Role::Input, ty }, span));
                }
                Role::BaseWeight => {
                    let ty = TensorType { shape: Shape::Matrix(k.clone(), d.clone()), ..operand.ty.clone() };
                    let operand = Operand { name: transposed.clone(), role: Role::BaseWeight, ty };
                    transposed_operand = Some(layer.declare(operand, span));
                }
                Role::Adapter | Role::Sparse if !is_read(handle) => {}
                Role::Adapter | Role::Sparse => operands[handle.index()] = Some(layer.declare(operand.clone(), span)),
                Role::Bias | Role::Residual => {}
            }
        }
        let g = layer.push(Node::Operand(g_operand?), Span::default());
        let copied = vec![None; forward.nodes.len()];
        Some(Self { forward: &linear.layer, layer, operands, copied, g, base_weight: transposed_operand? })
    }

    /// The sum of the terms, verified.
    fn layer(mut self, terms: &[Term]) -> Option<VerifiedLayer> {
        for term in terms {
            let term = self.term(term)?;
            self.layer.root = Some(match self.layer.root {
                Some(sum) => self.elementwise(Operator::Add, sum, term),
                None => term,
            });
        }
        verify(self.layer).ok()
    }

    fn push(&mut self, node: Node) -> Handle<Node> {
        self.layer.push(node, Span::default())
    }

    fn elementwise(&mut self, operator: Operator, lhs: Handle<Node>, rhs: Handle<Node>) -> Handle<Node> {
        self.push(Node::Elementwise { operator, lhs, rhs })
    }

    /// `inner ∘ coreᵀ(outer ∘ g)`
    fn term(&mut self, term: &Term) -> Option<Handle<Node>> {
        let g = self.scaled(term.outer, self.g)?;
        let value = match term.core {
            Core::Base => {
                let rhs = self.push(Node::Operand(self.base_weight));
                self.push(Node::MatMul { lhs: g, rhs, reduce: Reduce::Sum })
            }
            Core::Multiplicative { b, a, reduce } => {
                let (columns, rows) = (self.transposed(a)?, self.transposed(b)?);
                let (columns, rows) = (self.push(Node::Columns(columns)), self.push(Node::Rows(rows)));
                let lhs = self.elementwise(Operator::Multiply, columns, g);
                let rhs = self.push(Node::Operand(self.base_weight));
                let projected = self.push(Node::MatMul { lhs, rhs, reduce: Reduce::Sum });
                let value = self.elementwise(Operator::Multiply, rows, projected);
                self.push(Node::ReduceRank { reduce, value })
            }
            Core::Additive { b, a, reduce } => {
                let (shrink, expand) = (self.transposed(a)?, self.transposed(b)?);
                let lhs = self.matmul(g, shrink);
                self.push(Node::MatMul { lhs, rhs: expand, reduce })
            }
            Core::TransformedInputs(matrix) => {
                let (w0, matrix) = (self.push(Node::Operand(self.base_weight)), self.transposed(matrix)?);
                let projected = self.matmul(g, w0);
                self.matmul(projected, matrix)
            }
            Core::TransformedOutputs(matrix) => {
                let (w0, matrix) = (self.push(Node::Operand(self.base_weight)), self.transposed(matrix)?);
                let transformed = self.matmul(g, matrix);
                self.matmul(transformed, w0)
            }
            Core::Sparse { first, second } => {
                let lhs = match second {
                    Some(second) => {
                        let second = self.transposed(second)?;
                        self.matmul(g, second)
                    }
                    None => g,
                };
                let first = self.transposed(first)?;
                self.matmul(lhs, first)
            }
        };
        self.scaled(term.inner, value)
    }

    fn matmul(&mut self, lhs: Handle<Node>, rhs: Handle<Node>) -> Handle<Node> {
        self.push(Node::MatMul { lhs, rhs, reduce: Reduce::Sum })
    }

    fn scaled(&mut self, scale: Option<Handle<Node>>, value: Handle<Node>) -> Option<Handle<Node>> {
        let Some(scale) = scale else { return Some(value) };
        let scale = self.copy(scale)?;
        Some(self.elementwise(Operator::Multiply, scale, value))
    }

    /// The forward's `node`, transposed; what is transposed already as it was before.
    fn transposed(&mut self, node: Handle<Node>) -> Option<Handle<Node>> {
        match self.forward.layer().nodes.get(node)? {
            Node::Transpose(value) => self.copy(*value),
            Node::Operand(operand) if *operand == self.forward.base_weight() => {
                Some(self.push(Node::Operand(self.base_weight)))
            }
            _ => {
                let value = self.copy(node)?;
                Some(self.push(Node::Transpose(value)))
            }
        }
    }

    /// The forward's `node`, which is known when an adapter is loaded, with w0 read from its transposed. The depth is bounded by
    /// the verifier's limit on nodes.
    fn copy(&mut self, node: Handle<Node>) -> Option<Handle<Node>> {
        if let Some(copied) = *self.copied.get(node.index())? {
            return Some(copied);
        }
        let copied = match self.forward.layer().nodes.get(node)? {
            Node::Operand(operand) if *operand == self.forward.base_weight() => {
                let transposed = self.push(Node::Operand(self.base_weight));
                self.push(Node::Transpose(transposed))
            }
            Node::Operand(operand) => {
                let operand = (*self.operands.get(operand.index())?)?;
                self.push(Node::Operand(operand))
            }
            Node::Transpose(value) if self.reads_as_base_weight(*value) => self.push(Node::Operand(self.base_weight)),
            operation => {
                let mut operands = Vec::new();
                for operand in operation.operands() {
                    operands.push(self.copy(operand)?);
                }
                let mut operands = operands.into_iter();
                self.push(operation.map_operands(|old| operands.next().unwrap_or(old)))
            }
        };
        self.copied[node.index()] = Some(copied);
        Some(copied)
    }

    fn reads_as_base_weight(&self, node: Handle<Node>) -> bool {
        self.forward.layer().nodes.get(node) == Some(&Node::Operand(self.forward.base_weight()))
    }
}
