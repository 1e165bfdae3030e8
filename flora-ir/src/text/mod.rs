//! The text form of a layer: what a person writes into a file, what snapshots show, and what an error points into.
//!
//! ```text
//! // StarCoder's query projection with a per-request fLoRA adapter.
//! layer query(x: input[tokens, D], w0: weight[D, K]: f16, b: adapter[D, R], a: adapter[R, K]) {
//!     let change = b @ a;
//!     x @ (w0 * change)
//! }
//! ```
//!
//! - An operand is `name: role[dimensions]`, with `: f32` (the default), `: f16` or `: bf16` behind it. Roles are `input`,
//!   `weight`, `bias`, `adapter` and `residual`; no dimension is a scalar, one a vector, two a matrix. A dimension is `tokens`, a name, or
//!   a number.
//! - `@`, `*` and `/` bind alike and from the left, as in Python; `+` binds weaker.
//! - Functions: `columns`, `rows`, `sum_rank`, `mean_rank`, `column_norm`, `transpose`, `matmul_mean`,
//!   `face_splitting` and `khatri_rao` (of two each), and the activations `identity`, `relu`, `gelu_erf`, `gelu_tanh`, `silu`.
//! - `let` names a value, used by that name any number of times; `//` starts a comment.

mod lexer;
mod parse;
mod print;

pub(crate) use parse::parse_pattern;
pub use parse::{MAX_DEPTH, MAX_SOURCE_BYTES, ParseError, parse};
pub(crate) use print::print_node;
pub(crate) use print::print_values;
pub use print::{print, print_equation};

use std::borrow::Cow;

use crate::arena::Handle;
use crate::layer::{Activation, Axis, Backward, Node, Pairs, Reduce, Role, Side};
use crate::types::ElementType;

const ROLES: [(&str, Role); 6] = [
    ("input", Role::Input),
    ("weight", Role::BaseWeight),
    ("bias", Role::Bias),
    ("adapter", Role::Adapter),
    ("sparse", Role::Sparse),
    ("residual", Role::Residual),
];

const ELEMENTS: [ElementType; 3] = [ElementType::F32, ElementType::F16, ElementType::BF16];

/// The name of `role` in the text form.
fn role_name(role: Role) -> &'static str {
    ROLES.iter().find(|(_, named)| *named == role).map_or("adapter", |(name, _)| name)
}

/// A function of one argument by its name.
fn unary_function(name: &str) -> Option<fn(Handle<Node>) -> Node> {
    Some(match name {
        "columns" => Node::Columns,
        "rows" => Node::Rows,
        "column_norm" => Node::ColumnNorm,
        "transpose" => Node::Transpose,
        "sum_rank" => |value| Node::ReduceRank { reduce: Reduce::Sum, value },
        "mean_rank" => |value| Node::ReduceRank { reduce: Reduce::Mean, value },
        "identity" => |value| Node::Activation { function: Activation::Identity, value },
        "relu" => |value| Node::Activation { function: Activation::Relu, value },
        "gelu_erf" => |value| Node::Activation { function: Activation::GeluErf, value },
        "gelu_tanh" => |value| Node::Activation { function: Activation::GeluTanh, value },
        "silu" => |value| Node::Activation { function: Activation::Silu, value },
        _ => return None,
    })
}

/// What a function of two arguments makes of them.
type Binary = fn(Handle<Node>, Handle<Node>) -> Node;

/// A function of two arguments by its name.
fn binary_function(name: &str) -> Option<Binary> {
    Some(match name {
        "matmul_mean" => |lhs, rhs| Node::MatMul { lhs, rhs, reduce: Reduce::Mean },
        "face_splitting" => |lhs, rhs| Node::PairProduct { pairs: Pairs::Columns, lhs, rhs },
        "khatri_rao" => |lhs, rhs| Node::PairProduct { pairs: Pairs::Rows, lhs, rhs },
        _ => return None,
    })
}

/// An operation of gradients by its name, as the rules of gradients are written with it.
fn backward_function(name: &str, value: Handle<Node>, like: Option<Handle<Node>>) -> Option<Backward> {
    Some(match (name, like) {
        ("sum_like", Some(like)) => Backward::SumLike { value, like },
        ("broadcast_like", Some(like)) => Backward::BroadcastLike { value, like },
        ("sum_pairs_left", Some(like)) => Backward::SumPairs { side: Side::Left, value, like },
        ("sum_pairs_right", Some(like)) => Backward::SumPairs { side: Side::Right, value, like },
        ("stack", None) => Backward::Stack(value),
        ("rank_extent", None) => Backward::Extent { axis: Axis::Rank, value },
        ("width", None) => Backward::Extent { axis: Axis::Columns, value },
        (_, None) => {
            let activation = name.strip_suffix(DERIVATIVE)?;
            let function = Activation::ALL.into_iter().find(|function| function.name() == activation)?;
            Backward::Derivative { function, value }
        }
        _ => return None,
    })
}

/// What follows the name of an activation in that of its derivative.
const DERIVATIVE: &str = "_derivative";

/// The name of the function that `node` is written as, where it isn't an operand, a number or an infix operator.
fn function_name(node: &Node) -> Option<Cow<'static, str>> {
    let name = match node {
        Node::MatMul { reduce: Reduce::Mean, .. } => "matmul_mean",
        Node::Columns(_) => "columns",
        Node::Rows(_) => "rows",
        Node::ColumnNorm(_) => "column_norm",
        Node::Transpose(_) => "transpose",
        Node::ReduceRank { reduce: Reduce::Sum, .. } => "sum_rank",
        Node::ReduceRank { reduce: Reduce::Mean, .. } => "mean_rank",
        Node::PairProduct { pairs, .. } => pairs.name(),
        Node::Activation { function, .. } => function.name(),
        Node::Backward(backward) => match backward {
            Backward::Stack(_) => "stack",
            Backward::SumLike { .. } => "sum_like",
            Backward::BroadcastLike { .. } => "broadcast_like",
            Backward::SumPairs { side: Side::Left, .. } => "sum_pairs_left",
            Backward::SumPairs { side: Side::Right, .. } => "sum_pairs_right",
            Backward::Extent { axis: Axis::Rank, .. } => "rank_extent",
            Backward::Extent { axis: Axis::Columns, .. } => "width",
            Backward::Derivative { function, .. } => return Some(format!("{}{DERIVATIVE}", function.name()).into()),
        },
        Node::MatMul { reduce: Reduce::Sum, .. } | Node::Operand(_) | Node::Constant(_) | Node::Elementwise { .. } => {
            return None;
        }
    };
    Some(name.into())
}
