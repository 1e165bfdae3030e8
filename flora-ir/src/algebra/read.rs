//! Reads the adapted linear off an equation that the rules are done with.

use super::obstacle::{NormalizeError, Obstacle, blame, misplaced_residual};
use super::pattern::Subject;
use super::{Core, NormalForm, Term};
use crate::arena::Handle;
use crate::layer::{Activation, Node, Operator, Reduce, Role};
use crate::types::Scope;
use crate::verify::VerifiedLayer;

/// The most summands of a normal form.
pub const MAX_TERMS: usize = 256;

/// φ(Σ terms + offset + bias) + residual
pub(super) fn read(layer: &VerifiedLayer) -> Result<NormalForm, NormalizeError> {
    let subject = Subject::new(layer);
    if let Some(error) = misplaced_residual(&subject) {
        return Err(error);
    }
    let (residuals, outermost): (Vec<_>, Vec<_>) =
        summands(&subject, layer.root())?.into_iter().partition(|summand| subject.is_residual(*summand));
    if let Some(second) = residuals.get(1) {
        return Err(NormalizeError::at(layer, *second, Obstacle::SecondResidual));
    }
    let activated = match outermost[..] {
        [only] => Some(subject.node(only)),
        _ => None,
    };
    let (activation, sum) = match activated {
        Some(Node::Activation { function, value }) => (*function, summands(&subject, *value)?),
        _ => (Activation::Identity, outermost),
    };
    let (mut terms, mut offset, mut bias) = (Vec::new(), Vec::new(), None);
    let mut places = Vec::new();
    for summand in sum {
        match *subject.node(summand) {
            Node::Operand(operand) if layer.layer().operands[operand].role == Role::Bias => {
                if bias.replace(operand).is_some() {
                    return Err(NormalizeError::at(layer, summand, Obstacle::SecondBias));
                }
            }
            _ if is_offset(&subject, summand) => offset.push(summand),
            _ => {
                terms.push(term(&subject, summand).ok_or_else(|| blame(&subject, summand))?);
                places.push(summand);
            }
        }
    }
    if let Some(place) = transform_beside_others(&terms) {
        return Err(NormalizeError::at(layer, places[place], Obstacle::TransformBesideOthers));
    }
    let (input, base_weight) = (layer.input(), layer.base_weight());
    let residual = layer.residual();
    Ok(NormalForm { layer: layer.clone(), input, base_weight, terms, offset, bias, activation, residual })
}

/// The term that transforms rows by a sparse matrix where another term that isn't sparse itself would need them as they are.
fn transform_beside_others(terms: &[Term]) -> Option<usize> {
    let transforms = |term: &Term| matches!(term.core, Core::TransformedInputs(_) | Core::TransformedOutputs(_));
    let others = terms.iter().filter(|term| !matches!(term.core, Core::Sparse { .. })).count();
    terms.iter().position(transforms).filter(|_| others > 1)
}

/// Whether `node` is a vector or number that an adapter brings, known when it is loaded. A shared bias is no part of it.
fn is_offset(subject: &Subject<'_>, node: Handle<Node>) -> bool {
    let layer = subject.layer.layer();
    let reads_bias = || {
        let mut biases = layer.operands.iter().filter(|(_, operand)| operand.role == Role::Bias);
        biases.any(|(bias, _)| layer.depends_on(node, bias))
    };
    subject.is_scale(node) && subject.layer.type_of(node).scope == Scope::PerSegment && !reads_bias()
}

/// What the additions at `node` add, from the left.
fn summands(subject: &Subject<'_>, node: Handle<Node>) -> Result<Vec<Handle<Node>>, NormalizeError> {
    let (mut summands, mut places) = (Vec::new(), vec![node]);
    while let Some(place) = places.pop() {
        match *subject.node(place) {
            _ if summands.len() == MAX_TERMS => {
                return Err(NormalizeError::at(subject.layer, node, Obstacle::TooLong));
            }
            Node::Elementwise { operator: Operator::Add, lhs, rhs } => places.extend([rhs, lhs]),
            _ => summands.push(place),
        }
    }
    Ok(summands)
}

