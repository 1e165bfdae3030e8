//! Why an equation has no normal form: the term in the way.

use super::pattern::Subject;
use crate::arena::Handle;
use crate::diagnostic::Diagnostic;
use crate::layer::{Node, Operator, Reduce, Span};
use crate::text::print_node;
use crate::verify::VerifiedLayer;

/// A term that keeps an equation from being an adapted linear.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{term}` is in the way of the normal form: {obstacle} ({})", .obstacle.help())]
pub struct NormalizeError {
    /// What is wrong with the term.
    pub obstacle: Obstacle,
    /// The term in the text form, as far as the rules took it.
    pub term: String,
    /// Where the term was written.
    pub span: Span,
}

impl NormalizeError {
    pub(crate) fn at(layer: &VerifiedLayer, node: Handle<Node>, obstacle: Obstacle) -> Self {
        let layer = layer.layer();
        Self { obstacle, term: print_node(layer, node), span: layer.node_span(node) }
    }

    /// The error as a diagnostic, to be shown in the source.
    pub fn diagnostic(&self) -> Diagnostic {
        let message = format!("`{}` is in the way of the normal form: {}", self.term, self.obstacle);
        Diagnostic::new(self.span, message, self.obstacle.help())
    }
}

/// What is wrong with a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Obstacle {
    /// x ∘ x or x @ … x.
    #[error("both sides depend on the input")]
    ProductOfInputs,
    /// … / x
    #[error("it divides by a value that depends on the input")]
    DivisionByInput,
    /// An activation that isn't the outermost operation.
    #[error("an activation is applied before the output is complete")]
    InnerActivation,
    /// A term that is no function of the input and not the bias.
    #[error("it does not depend on the input and is no vector of the adapter's and no bias")]
    AddedConstant,
    /// More than one bias is added.
    #[error("a bias is already added")]
    SecondBias,
    /// More than one residual is added.
    #[error("a residual is already added")]
    SecondResidual,
    /// A residual anywhere but in the outermost sum.
    #[error("the residual is not added to the finished output")]
    InnerResidual,
    /// A bias that is scaled, or added before the base weight.
    #[error("a bias or adapter is added inside a scale, a matmul or a sum over the rank")]
    InnerAddition,
    /// x itself in the sum.
    #[error("it does not pass through the base weight or a low-rank pair")]
    Unprojected,
    /// (x @ t) @ w0 or (x @ w0) @ t beside another term.
    #[error("rows are transformed by a sparse matrix for this term alone, and other terms are not of it")]
    TransformBesideOthers,
    /// x @ c with a full matrix c.
    #[error("the input meets a matrix that is neither the base weight nor of low rank")]
    DenseWeight,
    /// w0 ∘ c with a full matrix c.
    #[error("the base weight is multiplied elementwise with something that is not of low rank")]
    DenseFactor,
    /// (x @ w0) @ …
    #[error("the output of one weight is multiplied with another")]
    MatMulChain,
    /// matmul_mean(x, …)
    #[error("it takes the mean over the input's dimension")]
    MeanOverInput,
    /// A reduction over the rank that is not Eq. 5.
    #[error("the reduction over the rank is not of the form sum_rank(rows(a) * ((columns(b) * x) @ w0))")]
    RankReduction,
    /// A sum of too many terms, or too many steps.
    #[error("the equation is too long")]
    TooLong,
}

impl Obstacle {
    /// How to mend it.
    pub fn help(self) -> &'static str {
        match self {
            Obstacle::ProductOfInputs => "the layer must be linear in the input: scale it by adapters only",
            Obstacle::DivisionByInput => "divide by what is known when the adapter is loaded, such as column_norm(w0)",
            Obstacle::InnerActivation => "apply one activation, around the whole equation",
            Obstacle::AddedConstant => "add a vector: bias[K] for all rows, adapter[K] for those of one adapter",
            Obstacle::SecondBias => "add the vectors beforehand and declare one bias",
            Obstacle::SecondResidual => "add the residual once",
            Obstacle::InnerResidual => {
                "add it last, outside of scales, matmuls and the activation, as in relu(x @ w0) + residual"
            }
            Obstacle::InnerAddition => "add the bias last, outside of scales and matmuls",
            Obstacle::Unprojected => {
                "multiply it with w0 or with b @ a; to add a residual, declare it residual[tokens, K]"
            }
            Obstacle::TransformBesideOthers => {
                "leave the base weight one term, as in x @ (t @ w0); what is added beside it may be x @ s, with a sparse s"
            }
            Obstacle::DenseWeight => "write the matrix as a product b @ a, or declare it sparse[D, K]",
            Obstacle::DenseFactor => "write the factor as a product b @ a, or as sums and elementwise products of such",
            Obstacle::MatMulChain => "make it two layers",
            Obstacle::MeanOverInput => "use `@` with the input; take means over the rank only",
            Obstacle::RankReduction => "write x @ (w0 * (b @ a)) and leave the rest to the rules",
            Obstacle::TooLong => "split the layer, or multiply sums out less",
        }
    }
}

