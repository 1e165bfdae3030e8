//! The type of one operation from the types of what it reads: the typing rules of the IR, and what breaks each of them.

use crate::arena::Handle;
use crate::layer::{Layer, Node, Operator};
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};

/// A broken typing rule, before it is given a place.
pub(crate) struct Mistake {
    pub(crate) message: String,
    pub(crate) help: String,
}

fn mistake<T>(message: impl Into<String>, help: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake { message: message.into(), help: help.into() })
}

/// The type of `node`, given the type of every node that it reads.
pub(crate) fn infer<'t>(
    layer: &Layer,
    node: &Node,
    type_of: impl Fn(Handle<Node>) -> &'t TensorType,
) -> Result<TensorType, Mistake> {
    match *node {
        Node::Operand(operand) => match layer.operands.get(operand) {
            Some(operand) => Ok(operand.ty.clone()),
            None => mistake(
                format!("operand {operand:?} does not exist"),
                "declare the operand in this layer before it is used; a handle of another layer can't be",
            ),
        },
        Node::Constant(number) if !number.is_finite() => {
            mistake(format!("the constant {number} is not a finite number"), "write a finite number")
        }
        Node::Constant(_) => {
            Ok(TensorType { shape: Shape::Scalar, rank_axis: None, element: ElementType::F32, scope: Scope::Shared })
        }
        Node::MatMul { lhs, rhs, .. } => {
            let (l, r) = (type_of(lhs), type_of(rhs));
            Ok(TensorType { shape: matmul(l, r)?, ..combined(layer, lhs, l, rhs, r)? })
        }
        Node::Elementwise { operator, lhs, rhs } => {
            let (l, r) = (type_of(lhs), type_of(rhs));
            Ok(TensorType { shape: broadcast(operator, l, r)?, ..combined(layer, lhs, l, rhs, r)? })
        }
        Node::Columns(value) => {
            let (m, n) = split(type_of(value), "columns")?;
            with_rank_axis(type_of(value), m, n)
        }
        Node::Rows(value) => {
            let (m, n) = split(type_of(value), "rows")?;
            with_rank_axis(type_of(value), n, m)
        }
        Node::ReduceRank { value, .. } => {
            let ty = type_of(value);
            if ty.rank_axis.is_none() {
                return mistake(
                    format!("{ty} has no rank axis to reduce"),
                    "reduce a value that is made of columns(b) or rows(a)",
                );
            }
            Ok(TensorType { rank_axis: None, ..ty.clone() })
        }
        Node::ColumnNorm(value) => {
            let ty = type_of(value);
            match &ty.shape {
                Shape::Matrix(Dimension::Tokens, _) => mistake(
                    "a norm over the tokens would mix the rows of different requests",
                    "take the norm of a weight, such as column_norm(w0 + b @ a)",
                ),
                Shape::Matrix(_, columns) => Ok(TensorType { shape: Shape::Vector(columns.clone()), ..ty.clone() }),
                other => mistake(
                    format!("column_norm needs a matrix, this is {other}"),
                    "take the norm of a weight, such as column_norm(w0 + b @ a)",
                ),
            }
        }
        Node::Activation { value, .. } => Ok(type_of(value).clone()),
    }
}

/// `[m, n] @ [n, p]`
fn matmul(l: &TensorType, r: &TensorType) -> Result<Shape, Mistake> {
    let (Shape::Matrix(m, n), Shape::Matrix(o, p)) = (&l.shape, &r.shape) else {
        let (side, other) = if matches!(l.shape, Shape::Matrix(..)) { ("right", r) } else { ("left", l) };
        return mistake(
            format!("the {side} side of a matmul must be a matrix, this is {other}"),
            "use `*` to scale by a vector or a scalar",
        );
    };
    if n != o {
        let help = if p == m {
            "the sides meet the other way round: exchange them".to_owned()
        } else if m == o {
            format!("the left side would have to be transposed: declare it [{n}, {m}]")
        } else if n == p {
            format!("the right side would have to be transposed: declare it [{p}, {o}]")
        } else {
            format!("the last dimension of the left side and the first of the right must be the same: {n} is not {o}")
        };
        return mistake(format!("{l} @ {r} does not meet: it would contract {n} with {o}"), help);
    }
    if *n == Dimension::Tokens {
        return mistake(
            "a matmul over the tokens would mix the rows of different requests",
            "contract over the dimensions of the weight or the rank",
        );
    }
    Ok(Shape::Matrix(m.clone(), p.clone()))
}

