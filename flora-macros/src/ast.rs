//! The equation as its author wrote it, names resolved: the small language that `#[flora::layer]` accepts, without the rest
//! of Rust's. Each part remembers the token that a mistake about it is shown at.

mod body;
mod signature;

use flora_ir::{Activation, ElementType, Operator, Pairs, Reduce, Role, Shape, TensorType};
use proc_macro2::Span;
use syn::{Ident, ItemFn};

use crate::mistakes::both;

/// A layer's equation.
pub(crate) struct Equation {
    /// The function's name.
    pub(crate) name: Ident,
    /// The operands, in order.
    pub(crate) parameters: Vec<Parameter>,
    /// What was declared of the output.
    pub(crate) output: Output,
    /// The values of the `let` bindings, in order.
    pub(crate) bindings: Vec<Expression>,
    /// The output.
    pub(crate) result: Expression,
}

/// One argument of the function.
pub(crate) struct Parameter {
    /// Its name.
    pub(crate) name: String,
    /// Where it is named.
    pub(crate) span: Span,
    /// What was declared of it.
    pub(crate) declared: Declared,
}

/// The type of an operand.
pub(crate) struct Declared {
    /// What a value of this type is to the layer.
    pub(crate) role: Role,
    /// Shape, element type and scope.
    pub(crate) ty: TensorType,
}

/// The return type.
pub(crate) struct Output {
    /// `[tokens, k]`
    pub(crate) shape: Shape,
    /// The element type, if it was written; it follows from the operands otherwise.
    pub(crate) element: Option<ElementType>,
    /// The type as written.
    pub(crate) tokens: syn::Type,
}

/// An expression of the body.
pub(crate) struct Expression {
    /// What it computes.
    pub(crate) kind: ExpressionKind,
    /// The operator, the method's name, or the operand itself.
    pub(crate) span: Span,
}

/// The kinds of [`Expression`].
pub(crate) enum ExpressionKind {
    /// A parameter, by position.
    Parameter(usize),
    /// An earlier binding, by position.
    Binding(usize),
    /// A literal.
    Number(f64),
    /// `lhs + rhs`, `lhs * rhs`, `lhs / rhs`
    Elementwise(Operator, Box<Expression>, Box<Expression>),
    /// `lhs.matmul(rhs)`, `lhs.matmul_mean(rhs)`
    MatMul(Reduce, Box<Expression>, Box<Expression>),
    /// `lhs.face_splitting(rhs)`, `lhs.khatri_rao(rhs)`
    PairProduct(Pairs, Box<Expression>, Box<Expression>),
    /// `value.function()`
    Unary(Unary, Box<Expression>),
}

/// A method without arguments.
#[derive(Clone, Copy)]
pub(crate) enum Unary {
    /// `columns()`
    Columns,
    /// `rows()`
    Rows,
    /// `sum_rank()`, `mean_rank()`
    ReduceRank(Reduce),
    /// `column_norm()`
    ColumnNorm,
    /// `transpose()`
    Transpose,
    /// `relu()` and its like
    Activation(Activation),
}

/// Reads signature and body.
pub(crate) fn read(function: &ItemFn) -> syn::Result<Equation> {
    let signature = signature::read(&function.sig);
    let body = body::read(&function.block, signature::names(&function.sig));
    let ((parameters, output), (bindings, result)) = both(signature, body)?;
    Ok(Equation { name: function.sig.ident.clone(), parameters, output, bindings, result })
}