/// `outer * core(inner * x)`
fn term(subject: &Subject<'_>, node: Handle<Node>) -> Option<Term> {
    let (outer, mapped) = unscaled(subject, node);
    let (core, inner, x) = match *subject.node(mapped) {
        Node::MatMul { lhs, rhs, reduce } => matmul(subject, lhs, rhs, reduce)?,
        Node::ReduceRank { reduce, value } => rank_reduction(subject, value, reduce)?,
        _ => return None,
    };
    (*subject.node(x) == Node::Operand(subject.layer.input())).then_some(Term { inner, outer, core })
}

type Mapped = (Core, Option<Handle<Node>>, Handle<Node>);

/// `(inner * x) @ w0`, `((inner * x) @ b) @ a`, or one of both with sparse matrices
fn matmul(subject: &Subject<'_>, lhs: Handle<Node>, rhs: Handle<Node>, reduce: Reduce) -> Option<Mapped> {
    let is_sum = reduce == Reduce::Sum;
    let Node::MatMul { lhs: scaled, rhs: b, reduce: Reduce::Sum } = *subject.node(lhs) else {
        let core = match subject.is_base_weight(rhs) {
            true => Some(Core::Base),
            false => subject.is_sparse(rhs).then_some(Core::Sparse { first: rhs, second: None }),
        };
        let (inner, x) = unscaled(subject, lhs);
        return Some((core.filter(|_| is_sum)?, inner, x));
    };
    let (inner, x) = unscaled(subject, scaled);
    let of_base = match (subject.is_base_weight(b), subject.is_base_weight(rhs)) {
        (false, true) => Some(Core::TransformedInputs(b)).filter(|_| subject.is_transform(b)),
        (true, false) => Some(Core::TransformedOutputs(rhs)).filter(|_| subject.is_transform(rhs)),
        _ if is_sum && subject.is_sparse(b) && subject.is_sparse(rhs) => {
            Some(Core::Sparse { first: b, second: Some(rhs) })
        }
        _ => None,
    };
    if let Some(core) = of_base.filter(|_| is_sum) {
        return Some((core, inner, x));
    }
    let is_factor = |node| {
        let has_rank_axis = subject.layer.type_of(node).rank_axis.is_some();
        !subject.is_base_weight(node) && !subject.reads_input(node) && !has_rank_axis
    };
    (is_factor(b) && is_factor(rhs)).then_some((Core::Additive { b, a: rhs, reduce }, inner, x))
}

/// The value of `sum_rank(rows(a) * ((inner * (columns(b) * x)) @ w0))`
fn rank_reduction(subject: &Subject<'_>, value: Handle<Node>, reduce: Reduce) -> Option<Mapped> {
    let (rows, projected) = factors(subject, value)?;
    let Node::Rows(a) = *subject.node(rows) else { return None };
    let Node::MatMul { lhs, rhs, reduce: Reduce::Sum } = *subject.node(projected) else { return None };
    let (inner, scaled) = unscaled(subject, lhs);
    let (columns, x) = factors(subject, scaled)?;
    let Node::Columns(b) = *subject.node(columns) else { return None };
    subject.is_base_weight(rhs).then_some((Core::Multiplicative { b, a, reduce }, inner, x))
}

/// `scale * value` as both; any other value as itself, without a scale.
fn unscaled(subject: &Subject<'_>, node: Handle<Node>) -> (Option<Handle<Node>>, Handle<Node>) {
    match factors(subject, node) {
        Some((scale, value)) if subject.is_scale(scale) => (Some(scale), value),
        _ => (None, node),
    }
}

/// The factors of a product: what is known at load time, and what depends on the input.
fn factors(subject: &Subject<'_>, node: Handle<Node>) -> Option<(Handle<Node>, Handle<Node>)> {
    let Node::Elementwise { operator: Operator::Multiply, lhs, rhs } = *subject.node(node) else { return None };
    match (subject.reads_input(lhs), subject.reads_input(rhs)) {
        (false, true) => Some((lhs, rhs)),
        (true, false) => Some((rhs, lhs)),
        _ => None,
    }
}