/// Elementwise: a scalar goes with everything, a vector with every row of a matrix.
fn broadcast(operator: Operator, l: &TensorType, r: &TensorType) -> Result<Shape, Mistake> {
    let sign = operator.sign();
    match (&l.shape, &r.shape) {
        (Shape::Scalar, other) | (other, Shape::Scalar) => Ok(other.clone()),
        (l, r) if l == r => Ok(l.clone()),
        (Shape::Vector(n), matrix @ Shape::Matrix(_, columns))
        | (matrix @ Shape::Matrix(_, columns), Shape::Vector(n))
            if n == columns =>
        {
            Ok(matrix.clone())
        }
        (Shape::Vector(n), Shape::Matrix(rows, columns)) | (Shape::Matrix(rows, columns), Shape::Vector(n)) => {
            let help = if n == rows {
                format!(
                    "a vector scales the last dimension, {columns}; to scale the rows of a weight, scale the input: (v * x) @ w0"
                )
            } else {
                format!("the vector must be as long as the matrix is wide: {n} is not {columns}")
            };
            mistake(format!("the shapes of {l} {sign} {r} don't broadcast"), help)
        }
        _ => mistake(
            format!("the shapes of {l} {sign} {r} don't broadcast"),
            "both sides must have the same dimensions, or one be a vector or a scalar that broadcasts over the other",
        ),
    }
}

/// What two values have in common besides their shape: one rank axis, the wider element type, the narrower scope.
fn combined(
    layer: &Layer,
    lhs: Handle<Node>,
    l: &TensorType,
    rhs: Handle<Node>,
    r: &TensorType,
) -> Result<TensorType, Mistake> {
    if let (Some(one), Some(other)) = (&l.rank_axis, &r.rank_axis)
        && one != other
    {
        return mistake(
            format!("two different rank axes meet: {one} and {other}"),
            "reduce one of them first, or give both adapters the same rank dimension",
        );
    }
    // A number in the equation has no element type of its own.
    let is_constant = |node| matches!(layer.nodes.get(node), Some(Node::Constant(_)));
    let element = match (is_constant(lhs), is_constant(rhs)) {
        (true, false) => r.element,
        (false, true) => l.element,
        _ => l.element.join(r.element),
    };
    Ok(TensorType {
        shape: Shape::Scalar,
        rank_axis: l.rank_axis.clone().or_else(|| r.rank_axis.clone()),
        element,
        scope: l.scope.max(r.scope),
    })
}

/// The dimensions of a matrix that `columns` or `rows` takes apart.
fn split<'t>(ty: &'t TensorType, operation: &str) -> Result<(&'t Dimension, &'t Dimension), Mistake> {
    match (&ty.shape, &ty.rank_axis) {
        (_, Some(_)) => mistake(
            format!("{operation} of a value that already has a rank axis, {ty}"),
            "reduce the rank axis first, with sum_rank or mean_rank",
        ),
        (Shape::Matrix(Dimension::Tokens, _) | Shape::Matrix(_, Dimension::Tokens), None) => mistake(
            format!("{operation} would make the tokens a vector, and rows of different requests would mix"),
            format!("take {operation} of an adapter matrix"),
        ),
        (Shape::Matrix(m, n), None) => Ok((m, n)),
        (other, None) => mistake(
            format!("{operation} needs a matrix, this is {other}"),
            format!("take {operation} of an adapter matrix, such as b: adapter[D, R]"),
        ),
    }
}

fn with_rank_axis(ty: &TensorType, extent: &Dimension, rank: &Dimension) -> Result<TensorType, Mistake> {
    Ok(TensorType { shape: Shape::Vector(extent.clone()), rank_axis: Some(rank.clone()), ..ty.clone() })
}
