//! The gradient of every operation of the IR, one row each.
//!
//! A row is written in the text form. `m` and `n` are what the operation reads, `y` is its value, `g` the gradient of that; each
//! gradient has the type of what it is of. Beside the functions of the text form there are
//!
//! | function | is |
//! |---|---|
//! | `sum_like(v, m)` | `v` summed over the rows, elements and ranks that `m` doesn't have: what undoes a broadcast |
//! | `broadcast_like(v, m)` | `v` at every place of `m`: what undoes a sum |
//! | `sum_pairs_left(v, m)`, `sum_pairs_right(v, n)` | `v` summed over the pairs that a column or row is in, as the first or the second |
//! | `stack(v)` | vectors over the rank axis as the rows of a matrix: what undoes `rows` |
//! | `rank_extent(m)`, `width(m)` | how many a mean over the rank, or over the columns of `m`, divides by |
//! | `relu_derivative(m)` and its like | φ'(m) |

use std::sync::LazyLock;

use crate::arena::Handle;
use crate::layer::{Layer, Node};
use crate::text::parse_pattern;

/// The gradients of one operation.
#[derive(Debug)]
pub struct GradientRule {
    /// The operation, in the text form.
    pub operation: &'static str,
    /// The gradient of each value that it reads, in the text form; none where the operation's value is a constant of the backward
    /// pass.
    pub gradients: &'static [&'static str],
    /// What it says, in words.
    pub words: &'static str,
    pub(super) pattern: Layer,
    pub(super) parts: Vec<Layer>,
}

/// Every rule.
pub fn rules() -> &'static [GradientRule] {
    &RULES
}

static RULES: LazyLock<Vec<GradientRule>> = LazyLock::new(|| {
    let rule = |&(operation, gradients, words): &Row| {
        let pattern = parse_pattern(operation).ok()?;
        let parts = gradients.iter().map(|text| parse_pattern(text).ok()).collect::<Option<_>>()?;
        Some(GradientRule { operation, gradients, words, pattern, parts })
    };
    TABLE.iter().filter_map(rule).collect()
});

type Row = (&'static str, &'static [&'static str], &'static str);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("m + n", &["sum_like(g, m)", "sum_like(g, n)"],
     "a sum gives its gradient to both summands"),
    ("m * n", &["sum_like(g * n, m)", "sum_like(g * m, n)"],
     "the gradient of a factor is scaled by the other"),
    ("m / n", &["sum_like(g / n, m)", "sum_like(-1 * (g * y) / n, n)"],
     "the quotient rule"),
    ("m @ n", &["sum_like(g @ transpose(n), m)", "sum_like(transpose(m) @ g, n)"],
     "each side of a matmul meets the transposed other"),
    ("matmul_mean(m, n)", &["sum_like(g @ transpose(n), m) / width(m)", "sum_like(transpose(m) @ g, n) / width(m)"],
     "a mean is a sum, divided"),
    ("columns(m)", &["transpose(stack(g))"],
     "the gradients of the columns are the columns of the gradient"),
    ("rows(m)", &["stack(g)"],
     "the gradients of the rows are the rows of the gradient"),
    ("face_splitting(m, n)",
     &["sum_pairs_left(g * face_splitting(broadcast_like(1, m), n), m)", "sum_pairs_right(g * face_splitting(m, broadcast_like(1, n)), n)"],
     "a column's gradient is that of its pairs, each scaled by the other column"),
    ("khatri_rao(m, n)",
     &["sum_pairs_left(g * khatri_rao(broadcast_like(1, m), n), m)", "sum_pairs_right(g * khatri_rao(m, broadcast_like(1, n)), n)"],
     "a row's gradient is that of its pairs, each scaled by the other row"),
    ("sum_rank(m)", &["broadcast_like(g, m)"],
     "each summand has the gradient of the sum"),
    ("mean_rank(m)", &["broadcast_like(g, m) / rank_extent(m)"],
     "a mean is a sum, divided"),
    ("transpose(m)", &["transpose(g)"],
     "the gradient of the transposed is the gradient, transposed"),
    ("column_norm(m)", &[],
     "a norm is a constant of the backward pass, as in PEFT's DoRA"),
    ("identity(m)", &["g"],
     "the identity changes nothing"),
    ("relu(m)", &["g * relu_derivative(m)"],
     "an activation scales the gradient by its derivative"),
    ("gelu_erf(m)", &["g * gelu_erf_derivative(m)"],
     "an activation scales the gradient by its derivative"),
    ("gelu_tanh(m)", &["g * gelu_tanh_derivative(m)"],
     "an activation scales the gradient by its derivative"),
    ("silu(m)", &["g * silu_derivative(m)"],
     "an activation scales the gradient by its derivative"),
];

impl GradientRule {
    /// The rule of `node`; none for operands, constants and operations of gradients.
    pub(super) fn of(node: &Node) -> Option<&'static GradientRule> {
        rules().iter().find(|rule| {
            rule.pattern.root.and_then(|root| rule.pattern.nodes.get(root)).is_some_and(|root| is_same(root, node))
        })
    }
}

/// Whether two nodes are the same operation, whatever they read.
fn is_same(one: &Node, other: &Node) -> bool {
    let of_nothing = |node: &Node, place: Handle<Node>| node.map_operands(|_| place);
    match (one.operands().next(), other.operands().next()) {
        (Some(place), Some(_)) => of_nothing(one, place) == of_nothing(other, place),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
