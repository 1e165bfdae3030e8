//! Builds the layer that the program will hold and checks it with flora's own verifier and algebra, so that a mistake in an
//! equation reads the same here and in a layer read from a file.

use flora_ir::algebra::normalize;
use flora_ir::{Diagnostic, Handle, Layer, Node, Operand, VerifiedLayer, verify};
use proc_macro2::Span;
use syn::ext::IdentExt;

use crate::ast::{Equation, Expression, ExpressionKind, Output, Unary};
use crate::mistakes::{at, both, none, over};

/// The layer of `equation`: the verifier accepts it, its output is the declared one, and it has a normal form.
pub(crate) fn check(equation: &Equation) -> syn::Result<Layer> {
    let Built { layer, tokens, .. } = build(equation);
    let located = |diagnostic: &Diagnostic| {
        // The empty span is the verifier's for what is missing from the layer as a whole.
        let part = tokens.get(diagnostic.span.start as usize).filter(|_| diagnostic.span.end > diagnostic.span.start);
        at(part.copied().unwrap_or(equation.name.span()), &diagnostic.message, &diagnostic.help)
    };
    match verify(layer.clone()) {
        Ok(verified) => {
            let normal = normalize(&verified).map_err(|error| located(&error.diagnostic()));
            both(agree(&equation.output, &verified), normal).map(|_| layer)
        }
        Err(diagnostics) => {
            // Without a word of what is wrong it would still be no layer.
            let unexplained =
                at(equation.name.span(), "the verifier refuses this layer", "report this as a defect of flora");
            none(diagnostics.iter().map(located)).and(Err(unexplained))
        }
    }
}

/// That the declared return type is the output's.
fn agree(output: &Output, verified: &VerifiedLayer) -> syn::Result<()> {
    let inferred = verified.type_of(verified.root());
    let disagreement = |declared: String, inferred: String| {
        let message = format!("the output is declared {declared}, but the equation makes it {inferred}");
        Err(over(&output.tokens, message, "declare what the equation computes, or mend the equation"))
    };
    match output.element {
        _ if output.shape != inferred.shape => disagreement(output.shape.to_string(), inferred.shape.to_string()),
        Some(element) if element != inferred.element => {
            disagreement(element.name().to_owned(), inferred.element.name().to_owned())
        }
        _ => Ok(()),
    }
}

/// A layer being built; its spans are positions in `tokens`.
struct Built {
    layer: Layer,
    tokens: Vec<Span>,
    operands: Vec<Handle<Operand>>,
    bindings: Vec<Handle<Node>>,
}

fn build(equation: &Equation) -> Built {
    let layer = Layer::new(equation.name.unraw().to_string());
    let mut built = Built { layer, tokens: Vec::new(), operands: Vec::new(), bindings: Vec::new() };
    for parameter in &equation.parameters {
        let span = built.mark(parameter.span);
        let (name, declared) = (parameter.name.clone(), &parameter.declared);
        let operand = Operand { name, role: declared.role, ty: declared.ty.clone() };
        built.operands.push(built.layer.declare(operand, span));
    }
    for binding in &equation.bindings {
        let value = built.expression(binding);
        built.bindings.push(value);
    }
    built.layer.root = Some(built.expression(&equation.result));
    built
}

impl Built {
    fn mark(&mut self, token: Span) -> flora_ir::Span {
        let start = self.tokens.len() as u32;
        self.tokens.push(token);
        flora_ir::Span { start, end: start + 1 }
    }

    fn expression(&mut self, expression: &Expression) -> Handle<Node> {
        let node = match &expression.kind {
            ExpressionKind::Binding(position) => return self.bindings[*position],
            ExpressionKind::Parameter(position) => Node::Operand(self.operands[*position]),
            ExpressionKind::Number(number) => Node::Constant(*number),
            ExpressionKind::Elementwise(operator, lhs, rhs) => {
                Node::Elementwise { operator: *operator, lhs: self.expression(lhs), rhs: self.expression(rhs) }
            }
            ExpressionKind::MatMul(reduce, lhs, rhs) => {
                Node::MatMul { lhs: self.expression(lhs), rhs: self.expression(rhs), reduce: *reduce }
            }
            ExpressionKind::PairProduct(pairs, lhs, rhs) => {
                Node::PairProduct { pairs: *pairs, lhs: self.expression(lhs), rhs: self.expression(rhs) }
            }
            ExpressionKind::Unary(function, value) => {
                let value = self.expression(value);
                match *function {
                    Unary::Columns => Node::Columns(value),
                    Unary::Rows => Node::Rows(value),
                    Unary::ReduceRank(reduce) => Node::ReduceRank { reduce, value },
                    Unary::ColumnNorm => Node::ColumnNorm(value),
                    Unary::Transpose => Node::Transpose(value),
                    Unary::Activation(function) => Node::Activation { function, value },
                }
            }
        };
        let span = self.mark(expression.span);
        self.layer.push(node, span)
    }
}