/// The innermost reason why `term`, a summand of the rewritten equation, is not one of the normal form's.
pub(super) fn blame(subject: &Subject<'_>, term: Handle<Node>) -> NormalizeError {
    let mut seen = vec![false; subject.layer.layer().nodes.len()];
    let (node, obstacle) = if subject.reads_input(term) {
        search(subject, term, false, &mut seen).unwrap_or_else(|| match subject.is_projected(term) {
            true => (term, Obstacle::RankReduction),
            false => (term, Obstacle::Unprojected),
        })
    } else {
        (term, Obstacle::AddedConstant)
    };
    NormalizeError::at(subject.layer, node, obstacle)
}

/// The first node that reads the residual inside of a summand of the outermost sum.
pub(super) fn misplaced_residual(subject: &Subject<'_>) -> Option<NormalizeError> {
    let layer = subject.layer.layer();
    let mut seen = vec![false; layer.nodes.len()];
    let mut is_inside = vec![false; layer.nodes.len()];
    let mut places = vec![subject.layer.root()];
    while let Some(place) = places.pop() {
        if std::mem::replace(&mut seen[place.index()], true) {
            continue;
        }
        match *subject.node(place) {
            Node::Elementwise { operator: Operator::Add, lhs, rhs } => places.extend([lhs, rhs]),
            _ => is_inside.iter_mut().zip(layer.reachable_from(place)).for_each(|(inside, reads)| *inside |= reads),
        }
    }
    let reads_residual = |node: &Node| node.operands().any(|operand| subject.is_residual(operand));
    let (node, _) = layer.nodes.iter().find(|(handle, node)| is_inside[handle.index()] && reads_residual(node))?;
    Some(NormalizeError::at(subject.layer, node, Obstacle::InnerResidual))
}

/// Looks at the parts first. `in_matmul`: whether `node` is the left side of a matmul.
fn search(
    subject: &Subject<'_>,
    node: Handle<Node>,
    in_matmul: bool,
    seen: &mut [bool],
) -> Option<(Handle<Node>, Obstacle)> {
    if !subject.reads_input(node) || std::mem::replace(&mut seen[node.index()], true) {
        return None;
    }
    let operation = subject.node(node);
    let is_matmul = matches!(operation, Node::MatMul { .. });
    let inner = operation.operands().find_map(|operand| search(subject, operand, is_matmul, seen));
    inner.or_else(|| match *operation {
        Node::Activation { .. } => Some((node, Obstacle::InnerActivation)),
        Node::Elementwise { operator, lhs, rhs } => {
            let reads = (subject.reads_input(lhs), subject.reads_input(rhs));
            match (operator, reads) {
                (Operator::Divide, (_, true)) => Some((node, Obstacle::DivisionByInput)),
                (Operator::Multiply, (true, true)) => Some((node, Obstacle::ProductOfInputs)),
                (Operator::Add, (true, false) | (false, true)) => Some((node, Obstacle::InnerAddition)),
                _ => None,
            }
        }
        Node::MatMul { rhs, .. } if subject.reads_input(rhs) => Some((node, Obstacle::ProductOfInputs)),
        Node::MatMul { lhs, reduce: Reduce::Mean, .. } if !subject.is_projected(lhs) => {
            Some((node, Obstacle::MeanOverInput))
        }
        Node::MatMul { lhs, .. } if subject.is_projected(lhs) && !is_low_rank_pair(subject, node) => {
            Some((node, Obstacle::MatMulChain))
        }
        Node::MatMul { lhs, rhs, .. } if !in_matmul && !subject.is_projected(lhs) && !subject.is_base_weight(rhs) => {
            let reads_base_weight = subject.layer.layer().depends_on(rhs, subject.layer.base_weight());
            Some((rhs, if reads_base_weight { Obstacle::DenseFactor } else { Obstacle::DenseWeight }))
        }
        _ => None,
    })
}

/// (… @ b) @ a, neither of which is the base weight itself.
fn is_low_rank_pair(subject: &Subject<'_>, node: Handle<Node>) -> bool {
    let Node::MatMul { lhs, rhs: a, .. } = *subject.node(node) else { return false };
    let Node::MatMul { lhs: x, rhs: b, .. } = *subject.node(lhs) else { return false };
    !subject.is_projected(x) && !subject.is_base_weight(a) && !subject.is_base_weight(b)
}
